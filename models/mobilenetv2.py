"""MobileNetV2 at half width for CIFAR, as RepDistiller defines it.

M. Sandler, A. Howard, M. Zhu, A. Zhmoginov, L.-C. Chen, "MobileNetV2: Inverted Residuals and Linear
Bottlenecks", CVPR 2018, arXiv:1801.04381. ReLU instead of ReLU6, stem with stride 2.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from .feats import Feats

# expansion, channels (at half width), repeats, stride of the first
_SETTINGS = (
    (1, 8, 1, 1),
    (6, 12, 2, 1),
    (6, 16, 3, 2),
    (6, 32, 4, 2),
    (6, 48, 3, 1),
    (6, 80, 3, 2),
    (6, 160, 1, 1),
)
_TAPS = (1, 2, 4, 6)  # the groups whose outputs are handed out


class MobileNetV2(nn.Module):
    """Stem, seven groups of inverted residuals, a 1x1 convolution, pooling, classifier.

    Args:
        num_classes: number of classes.

    Shape:
        x: (N, 3, H, W). `net(x)` returns (N, classes); `net(x, True)` returns Feats with five maps. The
        groups' outputs are linear bottlenecks: fms[1:] have no activation and equal pres[1:].
    """

    def __init__(self, num_classes: int = 100) -> None:
        super().__init__()
        self.conv1 = _unit(3, 16, kernel=3, stride=2)
        groups, c_in = [], 16
        for t, c, n, s in _SETTINGS:
            groups.append(
                nn.Sequential(*(_Inverted(c if i else c_in, c, s if i == 0 else 1, t) for i in range(n)))
            )
            c_in = c
        self.blocks = nn.ModuleList(groups)
        self.conv2 = _unit(c_in, 1280, kernel=1, stride=1)
        self.classifier = nn.Sequential(nn.Linear(1280, num_classes))
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                # fan out over all channels, for the depthwise convolutions as well
                nn.init.normal_(
                    m.weight, std=(2 / (m.kernel_size[0] * m.kernel_size[1] * m.out_channels)) ** 0.5
                )
        nn.init.normal_(self.classifier[0].weight, std=0.01)
        nn.init.zeros_(self.classifier[0].bias)

    def forward(self, x: Tensor, feats: bool = False) -> Tensor | Feats:
        pre = self.conv1[1](self.conv1[0](x))
        fm = F.relu(pre)
        f = self.after(0, fm)
        return Feats(f.out, f.feat, [fm, *f.fms], [pre, *f.pres]) if feats else f.out

    def after(self, k: int, fm: Tensor) -> Feats:
        """The rest of the network from fms[k]: its later maps, embedding and logits."""
        fms = []
        for i in range(_TAPS[k - 1] + 1 if k else 0, len(self.blocks)):
            fm = self.blocks[i](fm)
            if i in _TAPS:
                fms.append(fm)
        feat = self.conv2(fm).mean(dim=(2, 3))
        return Feats(self.classifier(feat), feat, fms, list(fms))

    def bn_before_relu(self) -> list[nn.BatchNorm2d]:
        """The last batch norm of each tapped group, aligned with fms[1:]; no ReLU follows it."""
        return [self.blocks[i][-1].conv[7] for i in _TAPS]

    def feat_modules(self) -> list[nn.Module]:
        return [self.conv1, self.blocks]

    def classifier_layer(self) -> nn.Linear:
        return self.classifier[0]


class _Inverted(nn.Module):
    """1x1 convolution to t times the channels, depthwise 3x3, 1x1 to the output, plus x if it fits."""

    def __init__(self, c_in: int, c_out: int, stride: int, t: int) -> None:
        super().__init__()
        wide = c_in * t
        self.conv = nn.Sequential(
            *_unit(c_in, wide, kernel=1, stride=1),
            *_unit(wide, wide, kernel=3, stride=stride, groups=wide),
            nn.Conv2d(wide, c_out, 1, bias=False),
            nn.BatchNorm2d(c_out),
        )
        self.residual = stride == 1 and c_in == c_out

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.residual else self.conv(x)


def _unit(c_in: int, c_out: int, kernel: int, stride: int, groups: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(
        c_in, c_out, kernel, stride=stride, padding=kernel // 2, groups=groups, bias=False
    )
    return nn.Sequential(convolution, nn.BatchNorm2d(c_out), nn.ReLU())
