"""SFDA, self-challenging Fisher discriminant analysis: can a Fisher classifier tell the classes, made harder?

W. Shao, X. Zhao, Y. Ge, Z. Zhang, L. Yang, X. Wang, Y. Shan, P. Luo, "Not All Models Are Equal: Predicting
Model Transferability in a Self-challenging Fisher Space", ECCV 2022, arXiv:2207.03036.

    S_W = 1/N sum over n of (f_n - m_y)(f_n - m_y)^T, m_c the class means, q_c = n_c / N
    lambda = exp( -a * largest eigenvalue of S_W );  S = (1 - lambda) S_W + lambda I
    p(c | f) = softmax over c of ( f^T S^-1 m_c - 1/2 m_c^T S^-1 m_c + ln q_c )
    challenge: f_n <- p(y_n | f_n) f_n + (1 - p(y_n | f_n)) * mean of the features of the other classes
    SFDA = mean over n of ln p'(y_n | f_n), p' fitted to the challenged features with the same lambda

At most 0, higher is better. The paper writes p in the space of the Fisher projection U, U U^T in the place of
S^-1: between classes only the part in the span of the class means matters, and there both agree.

Differences: formula only, compared with no authors' value. lambda is at least 1e-8 of the largest eigenvalue,
so that S has an inverse also for more dimensions than samples.

Source: formula only, written from the paper's definition

Use:
    >>> import torch
    >>> from sfda import sfda
    >>> label = torch.arange(60) % 3
    >>> noise = torch.randn(60, 8, generator=torch.Generator().manual_seed(0))
    >>> sfda(noise + 3 * torch.eye(8)[label], label) > sfda(noise, label)
    True
"""

import math

import torch
from torch import Tensor


def sfda(feat: Tensor, label: Tensor, a: float = 5.0) -> float:
    """Mean log-likelihood of a regularised Fisher classifier on challenged features.

    Args:
        feat: (N, D) features of the target images.
        label: (N,) target classes from 0; -100 leaves the row out. A class may be missing.
        a: how fast the regularisation falls with the spread of the classes, > 0.

    Returns:
        A number <= 0, higher is better; NaN if feat is not finite. Features that are all equal give minus the
        entropy of the labels.

    Raises:
        ValueError: shapes differ; label holds no integers or negative ones; a is not positive.
    """
    if not a > 0:
        raise ValueError(f'sfda: a must be > 0, got {a}: 5 is the default')
    x, label = _labelled('sfda', feat, label)
    if not torch.isfinite(x).all():
        return float('nan')
    label = label.unique(return_inverse=True)[1]
    x = x - x.mean(dim=0)
    x = x - x.mean(dim=0)  # equal rows become exact zeros
    log_p, lam = _fisher(x, label, a, None)
    p = log_p.gather(1, label[:, None]).exp()
    total, number = _class_sums(x, label)
    others = (total.sum(dim=0) - total) / (len(x) - number).clamp(min=1)[:, None]
    log_p, _ = _fisher(p * x + (1 - p) * others[label], label, a, lam)
    return float(log_p.gather(1, label[:, None]).mean())


def _fisher(x: Tensor, label: Tensor, a: float, lam: float | None) -> tuple[Tensor, float]:
    """Log posteriors (N, C) of the classes, and lambda (None: work it out)."""
    total, number = _class_sums(x, label)
    mean = total / number[:, None]
    value, vector = _directions(x - mean[label])
    value = value / len(x)
    largest = float(value[-1]) if len(value) else 0.0
    if lam is None:
        lam = max(math.exp(-a * largest), 1e-8 * largest)
        lam = min(lam, 1.0)
    # S^-1 = 1/lam I + V diag(1/((1 - lam) value + lam) - 1/lam) V^T, with the directions V of S_W
    inner = 1 / ((1 - lam) * value + lam) - 1 / lam
    coef = mean / lam + (mean @ vector * inner) @ vector.T
    out = x @ coef.T - 0.5 * (mean * coef).sum(dim=1) + (number / len(x)).log()
    return out.log_softmax(dim=1), lam


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
