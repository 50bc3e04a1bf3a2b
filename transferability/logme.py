"""LogME, log maximum evidence: how well could a Bayesian linear model on the features explain the labels?

K. You, Y. Liu, J. Wang, M. Long, "LogME: Practical Assessment of Pre-trained Models for Transfer Learning",
ICML 2021, arXiv:2102.11005; K. You, Y. Liu, Z. Zhang, J. Wang, M. Jordan, M. Long, "Ranking and Tuning
Pre-trained Models", JMLR 2022, arXiv:2110.10545.

    per column y of the targets (one-hot for classes), weights of prior precision a, noise of precision b
    feat = U S V^T, sigma = s^2, x = U^T y, r0 = |y|^2 - |x|^2; start a = b = 1
    repeat, at most 11 times:
        t = a / b
        gamma = sum of sigma / (sigma + t)
        m2 = sum of sigma x^2 / (t + sigma)^2
        res = sum of x^2 / (1 + sigma / t)^2 + r0
        a, b = gamma / (m2 + 1e-5), (N - gamma) / (res + 1e-5)
        stop if |a / b - t| <= 1e-3 t
    evidence = ( D/2 ln a + N/2 ln b - 1/2 sum of the D ln(a + b sigma) - b/2 res - a/2 m2 - N/2 ln 2 pi ) / N
    LogME = mean of the evidence over the columns

Higher is better; the features are taken as they are, not centred. t is the ridge penalty that the data
choose themselves: LogME is its own shrunk form. Since
D/2 ln a - 1/2 sum ln(a + b sigma) = -1/2 sum ln(1 + sigma / t),
directions without variance drop out, and nothing overflows where a or b is extreme.

Differences: the authors' current solver sums ln(a + b sigma) over the min(N, D) singular values only, and its
score is too high by (D - N)/(2N) ln a for D > N; we sum all D terms, as their first solver does. The stopping
rules of the two differ, too, by 1e-4 of the score.

Source: thuml/LogME, LogME.py

Use:
    >>> import torch
    >>> from logme import logme
    >>> label = torch.arange(60) % 3
    >>> noise = torch.randn(60, 8, generator=torch.Generator().manual_seed(0))
    >>> logme(noise + 3 * torch.eye(8)[label], label) > logme(noise, label)
    True
"""

import math

import torch
from torch import Tensor


def logme(feat: Tensor, target: Tensor, regression: bool = False) -> float:
    """Mean log evidence per sample of the targets, given the features.

    Args:
        feat: (N, D) features of the target images, raw.
        target: (N,) classes, each of 0..C-1 occurs, -100 leaves the row out; with regression (N,) or (N, C)
            real values.
        regression: what target is.

    Returns:
        A number, higher is better; NaN if feat or target is not finite.

    Raises:
        ValueError: shapes differ; a class between 0 and the highest does not occur (its column would be
            explained by nothing, and lift the mean); label holds no integers or negative ones.
    """
    evidence, _, _ = log_evidence(feat, target, regression)
    return float(evidence.mean())


def log_evidence(feat: Tensor, target: Tensor, regression: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Per column of the targets: evidence per sample, precisions a of the weights and b of the noise."""
    if regression:
        x = _matrix('logme', 'feat', feat)
        y = target[:, None] if torch.is_tensor(target) and target.dim() == 1 else target
        y = _matrix('logme', 'target', y).to(x.device)
        if len(y) != len(x):
            remedy = 'a row of values per row of feat'
            raise ValueError(f'logme: target must have {len(x)} rows, got {len(y)}: {remedy}')
        moment, square = y.T @ x, y.square().sum(dim=0)
    else:
        x, label = _labelled('logme', feat, target, 'target')
        moment, square = _class_sums(x, label)  # of one-hot columns: y^T feat and |y|^2
        if missing := (square == 0).nonzero()[:, 0].tolist():
            some = ', '.join(map(str, missing[:5])) + (', ...' if len(missing) > 5 else '')
            remedy = 'target.unique(return_inverse=True)[1] numbers the classes that do'
            wanted = f'every class of 0..{len(square) - 1}'
            raise ValueError(f'logme: target must hold {wanted}, got none of {some}: {remedy}')
    if not (torch.isfinite(x).all() and torch.isfinite(moment).all() and torch.isfinite(square).all()):
        return tuple(torch.full_like(square, torch.nan) for _ in range(3))
    n = len(x)
    sigma, vector = _directions(x)
    x2 = (moment @ vector).square() / sigma  # (C, r): the squares of U^T y
    r0 = (square - x2.sum(dim=1)).clamp(min=0)
    a, b = torch.ones_like(square), torch.ones_like(square)
    m2, res, goes_on = a, a, torch.ones_like(square, dtype=torch.bool)
    for _ in range(11):
        t = (a / b)[:, None]
        gamma = (sigma / (sigma + t)).sum(dim=1)
        m2 = torch.where(goes_on, (sigma * x2 / (t + sigma).square()).sum(dim=1), m2)
        res = torch.where(goes_on, (x2 / (1 + sigma / t).square()).sum(dim=1) + r0, res)
        a = torch.where(goes_on, gamma / (m2 + 1e-5), a)
        b = torch.where(goes_on, (n - gamma) / (res + 1e-5), b)
        goes_on = goes_on & ((a / b - t[:, 0]).abs() > 1e-3 * t[:, 0])
        if not goes_on.any():
            break
    fit = n / 2 * (b / (2 * math.pi)).log() - b / 2 * res - a / 2 * m2
    return (fit - 0.5 * (sigma * (b / a)[:, None]).log1p().sum(dim=1)) / n, a, b


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
