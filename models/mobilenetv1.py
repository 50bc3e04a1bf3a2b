"""MobileNetV1 for ImageNet, the student of ReviewKD's and mdistiller's second ImageNet setting.

A. G. Howard et al., "MobileNets: Efficient Convolutional Neural Networks for Mobile Vision Applications",
2017, arXiv:1704.04861. Parameter names are those of ReviewKD and mdistiller.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from .feats import Feats

_SETTINGS = (
    *((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2)),
    *((512, 1),) * 5,
    *((1024, 2), (1024, 1)),
)  # channels, stride
_TAPS = (0, 3, 5, 11, 13)  # the units whose outputs are handed out


class MobileNetV1(nn.Module):
    """Stem, thirteen depthwise-separable units, global average pooling, linear classifier.

    Args:
        num_classes: K.

    Shape:
        x: (N, 3, H, W). `net(x)` returns (N, K); `net(x, True)` returns Feats with five maps: the stem, and
        the last unit of each size from 1/4 on.
    """

    def __init__(self, num_classes: int = 1000) -> None:
        super().__init__()
        units, c_in = [_unit(3, 32, 3, 2)], 32
        for c_out, stride in _SETTINGS:
            units.append(nn.Sequential(*_unit(c_in, c_in, 3, stride, groups=c_in), *_unit(c_in, c_out, 1, 1)))
            c_in = c_out
        self.model = nn.Sequential(*units)
        self.fc = nn.Linear(c_in, num_classes)

    def forward(self, x: Tensor, feats: bool = False) -> Tensor | Feats:
        pre = self.model[0][:-1](x)
        fm = F.relu(pre)
        f = self.after(0, fm)
        return Feats(f.out, f.feat, [fm, *f.fms], [pre, *f.pres]) if feats else f.out

    def after(self, k: int, fm: Tensor) -> Feats:
        """The rest of the network from fms[k]: its later maps, embedding and logits."""
        fms, pres = [], []
        for i in range(_TAPS[k] + 1, len(self.model)):
            pre = self.model[i][:-1](fm)
            fm = F.relu(pre)
            if i in _TAPS:
                fms.append(fm)
                pres.append(pre)
        feat = fm.mean(dim=(2, 3))
        return Feats(self.fc(feat), feat, fms, pres)

    def bn_before_relu(self) -> list[nn.BatchNorm2d]:
        """The last batch norm of each tapped unit, aligned with fms[1:]."""
        return [self.model[i][4] for i in _TAPS[1:]]

    def feat_modules(self) -> list[nn.Module]:
        return [self.model]

    def classifier_layer(self) -> nn.Linear:
        return self.fc


def _unit(c_in: int, c_out: int, kernel: int, stride: int, groups: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(
        c_in, c_out, kernel, stride=stride, padding=kernel // 2, groups=groups, bias=False
    )
    return nn.Sequential(convolution, nn.BatchNorm2d(c_out), nn.ReLU())
