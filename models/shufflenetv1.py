"""ShuffleNet V1 with three groups for CIFAR (ShuffleV1), as RepDistiller defines it.

X. Zhang, X. Zhou, M. Lin, J. Sun, "ShuffleNet: An Extremely Efficient Convolutional Neural Network for Mobile
Devices", CVPR 2018, arXiv:1707.01083. A ReLU follows the depthwise convolution, which the paper leaves out.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .feats import Feats


class ShuffleV1(nn.Module):
    """1x1 stem, three stages of 4, 8 and 4 blocks, pooling, classifier.

    Args:
        num_classes: number of classes.

    Shape:
        x: (N, 3, H, W). `net(x)` returns (N, classes); `net(x, True)` returns Feats with four maps.
    """

    def __init__(self, num_classes: int = 100) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 24, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(24)
        self.layer1 = _stage(24, 240, 4)
        self.layer2 = _stage(240, 480, 8)
        self.layer3 = _stage(480, 960, 4)
        self.linear = nn.Linear(960, num_classes)

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
        return Feats(self.linear(feat), feat, fms, pres)

    def bn_before_relu(self) -> list[nn.BatchNorm2d]:
        raise ValueError('ShuffleV1 has no batch norm right before the ReLU that ends a stage')

    def feat_modules(self) -> list[nn.Module]:
        return [self.conv1, self.bn1, self.layer1, self.layer2, self.layer3]

    def classifier_layer(self) -> nn.Linear:
        return self.linear


class _Block(nn.Module):
    """Grouped 1x1, shuffle, depthwise 3x3, grouped 1x1; returns the sum or concatenation BEFORE its ReLU."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.stride, self.groups = stride, 1 if c_in == 24 else 3
        c_out -= c_in if stride == 2 else 0  # the pooled input is concatenated
        mid = c_out // 4
        self.conv1 = nn.Conv2d(c_in, mid, 1, groups=self.groups, bias=False)
        self.bn1 = nn.BatchNorm2d(mid)
        self.conv2 = nn.Conv2d(mid, mid, 3, stride=stride, padding=1, groups=mid, bias=False)
        self.bn2 = nn.BatchNorm2d(mid)
        self.conv3 = nn.Conv2d(mid, c_out, 1, groups=3, bias=False)
        self.bn3 = nn.BatchNorm2d(c_out)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = y.unflatten(1, (self.groups, -1)).transpose(1, 2).flatten(1, 2)
        y = self.bn3(self.conv3(F.relu(self.bn2(self.conv2(y)))))
        if self.stride == 2:
            return torch.cat([y, F.avg_pool2d(x, 3, stride=2, padding=1)], dim=1)
        return y + x


def _stage(c_in: int, c_out: int, blocks: int) -> nn.Sequential:
    return nn.Sequential(_Block(c_in, c_out, 2), *(_Block(c_out, c_out, 1) for _ in range(blocks - 1)))
