"""Tf-KD, teacher-free knowledge distillation: a made-up teacher, or the network's own earlier training.

L. Yuan, F. E. H. Tay, G. Li, T. Wang, J. Feng, "Revisiting Knowledge Distillation via Label Smoothing
Regularization", CVPR 2020, arXiv:1909.11723.

TfKDReg, a made-up teacher p: correct_prob on the true class, (1 - correct_prob) / (K - 1) on each other.

    q = softmax(p / T)
    e[n, k] = q * (log q - log softmax(out_s))
    loss = (1 - alpha) * CE + alpha * multiplier * mean over n and k of e                  (variant 'code')
    loss = (1 - alpha) * CE + alpha * mean over n of sum over k of e,  q = softmax(log(p) / T)    ('paper')

TfKDSelf, the teacher is a network of the same architecture, trained alone before.

    q = softmax(out_t / T)
    e[n, k] = q * (log q - log softmax(out_s / T))
    loss = (1 - alpha) * CE + alpha * multiplier * T^2 * mean over n and k of e

Tap: logits and labels. Both contain their cross-entropy.

Differences: none from the authors' code. It applies a softmax to probabilities, so its virtual teacher is
almost uniform; variant='paper' softens as the paper says. The divergence is averaged over N * K elements:
multiplier = K gives the usual mean over samples.

Source: yuanli2333/Teacher-free-Knowledge-Distillation, my_loss_function.py (loss_kd_regularization,
loss_kd_self); variant='paper': formula only.

Use:
    >>> import torch
    >>> from tfkd import TfKDReg, TfKDSelf
    >>> out_s, out_t, target = torch.randn(8, 10, requires_grad=True), torch.randn(8, 10), torch.arange(8)
    >>> (TfKDReg()(out_s, target) + TfKDSelf()(out_s, out_t, target)).backward()
    >>> out_s.grad.norm() > 0
    tensor(True)
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TfKDReg(nn.Module):
    """Cross-entropy and a virtual teacher that is right with probability correct_prob.

    Args:
        T: softens the virtual teacher, > 0; 20.
        alpha: share of the virtual teacher, in [0, 1]; 0.1 (MobileNetV2 0.95).
        multiplier: factor on the mean over N K elements; 100 (MobileNetV2 1).
        correct_prob: in (0, 1); 0.99.
        variant: 'code' or 'paper'.

    Shape:
        out_s: (N, K), K >= 2; target: (N,) labels. Returns a scalar.
        Rows of label -100 are left out. Computed in float32, or in float64 as the student.

    Raises:
        ValueError: an argument is not legal; shapes do not fit.
    """

    def __init__(
        self,
        T: float = 20.0,
        alpha: float = 0.1,
        multiplier: float = 100.0,
        correct_prob: float = 0.99,
        variant: str = 'code',
    ) -> None:
        super().__init__()
        if not T > 0 or not 0 <= alpha <= 1 or not 0 < correct_prob < 1:
            raise ValueError(
                f'TfKDReg: T > 0, alpha in [0, 1] and 0 < correct_prob < 1 are needed, got {T}, {alpha} and '
                f'{correct_prob}'
            )
        if variant not in ('code', 'paper'):
            raise ValueError(f'TfKDReg: variant must be "code" or "paper", got {variant!r}')
        self.T, self.alpha, self.multiplier = T, alpha, multiplier
        self.correct_prob, self.variant = correct_prob, variant

    def forward(self, out_s: Tensor, target: Tensor) -> Tensor:
        _expect('TfKDReg', 'out_s', out_s, 'N', 'K')
        target, valid = _labels('TfKDReg', target, *out_s.shape)
        out_s = _full(out_s)
        wrong = (1 - self.correct_prob) / (out_s.shape[1] - 1)
        p = torch.full_like(out_s, wrong).masked_fill(_is(target, out_s.shape[1]), self.correct_prob)
        log_q = F.log_softmax((p if self.variant == 'code' else p.log()) / self.T, dim=1)
        kl = _per_sample(log_q.exp() * (log_q - F.log_softmax(out_s, dim=1)), valid)
        factor = self.multiplier / out_s.shape[1] if self.variant == 'code' else 1
        return (1 - self.alpha) * _ce(out_s, target, valid) + self.alpha * factor * kl


class TfKDSelf(nn.Module):
    """Cross-entropy and soft targets from the same network trained before; out_s, out_t (N, K), target (N,).

    T: 6, > 0. alpha: share of the soft targets, 0.95. multiplier: factor on their mean over N K elements, 50.
    """

    def __init__(self, T: float = 6.0, alpha: float = 0.95, multiplier: float = 50.0) -> None:
        super().__init__()
        if not T > 0 or not 0 <= alpha <= 1:
            raise ValueError(f'TfKDSelf: T > 0 and alpha in [0, 1] are needed, got {T} and {alpha}')
        self.T, self.alpha, self.multiplier = T, alpha, multiplier

    def forward(self, out_s: Tensor, out_t: Tensor, target: Tensor) -> Tensor:
        _expect('TfKDSelf', 'out_s', out_s, 'N', 'K')
        _expect('TfKDSelf', 'out_t', out_t, *out_s.shape)
        target, valid = _labels('TfKDSelf', target, *out_s.shape)
        out_s, out_t = _full(out_s), _full(out_t.detach(), out_s)
        log_p, log_q = F.log_softmax(out_s / self.T, dim=1), F.log_softmax(out_t / self.T, dim=1)
        kl = _per_sample(_kl(log_q, log_p, valid is None), valid) / out_s.shape[1] * self.T**2
        return (1 - self.alpha) * _ce(out_s, target, valid) + self.alpha * self.multiplier * kl


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


def _full(x: Tensor, like: Tensor | None = None) -> Tensor:
    """In float32, or float64 if the student (like) is. Inference tensors are copied, to serve backward."""
    x = x.double() if (x if like is None else like).dtype == torch.float64 else x.float()
    compiling = getattr(torch.compiler, 'is_compiling', bool)()  # torch 2.2 cannot tell: False
    return x.clone() if not compiling and x.is_inference() else x


# ------------------------------------------ how the training scripts use it; a copied file may drop this


def feed(kd, s, t, batch):
    return kd(s.out, batch.target)
