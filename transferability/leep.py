"""LEEP, log expected empirical prediction: how well do the source model's classes tell the target's?

C. Nguyen, T. Hassner, M. Seeger, C. Archambeau, "LEEP: A New Measure to Evaluate Transferability of Learned
Representations", ICML 2020, arXiv:2002.12462.

    theta_n = the source model's softmax over ITS classes z on target image n
    P(y, z) = 1/N sum of theta_nz over the n of class y
    P(y | z) = P(y, z) / sum over y of P(y, z)
    LEEP = 1/N sum over n of log( sum over z of P(y_n | z) theta_nz )

At most 0, higher is better. One forward pass, no training, O(N Z). It needs the source model's classifier:
for a model without one (self-supervised, a backbone) take nleep.

Differences: a source class of probability 0 on all images is left out, where the formula divides 0 by 0.

Source: thuml/LogME, LEEP.py; thuml/Transfer-Learning-Library, tllib/ranking/leep.py

Use:
    >>> import torch
    >>> from leep import leep
    >>> prob = torch.eye(3).repeat(2, 1)  # the source's classes are the target's
    >>> leep(prob, torch.arange(3).repeat(2)) == 0
    True
"""

import torch
from torch import Tensor


def leep(prob_source: Tensor, label: Tensor) -> float:
    """Log expected empirical prediction of a source model on target data.

    Args:
        prob_source: (N, Z) softmax of the source model over its Z classes, on the target images.
        label: (N,) target classes from 0; -100 leaves the row out. A class may be missing.

    Returns:
        A number <= 0, higher is better; NaN if prob_source is not finite.

    Raises:
        ValueError: shapes differ; prob_source has negative entries or rows that do not sum to 1 (within 0.02,
            for half precision); label holds no integers or negative ones.
    """
    prob = _matrix('leep', 'prob_source', prob_source)
    label, counts = _classes('leep', 'label', label, len(prob))
    label, counts = label.to(prob.device), counts.to(prob.device)
    if not counts.all():
        prob, label = prob[counts], label[counts]
    worst = float((prob.sum(dim=1) - 1).abs().max())
    if worst > 0.02 or float(prob.min()) < 0:
        got = f'a row that sums to {1 + worst:.3g} or {1 - worst:.3g}' if worst > 0.02 else 'negative ones'
        raise ValueError(f'leep: prob_source must hold probabilities, got {got}: logits.softmax(1)')
    return _leep(prob, label)


def _leep(prob: Tensor, label: Tensor) -> float:
    """LEEP of checked arguments: prob (N, Z) float64, label (N,)."""
    joint = prob.new_zeros(int(label.max()) + 1, prob.shape[1]).index_add_(0, label, prob)
    total = joint.sum(dim=0)
    given = joint / torch.where(total > 0, total, 1)  # P(y | z); a z without weight counts nothing
    parts = zip(prob.split(512), label.split(512))  # given[y] of all rows at once could fill the memory
    return float(sum((p * given[y]).sum(dim=1).log().sum() for p, y in parts) / len(prob))


def _matrix(who: str, name: str, x: Tensor) -> Tensor:
    """(N, D) in float64, where the caller's gradients do not reach."""
    if not torch.is_tensor(x) or x.dim() != 2 or 0 in x.shape:
        got = tuple(x.shape) if torch.is_tensor(x) else type(x).__name__
        remedy = 'x[:, None] makes one column of (N,)'
        if not torch.is_tensor(x):
            remedy = 'torch.as_tensor(x) makes a tensor'
        elif 0 in x.shape:
            remedy = 'give at least one row and one column'
        elif x.dim() > 2:
            remedy = 'x.mean(dim=(2, 3)) pools maps, x.flatten(1) keeps their positions'
        raise ValueError(f'{who}: {name} must be (N, D), got {got}: {remedy}')
    return (x.cpu() if x.device.type == 'mps' else x).detach().double()


def _classes(who: str, name: str, label: Tensor, n: int | None) -> tuple[Tensor, Tensor]:
    """n labels (None: any number) as int64, and which rows count: not those of -100, which are 0 then."""
    right = torch.is_tensor(label) and label.dim() == 1 and len(label) == (len(label) if n is None else n)
    if not right or len(label) == 0:
        got = tuple(label.shape) if torch.is_tensor(label) else type(label).__name__
        wanted = '(N,)' if n is None else f'({n},)'
        remedy = 'one class number per row, in the order of the rows; y.argmax(1) reads one-hot rows'
        raise ValueError(f'{who}: {name} must be {wanted}, got {got}: {remedy}')
    if label.is_floating_point() or label.dtype == torch.bool:
        raise ValueError(f'{who}: {name} must hold integers, got {label.dtype}: {name}.long()')
    label = (label.cpu() if label.device.type == 'mps' else label).detach().long()
    counts = label != -100
    if label[counts].numel() == 0 or int(label[counts].min()) < 0:
        got = 'no label but -100' if label[counts].numel() == 0 else int(label[counts].min())
        remedy = 'number the classes from 0; -100 leaves a row out'
        raise ValueError(f'{who}: {name} must be >= 0, got {got}: {remedy}')
    return torch.where(counts, label, 0), counts
