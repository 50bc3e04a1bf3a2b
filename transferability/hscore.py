"""H-score: how far do the class means of the features lie apart, measured by the features' own covariance?

Y. Bao, Y. Li, S. Huang, L. Zhang, L. Zheng, A. Zamir, L. Guibas, "An Information-Theoretic Approach to
Transferability in Task Transfer Learning", ICIP 2019; regularised: S. Ibrahim, N. Ponomareva, R. Mazumder,
"Newer is not always better: Rethinking transferability metrics, their peculiarities, stability and
performance", 2021, arXiv:2110.06893.

    g_n = mean of the features of n's class;  cov divides by N - 1
    H = trace( pinv(cov(feat)) cov(g) )
    regularised, after O. Ledoit and M. Wolf: X = feat - mean, S = X^T X / N, mu = trace(S) / D
    d2 = |S - mu I|^2
    b2 = min( d2, 1/N sum over i, j of ( mean over n of (X_ni X_nj)^2 - S_ij^2 ) )
    al = b2 / d2
    H_al = trace( pinv((1 - al) S + al mu I) (1 - al) cov(g) )

0 <= H <= C - 1, higher is better. With N - 1 <= D the plain score is C - 1 whatever the features are: take
regularized=True there, and always when N is not many times D.

Differences: H is the squared length of the class indicators' projection onto the span of X, which needs no
inverse; columns get unit variance first (H does not depend on it), so scales do not decide about the rank.

Source: thuml/Transfer-Learning-Library, tllib/ranking/hscore.py

Use:
    >>> import torch
    >>> from hscore import h_score
    >>> label = torch.arange(60) % 3
    >>> noise = torch.randn(60, 8, generator=torch.Generator().manual_seed(0))
    >>> h_score(noise + 3 * torch.eye(8)[label], label) > h_score(noise, label)
    True
"""

import torch
from torch import Tensor


def h_score(feat: Tensor, label: Tensor, regularized: bool = False) -> float:
    """Between-class covariance, in units of the covariance.

    Args:
        feat: (N, D) features of the target images.
        label: (N,) target classes from 0; -100 leaves the row out. A class may be missing.
        regularized: shrink the covariance towards a multiple of the identity.

    Returns:
        A number in 0..C-1, higher is better; 0 if all features are equal, NaN if one is not finite.

    Raises:
        ValueError: shapes differ; label holds no integers or negative ones.
    """
    x, label = _labelled('h_score', feat, label)
    if not torch.isfinite(x).all():
        return float('nan')
    x = _centred(x)
    if not regularized:
        scale = torch.linalg.vector_norm(x, dim=0)
        x /= torch.where(scale > 0, scale, 1)
    value, vector = _directions(x)
    total, number = _class_sums(x, label)
    between = (total @ vector).square() / number.clamp(min=1)[:, None]  # (C, r)
    if not regularized:
        return float((between / value).sum())
    al, mu = _ledoit_wolf(x, value)
    n = len(x)
    return float((1 - al) / max(n - 1, 1) * (between / ((1 - al) * value / n + al * mu)).sum())


def shrinkage(feat: Tensor) -> float:
    """al of the regularised score: the weight of the identity, in 0..1.

    Args:
        feat: (N, D) features.

    Raises:
        ValueError: feat has another shape.
    """
    x = _centred(_matrix('shrinkage', 'feat', feat))
    if not torch.isfinite(x).all():
        return float('nan')
    return _ledoit_wolf(x, _directions(x)[0])[0]


def _ledoit_wolf(x: Tensor, value: Tensor) -> tuple[float, float]:
    """(al, mu) of centred features with these squared singular values: no sum over i, j needs a (D, D)."""
    n, d = x.shape
    mu, square = value.sum() / n / d, (value / n).square().sum()  # of S: trace / D, |S|^2
    d2 = square - d * mu**2
    b2 = (torch.linalg.vector_norm(x, dim=1).pow(4).mean() - square) / n
    if d2 <= square * 1e-15:  # S is a multiple of the identity, and stays so
        return 0.0, float(mu)
    return float(torch.minimum(b2, d2) / d2), float(mu)


def _centred(x: Tensor) -> Tensor:
    """A copy minus the mean; columns that are constant to rounding become exact zeros."""
    size = torch.linalg.vector_norm(x, torch.inf, dim=0)
    x = x - x.mean(dim=0)
    x -= x.mean(dim=0)
    x[:, torch.linalg.vector_norm(x, torch.inf, dim=0) <= 8 * torch.finfo(x.dtype).eps * size] = 0
    return x


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
