"""KDCL, collaborative learning: networks trained together learn from the best combination of their logits.

Q. Guo, X. Wang, Y. Wu, Z. Yu, D. Liang, X. Hu, P. Luo, "Online Knowledge Distillation via Collaborative
Learning", CVPR 2020.

    z = combined logits of the M networks, without gradient:
        minlogit: z[k] = min over m of (outs_m[k] - outs_m[target])
        naive:    per sample the network with the smallest cross-entropy
        linear:   per sample a convex combination of small cross-entropy, found by 100 steps; never worse
                  than one network alone
        general:  sum over m of w_m * outs_m, w = C^-1 1 / (1' C^-1 1), C: products of the networks' errors,
                  averaged over held-out data, once per epoch (`general_weights`)
    loss = sum over m of CE(outs_m) + lam * T^2 * mean over n of KL(softmax(z / T) || softmax(outs_m / T))

Tap: the logits of all networks, each on its own augmentation of the same images. Contains its cross-entropy.

Differences: from the formula as secondary sources agree on it; no code of the authors was found. T and lam
are not certain. Ports that average the logits compute something else.

Source: formula only, as secondary sources agree on it.

Use:
    >>> import torch
    >>> from kdcl import KDCL
    >>> outs = [torch.randn(8, 10, requires_grad=True) for _ in range(2)]
    >>> KDCL()(outs, torch.arange(8)).backward()
    >>> outs[0].grad.norm() > 0
    tensor(True)
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class KDCL(nn.Module):
    """Cross-entropy and soft targets of the combined logits, summed over the networks.

    Args:
        mode: 'minlogit', 'naive', 'linear' or 'general'.
        T: temperature, > 0; 2.
        lam: weight of the soft targets; 1.

    Shape:
        outs: list of M tensors (N, K), or stacked (M, N, K); target: (N,) labels; weights: (M,), for
        'general'. Returns a scalar. `combine` returns z (N, K).
        Rows of label -100 are left out. Computed in float32, also under TF32, or in float64 as the student.

    Raises:
        ValueError: an argument is not legal; shapes differ; weights are missing or not (M,).
    """

    def __init__(self, mode: str = 'minlogit', T: float = 2.0, lam: float = 1.0) -> None:
        super().__init__()
        if mode not in ('minlogit', 'naive', 'linear', 'general'):
            raise ValueError(f'KDCL: mode must be minlogit, naive, linear or general, got {mode!r}')
        if not T > 0:
            raise ValueError(f'KDCL: T must be > 0, got {T}')
        self.mode, self.T, self.lam = mode, T, lam

    def forward(self, outs: list[Tensor], target: Tensor, weights: Tensor | None = None) -> Tensor:
        if not len(outs):
            raise ValueError('KDCL: outs must hold one tensor or more, got 0: one per network')
        for i, z in enumerate(outs):
            _expect('KDCL', f'outs[{i}]', z, *(('N', 'K') if i == 0 else outs[0].shape))
        target, valid = _labels('KDCL', target, *outs[0].shape)
        if weights is not None:
            _expect('KDCL', 'weights', weights, len(outs))
        z = torch.stack([_full(x, outs[0]) for x in outs])
        log_q = F.log_softmax(self.combine(z, target, weights) / self.T, dim=1)
        log_p = F.log_softmax(z / self.T, dim=2)
        soft = _per_sample(_kl(log_q, log_p, valid is None), valid, 1)
        return sum(_ce(x, target, valid) for x in z) + self.lam * self.T**2 * soft

    @torch.no_grad()
    def combine(self, outs: list[Tensor], target: Tensor, weights: Tensor | None = None) -> Tensor:
        z = torch.stack([_full(x, outs[0]) for x in outs])
        target, _ = _labels('KDCL', target, *z.shape[1:])
        truth = z.gather(2, target[None, :, None].expand(len(z), -1, 1))  # (M, N, 1)
        if self.mode == 'minlogit':
            return (z - truth).amin(dim=0)
        dead = (z == -torch.inf).all(dim=0)  # classes that all rule out: a weight of 0 times -inf is NaN
        some = z.masked_fill(dead, 0.0)
        if self.mode == 'general':
            if weights is None or weights.shape != (len(z),):
                got = None if weights is None else tuple(weights.shape)
                raise ValueError(
                    f'KDCL: weights must be ({len(z)},) in mode general, got {got}: see general_weights'
                )
            return (weights.to(z)[:, None, None] * some).sum(dim=0).masked_fill(dead, -torch.inf)
        ces = z.logsumexp(dim=2) - truth[:, :, 0]
        best = z.gather(0, ces.argmin(dim=0)[None, :, None].expand(1, -1, z.shape[2]))[0]
        if self.mode == 'naive':
            return best
        mixed = (_best_mixture(some, target, dead)[:, :, None] * some).sum(dim=0)
        mixed = mixed.masked_fill(dead, -torch.inf)
        alone = ces.amin(dim=0) < F.cross_entropy(mixed, target, reduction='none')
        return torch.where(alone[:, None], best, mixed)


@torch.no_grad()
def general_weights(probs: Tensor, onehot: Tensor) -> Tensor:
    """(M,) weights, to sum 1, from probabilities (M, n, K) and labels (n, K) of held-out data."""
    errors = (_full(probs) - onehot.to(_full(probs).dtype)).flatten(1)
    with _no_autocast(probs):
        C = (_exact(errors) @ _exact(errors).T).to(errors.dtype) / probs.shape[1]
    C = C + 1e-6 * torch.eye(len(C), dtype=C.dtype, device=C.device)  # equal networks make it singular
    w = torch.linalg.solve(C, torch.ones_like(C[0]))
    return w / w.sum()


def _best_mixture(z: Tensor, target: Tensor, dead: Tensor, steps: int = 100) -> Tensor:
    """(M, N) non-negative weights, to sum 1 per sample, of small cross-entropy: exponentiated gradient.

    A step that does not help a sample is taken back and shortened, after one that does the next is longer.
    """
    a = torch.zeros(z.shape[:2], dtype=z.dtype, device=z.device).log_softmax(dim=0)
    is_y = _is(target, z.shape[2]).to(z.dtype)
    reach = (z.amax(dim=(0, 2)) - z.amin(dim=(0, 2))).clamp(min=1e-6)  # bounds the slope
    rate, least = 4 / reach, torch.full_like(reach, torch.inf)
    kept, slope = a, torch.zeros_like(a)
    for _ in range(steps):
        mixed = (a.exp()[:, :, None] * z).sum(dim=0).masked_fill(dead, -torch.inf)
        ce = F.cross_entropy(mixed, target, reduction='none')
        helps = ce <= least
        least, kept = torch.where(helps, ce, least), torch.where(helps, a, kept)
        slope = torch.where(helps, ((mixed.softmax(dim=1) - is_y) * z).sum(dim=2), slope)
        rate = torch.where(helps, 2 * rate, rate / 4)
        a = (kept - rate * (slope - slope.amin(dim=0))).clamp(min=-60).log_softmax(dim=0)
    return kept.exp()


def _kl(log_p_t: Tensor, log_p_s: Tensor, on_host: bool = False) -> Tensor:
    """p_t (log p_t - log p_s), and 0 where p_t is 0 whatever the logarithms are.

    on_host: p_t may be looked at, as labels on the CPU were: the mask, a third of the time, only if needed.
    """
    p_t = log_p_t.exp()
    kl = p_t * (log_p_t - log_p_s)
    if on_host and p_t.amin().view(1).tolist()[0] > 0:  # not with NaN
        return kl
    return torch.where(p_t == 0, 0.0, kl)


def _expect(who: str, name: str, x: Tensor, *wanted: int | str) -> None:
    """Refuse another shape and say what to do. A letter is an axis of any length but 0, for K (classes) 1."""
    got = tuple(x.shape)
    right = [n > int(w == 'K') if isinstance(w, str) else n == w for n, w in zip(got, wanted)]
    if len(got) == len(wanted) and all(right) and 0 not in got:
        return
    if 0 in got:
        remedy = 'leave an empty batch out'
    elif len(got) == 2 and len(wanted) == 1:
        remedy = 'a number per row: x.flatten() of (N, 1) or (N, L), x.argmax(1) of one-hot labels'
    elif len(got) > len(wanted) and len(wanted) < 3:
        remedy = (
            'classes last, then flatten: x.movedim(1, -1).flatten(0, 2) for (N, K, H, W), x.flatten(0, 1) '
        )
        remedy += 'for (N, L, V), target.flatten()'
    elif len(wanted) == 4 and len(got) in (3, 5):
        remedy = 'x[..., None] makes a map of (N, C, L), x.flatten(3) one of (N, C, D, H, W)'
    elif len(got) != len(wanted):
        remedy = 'unsqueeze or flatten axes'
    elif not right[0]:
        remedy = 'all arguments need the samples of one batch (drop_last=True if the last one is smaller)'
    elif got[1] == 1 and 'K' in wanted:
        remedy = 'a sigmoid network has two classes, torch.cat([torch.zeros_like(z), z], 1)'
    elif not right[1]:
        remedy = 'give channels, widths or classes as the loss was built for, or as the other side has them'
    else:
        remedy = 'bring maps to one size, F.adaptive_avg_pool2d'
    shape = ', '.join(map(str, wanted)) + ',' * (len(wanted) == 1)
    raise ValueError(f'{who}: {name} must be ({shape}), got {got}: {remedy}')


def _labels(who: str, target: Tensor, n: int, K: int, name: str = 'target') -> tuple[Tensor, Tensor | None]:
    """n labels of 0..K-1 as int64, and which rows count, None for all: not those of -100, which are 0 then.

    Other labels are refused, but on a GPU, where looking at them would wait, only by the kernels.
    """
    _expect(who, name, target, n)
    if target.is_floating_point():
        raise ValueError(f'{who}: {name} must be ({n},) of integers, got {target.dtype}: {name}.long()')
    target, compiling = target.long(), getattr(torch.compiler, 'is_compiling', bool)()
    if not compiling and target.is_inference():  # what a teacher says under inference_mode: for backward
        target = target.clone()
    if target.device.type == 'cpu' and not compiling:
        (lowest,), (highest,) = (y.tolist() for y in target.aminmax(dim=0, keepdim=True))
        if lowest >= 0 and highest < K:
            return target, None
        for y in target.tolist():
            if y != -100 and not 0 <= y < K:
                raise ValueError(f'{who}: {name} must be in 0..{K - 1}, or -100 to leave a row out, got {y}')
    valid = target != -100
    return torch.where(valid, target, 0), valid


def _is(target: Tensor, K: int) -> Tensor:
    """(N,) -> (N, K), True at the label."""
    return torch.zeros(len(target), K, dtype=torch.bool, device=target.device).scatter_(
        1, target[:, None], True
    )


def _ce(out: Tensor, target: Tensor, valid: Tensor | None) -> Tensor:
    """Cross-entropy, the mean over the rows that count."""
    if valid is None:
        return F.cross_entropy(out, target)
    return _mean(F.cross_entropy(out, target, reduction='none'), valid)


def _per_sample(x: Tensor, valid: Tensor | None, axis: int = 0) -> Tensor:
    """The sum over all axes but that of the samples, and the mean over the samples that count."""
    if valid is None:
        return x.sum() / x.shape[axis]
    return _mean(x.movedim(axis, 0).flatten(1).sum(dim=1), valid)


def _mean(rows: Tensor, valid: Tensor | None) -> Tensor:
    """Over the rows (N, ...) that count; 0 if none does."""
    if valid is None:
        return rows.mean(dim=0)
    counts = valid.reshape(-1, *[1] * (rows.dim() - 1))
    return torch.where(counts, rows, 0.0).sum(dim=0) / valid.sum().clamp(min=1)


def _no_autocast(x: Tensor) -> torch.autocast:
    """Matrix products and convolutions in the precision of their tensors; there is no autocast on meta."""
    return torch.autocast('cpu' if x.is_meta else x.device.type, enabled=False)


def _exact(x: Tensor) -> Tensor:
    """For products that decide the loss: in float64 where float32 ones are rounded, TF32 for example."""
    return x.double() if x.dtype == torch.float32 and _rounded() and x.device.type != 'mps' else x


def _rounded() -> bool:
    """Whether torch.set_float32_matmul_precision or its newer forms ask for less than float32."""
    mode = getattr(torch.backends.cuda.matmul, 'fp32_precision', None)
    if mode is None:  # before torch 2.9
        return torch.get_float32_matmul_precision() != 'highest'
    rounded = ('tf32', 'bf16')
    return mode in rounded or torch.backends.mkldnn.matmul.fp32_precision in rounded


_rounded._dynamo_marked_constant = True  # torch.compiler.assume_constant_result, without its imports


def _full(x: Tensor, like: Tensor | None = None) -> Tensor:
    """In float32, or float64 if the student (like) is. Inference tensors are copied, to serve backward."""
    x = x.double() if (x if like is None else like).dtype == torch.float64 else x.float()
    compiling = getattr(torch.compiler, 'is_compiling', bool)()  # torch 2.2 cannot tell: False
    return x.clone() if not compiling and x.is_inference() else x


# ------------------------------------------ how the training scripts use it; a copied file may drop this


def feed(kd, s, t, batch):
    return kd([f.out for f in s], batch.target, kd.weights)


def build(loss, probe, **options):
    kd = loss(**options)
    kd.weights = torch.full((len(probe.s),), 1 / len(probe.s))  # until there are better ones
    return kd


@torch.no_grad()
def weigh(kd, held_out):
    """The general mode: weights of the networks from held-out data, at the start of every epoch."""
    if kd.mode != 'general':
        return
    found = held_out()
    if found is None:
        raise ValueError('KDCL: mode general weighs the networks on held-out data, --val_split gives some')
    outs, target = found
    kd.weights = general_weights(outs.softmax(dim=2), F.one_hot(target, outs.shape[2]))
