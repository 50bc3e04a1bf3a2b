"""NCE, negative conditional entropy: how much do source labels leave open about target labels?

A. Tran, C. Nguyen, T. Hassner, "Transferability and Hardness of Supervised Classification Tasks", ICCV 2019,
arXiv:1908.08142.

    P(y, z) = share of the images with target class y and source class z
    NCE = sum over y, z of P(y, z) log( P(y, z) / P(z) ) = -H(Y | Z)

At most 0, higher is better. With the true source labels of the images it compares two tasks, with the source
model's predictions a model and a task.

Differences: pairs that do not occur are left out, where the reference adds 1e-20 inside the logarithm: the
same to rounding.

Source: thuml/LogME, NCE.py; thuml/Transfer-Learning-Library, tllib/ranking/nce.py

Use:
    >>> import torch
    >>> from nce import nce
    >>> label = torch.arange(6) % 3
    >>> nce(label + 4, label) == 0  # every source class is one target class
    True
"""

import torch
from torch import Tensor


def nce(source_label: Tensor, label: Tensor) -> float:
    """Negative conditional entropy of the target labels, given the source labels.

    Args:
        source_label: (N,) source classes from 0: out.argmax(1) of the source model, or true labels.
        label: (N,) target classes from 0. -100 in either leaves the row out; classes may be missing.

    Returns:
        A number <= 0, higher is better.

    Raises:
        ValueError: shapes differ; labels hold no integers or negative ones; no row is left.
    """
    z, counts_z = _classes('nce', 'source_label', source_label, None)
    y, counts_y = _classes('nce', 'label', label, len(z))
    counts = counts_z & counts_y.to(z.device)
    if not counts.any():
        got = '-100 in one of the two in every row'
        raise ValueError(f'nce: label must share rows with source_label, got {got}: keep rows that have both')
    z, y = z[counts].unique(return_inverse=True)[1], y.to(z.device)[counts].unique(return_inverse=True)[1]
    width = int(z.max()) + 1
    joint = torch.bincount(y * width + z, minlength=(int(y.max()) + 1) * width).view(-1, width).double()
    given = joint / joint.sum(dim=0)
    occurs = joint > 0
    return float((joint[occurs] * given[occurs].log()).sum() / len(y))


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
