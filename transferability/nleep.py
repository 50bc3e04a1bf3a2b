"""N-LEEP: LEEP with clusters of the features in the place of source classes, for models without a classifier.

Y. Li, X. Jia, R. Sang, Y. Zhu, B. Green, L. Wang, B. Gong, "Ranking Neural Checkpoints", CVPR 2021,
arXiv:2011.11200.

    s_n = the leading principal components of feat_n, as many as hold 80 % of the variance
    p(s) = sum over v of pi_v N(s; m_v, S_v), a Gaussian mixture of 5 components per target class
    theta_nv = p(v | s_n)
    N-LEEP = LEEP(theta, label)

At most 0, higher is better.

Differences: formula only, compared with no authors' value. The mixture has diagonal covariances (principal
components are uncorrelated, and an EM step stays O(N V D)), floors of 1e-6 of the mean variance, and starts
from k-means++ with a seed of its own: the same for the same input.

Source: formula only, written from the paper's definition

Use:
    >>> import torch
    >>> from nleep import nleep
    >>> label = torch.arange(60) % 3
    >>> feat = torch.randn(60, 8, generator=torch.Generator().manual_seed(0)) + 9 * torch.eye(8)[label]
    >>> nleep(feat, label) > -0.01
    True
"""

import torch
from torch import Tensor


def nleep(
    feat: Tensor, label: Tensor, energy: float = 0.8, per_class: int = 5, steps: int = 100, seed: int = 0
) -> float:
    """LEEP of a Gaussian mixture that is fitted to the features.

    Args:
        feat: (N, D) features of the target images.
        label: (N,) target classes from 0; -100 leaves the row out.
        energy: share of the variance that the principal components keep, in (0, 1].
        per_class: components of the mixture per class that occurs, at most N in all.
        steps: most steps of EM; it stops when the mean log-likelihood gains less than 1e-3.
        seed: of the start.

    Returns:
        A number <= 0, higher is better; NaN if feat is not finite. Features that are all equal give minus the
        entropy of the labels.

    Raises:
        ValueError: shapes differ; label holds no integers or negative ones; energy, per_class or steps out of
            range.
    """
    if not 0 < energy <= 1:
        raise ValueError(f'nleep: energy must be in (0, 1], got {energy}: 0.8 keeps four fifths')
    if per_class < 1 or steps < 1:
        raise ValueError(
            f'nleep: per_class and steps must be >= 1, got {per_class} and {steps}: the defaults'
        )
    x, label = _labelled('nleep', feat, label)
    if not torch.isfinite(x).all():
        return float('nan')
    x = x - x.mean(dim=0)
    x = x - x.mean(dim=0)  # equal rows become exact zeros
    value, vector = _directions(x)
    share = value.flip(0).cumsum(0) / value.sum()
    kept = min(int((share < energy - 1e-12).sum()) + 1, len(value))  # eigenvalues ascend
    x = x @ vector[:, len(value) - kept :]
    if x.shape[1] == 0:
        return _leep(x.new_ones(len(x), 1), label)
    x = x / x.square().mean().sqrt()  # the floors then mean the same for any scale
    number = min(per_class * len(label.unique()), len(x))
    return _leep(_mixture(x, number, steps, torch.Generator().manual_seed(seed)), label)


def _mixture(x: Tensor, number: int, steps: int, generator: torch.Generator) -> Tensor:
    """(N, V): posteriors of a Gaussian mixture with diagonal covariances, fitted by EM."""
    mean = _centres(x, number, generator)
    post = torch.zeros(len(x), len(mean), dtype=x.dtype, device=x.device)
    post.scatter_(1, torch.cdist(x, mean).argmin(dim=1, keepdim=True), 1)
    before = -torch.inf
    for _ in range(steps):
        total = post.sum(dim=0).clamp(min=1e-12)
        mean = post.T @ x / total[:, None]
        spread = (post.T @ x.square() / total[:, None] - mean.square()).clamp(min=0) + 1e-6
        log_p = (total / len(x)).log() - 0.5 * (
            x.square() @ (1 / spread).T - 2 * x @ (mean / spread).T
            + (mean.square() / spread + (2 * torch.pi * spread).log()).sum(dim=1)
        )  # fmt: skip
        post = log_p.softmax(dim=1)
        now = float(log_p.logsumexp(dim=1).mean())
        if now - before < 1e-3:
            break
        before = now
    return post


def _centres(x: Tensor, number: int, generator: torch.Generator) -> Tensor:
    """k-means++ and a few of Lloyd's steps, on at most 100 rows per centre."""
    rows = torch.randperm(len(x), generator=generator)[: 100 * number].to(x.device)
    x = x[rows]
    centre = x[:1]
    nearest = (x - centre).square().sum(dim=1)
    for share in torch.rand(number - 1, generator=generator, dtype=torch.float64).tolist():
        chosen = int((nearest.cumsum(0) < share * nearest.sum()).sum().clamp(max=len(x) - 1))
        centre = torch.cat([centre, x[chosen : chosen + 1]])
        nearest = torch.minimum(nearest, (x - x[chosen]).square().sum(dim=1))
    for _ in range(10):
        mine = torch.cdist(x, centre).argmin(dim=1)
        count = torch.bincount(mine, minlength=number)[:, None]
        total = torch.zeros_like(centre).index_add_(0, mine, x)
        centre = torch.where(count > 0, total / count.clamp(min=1), centre)
    return centre


def _leep(prob: Tensor, label: Tensor) -> float:
    """LEEP of checked arguments: prob (N, Z) float64, label (N,)."""
    joint = prob.new_zeros(int(label.max()) + 1, prob.shape[1]).index_add_(0, label, prob)
    total = joint.sum(dim=0)
    given = joint / torch.where(total > 0, total, 1)  # P(y | z); a z without weight counts nothing
    parts = zip(prob.split(512), label.split(512))  # given[y] of all rows at once could fill the memory
    return float(sum((p * given[y]).sum(dim=1).log().sum() for p, y in parts) / len(prob))


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
