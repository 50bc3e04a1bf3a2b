"""The other MobileNetV2: mdistiller's for tiny ImageNet, full width, ReLU6, a 1x1-convolution classifier.

M. Sandler et al., CVPR 2018, arXiv:1801.04381. Parameter names are mdistiller's. Its stem pads a 1x1
convolution, so that 64 pixels become 66.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from .feats import Feats

# name, units, channels, stride of the first, expansion
_STAGES = (
    ('stage1', 1, 16, 1, 1),
    ('stage2', 2, 24, 2, 6),
    ('stage3', 3, 32, 2, 6),
    ('stage4', 4, 64, 2, 6),
    ('stage5', 3, 96, 1, 6),
    ('stage6', 3, 160, 1, 6),
    ('stage7', 1, 320, 1, 6),
)
_TAPS = ('stage2', 'stage3', 'stage4')


class MobileNetV2Tiny(nn.Module):
    """Stem, seven stages of inverted residuals, a 1x1 convolution, pooling, a 1x1-convolution classifier.

    Args:
        num_classes: K.

    Shape:
        x: (N, 3, H, W). `net(x)` returns (N, K); `net(x, True)` returns Feats with five maps: stem, stages 2
        to 4 (linear bottlenecks, equal in fms and pres) and the last convolution.
    """

    def __init__(self, num_classes: int = 200) -> None:
        super().__init__()
        self.pre = nn.Sequential(nn.Conv2d(3, 32, 1, padding=1), nn.BatchNorm2d(32), nn.ReLU6())
        c_in = 32
        for name, units, c, stride, t in _STAGES:
            blocks = [_Inverted(c if i else c_in, c, 1 if i else stride, t) for i in range(units)]
            setattr(self, name, blocks[0] if units == 1 else nn.Sequential(*blocks))
            c_in = c
        self.conv1 = nn.Sequential(nn.Conv2d(c_in, 1280, 1), nn.BatchNorm2d(1280), nn.ReLU6())
        self.conv2 = _Classifier(1280, num_classes)

    def forward(self, x: Tensor, feats: bool = False) -> Tensor | Feats:
        pre = self.pre[1](self.pre[0](x))
        fm = F.relu6(pre)
        f = self.after(0, fm)
        return Feats(f.out, f.feat, [fm, *f.fms], [pre, *f.pres]) if feats else f.out

    def after(self, k: int, fm: Tensor) -> Feats:
        """The rest of the network from fms[k]: its later maps, embedding and logits."""
        fms, pres, names = [], [], [stage[0] for stage in _STAGES]
        if k <= len(_TAPS):
            for name in names[names.index(_TAPS[k - 1]) + 1 if k else 0 :]:
                fm = getattr(self, name)(fm)
                if name in _TAPS:
                    fms.append(fm)
                    pres.append(fm)
            pre = self.conv1[1](self.conv1[0](fm))
            fm = F.relu6(pre)
            fms.append(fm)
            pres.append(pre)
        feat = fm.mean(dim=(2, 3))
        return Feats(self.conv2(feat), feat, fms, pres)

    def bn_before_relu(self) -> list[nn.BatchNorm2d]:
        raise ValueError('MobileNetV2Tiny has no batch norm right before the ReLU that ends a stage')

    def feat_modules(self) -> list[nn.Module]:
        return [self.pre, *(getattr(self, stage[0]) for stage in _STAGES), self.conv1]

    def classifier_layer(self) -> nn.Linear:
        return self.conv2


class _Classifier(nn.Linear):
    """A linear layer that is a 1x1 convolution in state dicts, as mdistiller's is: (K, C, 1, 1)."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.flatten(1)  # four-dimensional where functional_call is given a state dict
        return F.linear(x, weight, self.bias)

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f'{prefix}weight'] = destination[f'{prefix}weight'][..., None, None]

    def _load_from_state_dict(self, state: dict, prefix: str, *args) -> None:
        name = f'{prefix}weight'
        flat = {name: state[name].flatten(1)} if name in state else {}
        super()._load_from_state_dict({**state, **flat}, prefix, *args)  # the given dict stays as it is


class _Inverted(nn.Module):
    def __init__(self, c_in: int, c_out: int, stride: int, t: int) -> None:
        super().__init__()
        wide = c_in * t
        self.residual = nn.Sequential(
            *(nn.Conv2d(c_in, wide, 1), nn.BatchNorm2d(wide), nn.ReLU6()),
            *(nn.Conv2d(wide, wide, 3, stride, 1, groups=wide), nn.BatchNorm2d(wide), nn.ReLU6()),
            *(nn.Conv2d(wide, c_out, 1), nn.BatchNorm2d(c_out)),
        )
        self.keeps = stride == 1 and c_in == c_out

    def forward(self, x: Tensor) -> Tensor:
        return x + self.residual(x) if self.keeps else self.residual(x)
