"""Training images without labels: their target is NO_LABEL, which cross-entropy and losses leave out."""

import torch

NO_LABEL = -100


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
