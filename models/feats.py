"""What a network hands out: `net(x)` gives logits, `net(x, True)` gives Feats."""

from typing import Any, NamedTuple

from torch import Tensor


class Feats(NamedTuple):
    """Everything a distillation loss may ask of one forward pass, shallow to deep.

    out: (N, K) logits.  feat: (N, D), the vector that enters the classifier.
    fms: the maps [stem, stage 1, stage 2, ...], each (N, C, H, W), after their activation.
    pres: the same maps before that activation.
    extra: what a student that some method changes hands out besides, e.g. the logits of its exits; of a
        transformer with a distillation token [logits of the class head, of the distillation head].
    tokens: of a vision transformer, its patch tokens (N, H * W, D) after each block, at least the first two,
        and last those after the final layer norm.
    levels: of ours (models/vit.py), the patches as tokens before positions are added, then the tokens after
        each block, without the final layer norm.
    """

    out: Tensor
    feat: Tensor
    fms: list[Tensor]
    pres: list[Tensor]
    extra: Any = None
    tokens: list[Tensor] | tuple = ()
    levels: list[Tensor] | tuple = ()
