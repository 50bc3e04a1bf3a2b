"""The networks by name: `build('resnet20', num_classes=10)`.

Names are RepDistiller's. Every network gives logits for `net(x)` and Feats(out, feat, fms, pres) for `net(x,
True)`.
"""

import re
from functools import partial

from torch import nn

from .checkpoint import load_weights
from .feats import Feats
from .resnet import resnet

__all__ = ['MODELS', 'Feats', 'build', 'load_weights']

MODELS = {f'resnet{depth}': partial(resnet, depth) for depth in (8, 14, 20, 32, 44, 56, 110)}
MODELS |= {f'resnet{depth}x4': partial(resnet, depth, wide=True) for depth in (8, 32)}


def build(name: str, num_classes: int = 100) -> nn.Module:
    """The network called `name` with fresh weights. Any other legal depth, e.g. resnet26, works too.

    Raises:
        ValueError: no network has this name, or its depth is not 6n + 2.
    """
    if name in MODELS:
        return MODELS[name](num_classes=num_classes)
    if m := re.fullmatch(r'resnet(\d+)(x4)?', name):
        return resnet(int(m[1]), wide=bool(m[2]), num_classes=num_classes)
    raise ValueError(
        f'no network is called {name!r}; there are {", ".join(MODELS)} and any resnetN or resnetNx4 '
        f'with N = 6n + 2'
    )
