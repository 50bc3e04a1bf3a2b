"""Wide ResNets wrn_D_K (D = 6n + 4) for CIFAR, as RepDistiller defines them.

S. Zagoruyko, N. Komodakis, "Wide Residual Networks", BMVC 2016, arXiv:1605.07146. Pre-activation blocks: a
stage hands out the raw sum, and what comes before its ReLU is the next batch norm's output.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from .feats import Feats


class WRN(nn.Module):
    """Stem convolution, three stages of n pre-activation blocks, batch norm, pooling, classifier.

    Args:
        n: blocks per stage.
        widen: K, factor on the widths 16, 32, 64.
        num_classes: number of classes.

    Shape:
        x: (N, 3, H, W). `net(x)` returns (N, classes); `net(x, True)` returns Feats with four maps. fms are
        the sums, which have negatives; pres[i] for i >= 1 is the output of the batch norm that follows.
    """

    def __init__(self, n: int, widen: int, num_classes: int = 100) -> None:
        super().__init__()
        widths = (16, 16 * widen, 32 * widen, 64 * widen)
        self.conv1 = nn.Conv2d(3, widths[0], 3, padding=1, bias=False)
        self.block1 = _Stage(n, widths[0], widths[1], stride=1)
        self.block2 = _Stage(n, widths[1], widths[2], stride=2)
        self.block3 = _Stage(n, widths[2], widths[3], stride=2)
        self.bn1 = nn.BatchNorm2d(widths[3])
        self.fc = nn.Linear(widths[3], num_classes)
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode='fan_out', nonlinearity='relu')
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor, feats: bool = False) -> Tensor | Feats:
        fm = self.conv1(x)
        f = self.after(0, fm)
        return Feats(f.out, f.feat, [fm, *f.fms], [fm, *f.pres]) if feats else f.out

    def after(self, k: int, fm: Tensor) -> Feats:
        """The rest of the network from fms[k]: its later maps, embedding and logits."""
        fms, pres = [], []
        for i, stage in enumerate((self.block1, self.block2, self.block3)[k:]):
            fm, first = stage(fm)
            fms.append(fm)
            if i > 0:  # the first batch norm of this stage is what follows the stage before
                pres.append(first)
        last = self.bn1(fm)
        feat = F.relu(last).mean(dim=(2, 3))
        return Feats(self.fc(feat), feat, fms, [*pres, last] if fms else [])

    def bn_before_relu(self) -> list[nn.BatchNorm2d]:
        """The batch norm that follows each stage, aligned with fms[1:]."""
        return [self.block2.layer[0].bn1, self.block3.layer[0].bn1, self.bn1]

    def feat_modules(self) -> list[nn.Module]:
        return [self.conv1, self.block1, self.block2, self.block3]

    def classifier_layer(self) -> nn.Linear:
        return self.fc


class _Stage(nn.Module):
    def __init__(self, n: int, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.layer = nn.Sequential(
            _Block(c_in, c_out, stride), *(_Block(c_out, c_out, 1) for _ in range(n - 1))
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The stage's sum, and the output of its first batch norm."""
        x, first = self.layer[0](x)
        for block in self.layer[1:]:
            x, _ = block(x)
        return x, first


class _Block(nn.Module):
    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=False)
        self.convShortcut = None
        if c_in != c_out:
            self.convShortcut = nn.Conv2d(c_in, c_out, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        pre = self.bn1(x)
        a = F.relu(pre)
        y = self.conv2(F.relu(self.bn2(self.conv1(a))))
        return y + (x if self.convShortcut is None else self.convShortcut(a)), pre


def wrn(depth: int, widen: int, num_classes: int = 100) -> WRN:
    """The network of a given depth, 6n + 4, and widening factor."""
    if depth < 10 or depth % 6 != 4 or widen < 1:
        raise ValueError(
            f'wrn: depth must be 6n + 4 (10, 16, 22, 28, 40, ...), got {depth} with factor {widen}'
        )
    return WRN((depth - 4) // 6, widen, num_classes)
