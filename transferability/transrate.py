"""TransRate: how many bits do the labels save in coding the features?

L. Huang, J. Huang, Y. Rong, Q. Yang, Y. Wei, "Frustratingly Easy Transferability Estimation", ICML 2022,
arXiv:2106.09362.

    Z = feat - mean;  R(Z) = 1/2 log det( I + Z^T Z / (n eps) ), n rows
    TransRate = R(Z) - sum over c of n_c / N * R(rows of class c)

At least 0 up to rounding, higher is better. eps is an absolute distortion: the value depends on the scale of
the features, so compare models whose features have one scale, or feat / feat.std().

Differences: formula only, compared with no authors' value. The classes weigh n_c / N; for classes of equal
size that is their plain mean.

Source: formula only, written from the paper's definition

Use:
    >>> import torch
    >>> from transrate import transrate
    >>> label = torch.arange(60) % 3
    >>> noise = torch.randn(60, 8, generator=torch.Generator().manual_seed(0))
    >>> transrate(noise + 3 * torch.eye(8)[label], label) > transrate(noise, label)
    True
"""

import torch
from torch import Tensor


def transrate(feat: Tensor, label: Tensor, eps: float = 1e-4) -> float:
    """Coding rate of the features minus that of the classes.

    Args:
        feat: (N, D) features of the target images.
        label: (N,) target classes from 0; -100 leaves the row out. A class may be missing.
        eps: distortion that coding may cause, > 0, in squared units of the features.

    Returns:
        A number, higher is better; NaN if feat is not finite.

    Raises:
        ValueError: shapes differ; label holds no integers or negative ones; eps is not positive.
    """
    if not eps > 0:
        raise ValueError(f'transrate: eps must be > 0, got {eps}: 1e-4 is the default')
    x, label = _labelled('transrate', feat, label)
    if not torch.isfinite(x).all():
        return float('nan')
    x = x - x.mean(dim=0)
    rates = [len(rows) / len(x) * _rate(rows, eps) for c in label.unique() if len(rows := x[label == c])]
    return float(_rate(x, eps) - sum(rates))


def _rate(x: Tensor, eps: float) -> Tensor:
    """1/2 log det(I + x^T x / (n eps)), from the smaller Gram matrix."""
    gram = (x.T @ x if len(x) >= x.shape[1] else x @ x.T) / (len(x) * eps)
    factor, failed = torch.linalg.cholesky_ex(gram + torch.eye(len(gram), dtype=x.dtype, device=x.device))
    if failed:  # features so large that the identity is lost beside them
        return 0.5 * torch.linalg.eigvalsh(gram).clamp(min=0).log1p().sum()
    return factor.diagonal().log().sum()


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
