"""What a network hands out: `net(x)` gives logits, `net(x, True)` gives Feats."""

from typing import NamedTuple

from torch import Tensor


class Feats(NamedTuple):
    """Everything a distillation loss may ask of one forward pass, shallow to deep.

    out: (N, K) logits.  feat: (N, D), the vector that enters the classifier.
    fms: the maps [stem, stage 1, stage 2, ...], each (N, C, H, W), after their activation.
    pres: the same maps before that activation.
    """

    out: Tensor
    feat: Tensor
    fms: list[Tensor]
    pres: list[Tensor]
