"""Four-stage ResNets for CIFAR: ResNet18, ResNet34, ResNet50, as RepDistiller defines them (its resnetv2).

K. He, X. Zhang, S. Ren, J. Sun, "Deep Residual Learning for Image Recognition", CVPR 2016, arXiv:1512.03385,
with a 3x3 stem of stride 1 and no max pooling. Not to be confused with the three-stage resnetN of
models/resnet.py.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from .feats import Feats


class ResNetV2(nn.Module):
    """Stem, four stages, global average pooling, linear classifier.

    Args:
        blocks: blocks per stage.
        bottleneck: three convolutions per block and four times the channels, else two 3x3 convolutions.
        num_classes: number of classes.

    Shape:
        x: (N, 3, H, W). `net(x)` returns (N, classes); `net(x, True)` returns Feats with five maps.
    """

    def __init__(self, blocks: tuple[int, int, int, int], bottleneck: bool, num_classes: int = 100) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        make, c_in = (_Bottleneck if bottleneck else _Basic), 64
        for i, (width, count, stride) in enumerate(zip((64, 128, 256, 512), blocks, (1, 2, 2, 2)), start=1):
            stage = []
            for j in range(count):
                stage.append(make(c_in, width, stride if j == 0 else 1))
                c_in = width * make.expansion
            setattr(self, f'layer{i}', nn.Sequential(*stage))
        self.linear = nn.Linear(c_in, num_classes)
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode='fan_out', nonlinearity='relu')

    def forward(self, x: Tensor, feats: bool = False) -> Tensor | Feats:
        pre = self.bn1(self.conv1(x))
        fm = F.relu(pre)
        f = self.after(0, fm)
        return Feats(f.out, f.feat, [fm, *f.fms], [pre, *f.pres]) if feats else f.out

    def after(self, k: int, fm: Tensor) -> Feats:
        """The rest of the network from fms[k]: its later maps, embedding and logits."""
        fms, pres = [], []
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4)[k:]:
            for block in stage:
                pre = block(fm)
                fm = F.relu(pre)
            pres.append(pre)
            fms.append(fm)
        feat = fm.mean(dim=(2, 3))
        return Feats(self.linear(feat), feat, fms, pres)

    def bn_before_relu(self) -> list[nn.BatchNorm2d]:
        """The last batch norm of each stage, aligned with fms[1:]; the shortcut is added after it."""
        stages = (self.layer1, self.layer2, self.layer3, self.layer4)
        return [stage[-1].last_bn() for stage in stages]

    def feat_modules(self) -> list[nn.Module]:
        return [self.conv1, self.bn1, self.layer1, self.layer2, self.layer3, self.layer4]

    def classifier_layer(self) -> nn.Linear:
        return self.linear


def _shortcut(c_in: int, c_out: int, stride: int) -> nn.Sequential:
    if stride == 1 and c_in == c_out:
        return nn.Sequential()
    return nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride=stride, bias=False), nn.BatchNorm2d(c_out))


class _Basic(nn.Module):
    """Returns the sum BEFORE its ReLU."""

    expansion = 1

    def __init__(self, c_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, width, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = _shortcut(c_in, width, stride)

    def last_bn(self) -> nn.BatchNorm2d:
        return self.bn2

    def forward(self, x: Tensor) -> Tensor:
        return self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + self.shortcut(x)


class _Bottleneck(nn.Module):
    """Returns the sum BEFORE its ReLU."""

    expansion = 4

    def __init__(self, c_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.shortcut = _shortcut(c_in, 4 * width, stride)

    def last_bn(self) -> nn.BatchNorm2d:
        return self.bn3

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return self.bn3(self.conv3(F.relu(self.bn2(self.conv2(y))))) + self.shortcut(x)
