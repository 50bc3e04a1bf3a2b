"""Training images without labels: their target is NO_LABEL, which cross-entropy and losses leave out."""

import torch
import torch.nn.functional as F
from torch import Tensor

NO_LABEL = -100


def labelled_cross_entropy(
    out: Tensor, target: Tensor, unknown: int = NO_LABEL, count: Tensor | None = None
) -> Tensor:
    """The mean over the labels that are known; 0, not NaN, where there is none.

    count: by how many to divide instead, where these labels are one process's share of all.
    """
    if count is None:
        count = (target != unknown).sum().clamp(min=1)
    return F.cross_entropy(out, target, ignore_index=unknown, reduction='sum') / count


def forget_labels(data, share: float, seed: int):
    """The same images, of which only a random share keeps its labels; at least one does."""
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
    targets = data.targets.clone()
    targets[order[max(int(len(data) * share), 1) :].to(targets.device)] = NO_LABEL
    return data.subset(torch.arange(len(data), device=data.device), targets)


def only_labelled(data):
    """Without the images that have no label; the set itself if all have one.

    Raises:
        ValueError: none has one.
    """
    labelled = data.targets != NO_LABEL
    if bool(labelled.all()):
        return data
    if not bool(labelled.any()):
        raise ValueError('the training set has no labelled images')
    return data.subset(labelled.nonzero()[:, 0])
