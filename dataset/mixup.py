"""Active mixup: which mixes of two images the student knows least about.

D. Wang, Y. Li, L. Wang, B. Gong, "Neural Networks Are More Productive Teachers Than Human Raters: Active
Mixup for Data-Efficient Knowledge Distillation from a Blackbox Model", CVPR 2020, arXiv:2003.13960.
"""

from collections.abc import Callable

import torch
from torch import Tensor

SHARES = tuple(round(0.30 + 0.04 * k, 2) for k in range(11))  # of the first image


def all_pairs(count: int) -> Tensor:
    """(P, 2): every image with those 1, 2, ..., (count - 1) // 2 places further on, around the end."""
    first = torch.arange(count)
    return torch.cat([torch.stack([first, first.roll(-k)], dim=1) for k in range(1, (count - 1) // 2 + 1)])


def mix(images: Tensor, pairs: Tensor, shares: Tensor) -> Tensor:
    """(P, H, W, 3) bytes of (N, H, W, 3): share of the first image, the rest of the second."""
    share = shares.to(images.device).reshape(-1, 1, 1, 1)
    a, b = (images[pairs[:, k].to(images.device)].float() for k in (0, 1))
    return (share * a + (1 - share) * b).round().byte()


def hardest(top: Callable[[Tensor], Tensor], images: Tensor, pairs: Tensor, count: int, batch: int = 500):
    """The count pairs of which the student is least sure, each at its worst share.

    Args:
        top: (B, H, W, 3) bytes -> (B,) the student's largest probability.
        images: (N, H, W, 3) bytes; pairs: (P, 2) their numbers; count: how many are wanted, at most P.

    Returns:
        (count, 2) pairs and (count,) shares, the hardest first.
    """
    least, at = [], []
    for some in pairs.split(batch):
        each = [top(mix(images, some, torch.full((len(some),), share))).cpu() for share in SHARES]
        value, where = torch.stack(each).min(dim=0)
        least.append(value)
        at.append(where)
    order = torch.cat(least).argsort(stable=True)[:count]
    return pairs[order], torch.tensor(SHARES)[torch.cat(at)[order]]
