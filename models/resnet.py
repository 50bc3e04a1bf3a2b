"""CIFAR ResNets: resnetN (N = 6n + 2) and the four times wider resnetNx4, as RepDistiller defines them.

K. He, X. Zhang, S. Ren, J. Sun, "Deep Residual Learning for Image Recognition", CVPR 2016, arXiv:1512.03385,
with projection shortcuts (1x1 convolution and batch norm) where the shape changes. Parameter names are
RepDistiller's, so its checkpoints, mdistiller's and chenyaofo's load unchanged; Knowledge-Distillation-Zoo's
load after renaming (models/checkpoint.py).
"""

import torch.nn.functional as F
from torch import Tensor, nn

from .feats import Feats


class ResNet(nn.Module):
    """Stem, three stages of n basic blocks, global average pooling, linear classifier.

    Args:
        n: blocks per stage.
        widths: channels of the stem and the three stages.
        num_classes: K.

    Shape:
        x: (N, 3, H, W). `net(x)` returns (N, K); `net(x, True)` returns Feats with four maps.
    """

    def __init__(
        self, n: int, widths: tuple[int, int, int, int] = (16, 16, 32, 64), num_classes: int = 100
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, widths[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.layer1 = _stage(n, widths[0], widths[1], stride=1)
        self.layer2 = _stage(n, widths[1], widths[2], stride=2)
        self.layer3 = _stage(n, widths[2], widths[3], stride=2)
        self.fc = nn.Linear(widths[3], num_classes)
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
        for stage in (self.layer1, self.layer2, self.layer3)[k:]:
            for block in stage:
                pre = block(fm)
                fm = F.relu(pre)
            pres.append(pre)
            fms.append(fm)
        feat = fm.mean(dim=(2, 3))
        return Feats(self.fc(feat), feat, fms, pres)

    def bn_before_relu(self) -> list[nn.BatchNorm2d]:
        """The last batch norm of each stage, aligned with fms[1:]; the shortcut is added after it."""
        return [stage[-1].bn2 for stage in (self.layer1, self.layer2, self.layer3)]

    def feat_modules(self) -> list[nn.Module]:
        """Everything but the classifier."""
        return [self.conv1, self.bn1, self.layer1, self.layer2, self.layer3]

    def classifier_layer(self) -> nn.Linear:
        return self.fc


class _Block(nn.Module):
    """Two 3x3 convolutions and the shortcut; returns the sum BEFORE its ReLU, for the network to keep."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.downsample = None
        if stride != 1 or c_in != c_out:
            self.downsample = nn.Sequential(
                nn.Conv2d(c_in, c_out, 1, stride=stride, bias=False), nn.BatchNorm2d(c_out)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return y + (x if self.downsample is None else self.downsample(x))


def _stage(n: int, c_in: int, c_out: int, stride: int) -> nn.Sequential:
    return nn.Sequential(_Block(c_in, c_out, stride), *(_Block(c_out, c_out, 1) for _ in range(n - 1)))


def resnet(depth: int, wide: bool = False, num_classes: int = 100) -> ResNet:
    """The network of a given depth, 6n + 2; wide is the x4 variant."""
    if depth < 8 or depth % 6 != 2:
        raise ValueError(f'resnet: depth must be 6n + 2 (8, 14, 20, 26, 32, ...), got {depth}')
    return ResNet((depth - 2) // 6, (32, 64, 128, 256) if wide else (16, 16, 32, 64), num_classes)
