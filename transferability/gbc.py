"""GBC, Gaussian Bhattacharyya coefficient: how much do the classes overlap in the space of the features?

M. Pandy, A. Agostinelli, J. Uijlings, V. Ferrari, T. Mensink, "Transferability Estimation using Bhattacharyya
Class Separability", CVPR 2022, arXiv:2111.12780.

    features reduced to their 64 leading principal components; per class c a Gaussian N(m_c, S_c)
    S = (S_i + S_j) / 2
    D(i, j) = 1/8 (m_i - m_j)^T S^-1 (m_i - m_j) + 1/2 ln( det S / sqrt(det S_i det S_j) )
    GBC = - sum over i != j of exp( -D(i, j) )

At most 0, higher is better. The covariances are multiples of the identity ('spherical') or diagonal.

Differences: formula only, compared with no authors' value. Both orders of a pair count, as the sum is
written. A variance is at least 1e-6 of the mean variance of all features, so that a class of one image is a
narrow Gaussian and not a point, which would overlap with nothing.

Source: formula only, written from the paper's definition

Use:
    >>> import torch
    >>> from gbc import gbc
    >>> label = torch.arange(60) % 3
    >>> noise = torch.randn(60, 8, generator=torch.Generator().manual_seed(0))
    >>> gbc(noise + 3 * torch.eye(8)[label], label) > gbc(noise, label)
    True
"""

import torch
from torch import Tensor


def gbc(feat: Tensor, label: Tensor, dim: int = 64, covariance: str = 'spherical') -> float:
    """Minus the overlap of the classes, summed over ordered pairs.

    Args:
        feat: (N, D) features of the target images.
        label: (N,) target classes from 0; -100 leaves the row out. A class may be missing.
        dim: principal components that are kept, at most.
        covariance: 'spherical' or 'diagonal'.

    Returns:
        A number in -C(C-1)..0, higher is better; NaN if feat is not finite. Features that are all equal give
        -C(C-1).

    Raises:
        ValueError: shapes differ; label holds no integers or negative ones; dim < 1; unknown covariance.
    """
    if covariance not in ('spherical', 'diagonal'):
        wanted = "'spherical' (the default) or 'diagonal'"
        raise ValueError(f'gbc: covariance must be {wanted}, got {covariance!r}: choose one of them')
    if dim < 1:
        raise ValueError(f'gbc: dim must be >= 1, got {dim}: 64 is the default')
    x, label = _labelled('gbc', feat, label)
    if not torch.isfinite(x).all():
        return float('nan')
    x = x - x.mean(dim=0)
    x = x - x.mean(dim=0)  # equal rows become exact zeros
    x = x @ _directions(x)[1][:, -dim:]
    label = label.unique(return_inverse=True)[1]
    total, number = _class_sums(x, label)
    number = number[:, None]
    mean = total / number
    var = _class_sums((x - mean[label]).square(), label)[0] / number
    overall = x.square().mean(dim=0)
    if covariance == 'spherical':
        var, overall = var.mean(dim=1, keepdim=True).expand_as(var), overall.mean().expand_as(overall)
    var = torch.maximum(var, 1e-6 * overall)
    bc = [_overlap(mean[i], var[i], mean, var).sum() - 1 for i in range(len(mean))]  # 1 with itself
    return -float(sum(bc))


def _overlap(mean: Tensor, var: Tensor, means: Tensor, variances: Tensor) -> Tensor:
    """(C,): Bhattacharyya coefficients of a Gaussian (D,) with several (C, D)."""
    both = (var + variances) / 2
    apart = (mean - means).square() / both / 8
    return torch.exp(-(apart + (both.log() - (var.log() + variances.log()) / 2) / 2).sum(dim=1))


def _class_sums(x: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """Per class the sum of its rows (C, D) and their number (C,), C = max label + 1."""
    number = torch.bincount(label)
    return x.new_zeros(len(number), x.shape[1]).index_add_(0, label, x), number.to(x.dtype)


def _directions(x: Tensor) -> tuple[Tensor, Tensor]:
    """Squared singular values (r,) of x (N, D) and its right singular vectors (D, r), r its rank.

    From the smaller of the two Gram matrices: O(N D min(N, D)), and no (N, N) for tall features.
    """
    tall = len(x) >= x.shape[1]
    value, vector = torch.linalg.eigh(x.T @ x if tall else x @ x.T)
    kept = value > value[-1].clamp(min=0) * max(x.shape) * torch.finfo(x.dtype).eps
    value, vector = value[kept], vector[:, kept]
    return value, vector if tall else x.T @ (vector / value.sqrt())


def _labelled(who: str, x: Tensor, label: Tensor, y: str = 'label') -> tuple[Tensor, Tensor]:
    """Features (N, D) in float64 and labels (N,), without the rows of label -100."""
    x = _matrix(who, 'feat', x)
    label, counts = _classes(who, y, label, len(x))
    label, counts = label.to(x.device), counts.to(x.device)
    return (x, label) if counts.all() else (x[counts], label[counts])


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
