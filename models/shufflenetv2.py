"""ShuffleNet V2 for CIFAR (ShuffleV2), as RepDistiller defines it.

N. Ma, X. Zhang, H.-T. Zheng, J. Sun, "ShuffleNet V2: Practical Guidelines for Efficient CNN Architecture
Design", ECCV 2018, arXiv:1807.11164.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .feats import Feats


class ShuffleV2(nn.Module):
    """1x1 stem, three stages of 4, 8 and 4 blocks, a 1x1 convolution, pooling, classifier.

    Args:
        num_classes: number of classes.
        widths: channels of the three stages and of the last convolution.

    Shape:
        x: (N, 3, H, W). `net(x)` returns (N, classes); `net(x, True)` returns Feats with four maps. pres[1:]
        are [untouched half, new half before its ReLU], not shuffled: their channels are in another order than
        in fms[1:].
    """

    def __init__(
        self, num_classes: int = 100, widths: tuple[int, int, int, int] = (116, 232, 464, 1024)
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 24, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(24)
        self.layer1 = _stage(24, widths[0], 3)
        self.layer2 = _stage(widths[0], widths[1], 7)
        self.layer3 = _stage(widths[1], widths[2], 3)
        self.conv2 = nn.Conv2d(widths[2], widths[3], 1, bias=False)
        self.bn2 = nn.BatchNorm2d(widths[3])
        self.linear = nn.Linear(widths[3], num_classes)

    def forward(self, x: Tensor, feats: bool = False) -> Tensor | Feats:
        pre = self.bn1(self.conv1(x))
        fm = F.relu(pre)
        f = self.after(0, fm)
        return Feats(f.out, f.feat, [fm, *f.fms], [pre, *f.pres]) if feats else f.out

    def after(self, k: int, fm: Tensor) -> Feats:
        """The rest of the network from fms[k]: its later maps, embedding and logits."""
        fms, pres = [], []
        for stage in (self.layer1, self.layer2, self.layer3)[k:]:
            fm = stage[0](fm)
            for block in stage[1:]:
                fm, pre = block(fm)
            fms.append(fm)
            pres.append(pre)
        feat = F.relu(self.bn2(self.conv2(fm))).mean(dim=(2, 3))
        return Feats(self.linear(feat), feat, fms, pres)

    def bn_before_relu(self) -> list[nn.BatchNorm2d]:
        raise ValueError('ShuffleV2 has no batch norm right before the ReLU that ends a stage')

    def feat_modules(self) -> list[nn.Module]:
        return [self.conv1, self.bn1, self.layer1, self.layer2, self.layer3]

    def classifier_layer(self) -> nn.Linear:
        return self.linear


class _Down(nn.Module):
    """Halves the size: two branches, concatenated and shuffled."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        half = c_out // 2
        self.conv1 = nn.Conv2d(c_in, c_in, 3, stride=2, padding=1, groups=c_in, bias=False)
        self.bn1 = nn.BatchNorm2d(c_in)
        self.conv2 = nn.Conv2d(c_in, half, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = nn.Conv2d(c_in, half, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(half)
        self.conv4 = nn.Conv2d(half, half, 3, stride=2, padding=1, groups=half, bias=False)
        self.bn4 = nn.BatchNorm2d(half)
        self.conv5 = nn.Conv2d(half, half, 1, bias=False)
        self.bn5 = nn.BatchNorm2d(half)

    def forward(self, x: Tensor) -> Tensor:
        left = F.relu(self.bn2(self.conv2(self.bn1(self.conv1(x)))))
        right = self.bn4(self.conv4(F.relu(self.bn3(self.conv3(x)))))
        return _shuffle(torch.cat([left, F.relu(self.bn5(self.conv5(right)))], dim=1))


class _Basic(nn.Module):
    """Works on one half of the channels; returns the shuffled result and the halves before the last ReLU."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.conv1 = nn.Conv2d(half, half, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(half)
        self.conv2 = nn.Conv2d(half, half, 3, padding=1, groups=half, bias=False)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = nn.Conv2d(half, half, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(half)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        kept, x = x.chunk(2, dim=1)
        z = self.bn3(self.conv3(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))))
        return _shuffle(torch.cat([kept, F.relu(z)], dim=1)), torch.cat([kept, z], dim=1)


def _shuffle(x: Tensor) -> Tensor:
    return x.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)


def _stage(c_in: int, c_out: int, blocks: int) -> nn.Sequential:
    return nn.Sequential(_Down(c_in, c_out), *(_Basic(c_out) for _ in range(blocks)))
