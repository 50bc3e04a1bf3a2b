"""MultiTeacherKD, averaged teachers: several networks teach with equal weights.

S. You, C. Xu, C. Xu, D. Tao, "Learning from Multiple Teacher Networks", KDD 2017; the baseline (AVER) of most
later work on several teachers.

    p_m = softmax(outs_t[m] / T), q = softmax(out_s / T)
    mode 'loss':   loss = T^2 * mean over m and n of KL(p_m || q)
    mode 'prob':   loss = T^2 * mean over n of KL(mean over m of p_m || q)
    mode 'logit':  loss = T^2 * mean over n of KL(softmax(mean over m of outs_t[m] / T) || q)

'loss' and 'prob' differ by a number that does not depend on the student: their gradients are equal. Only
'logit' is another method.

Tap: logits of the student and of several frozen networks, usually of one kind, trained from other seeds.

Differences: none in value. The baseline that averages squared errors of maps in both repositories below is
not here: it builds its mean with torch.tensor(list), which cuts the graph, so that it trains nothing.

Source: Rorozhl/CA-MKD, helper/loops.py (AVERAGE_LOSS); AnTuo1998/AE-KD, distiller_zoo/KD.py (averaged
probabilities).

Use:
    >>> import torch
    >>> from mkd_avg import MultiTeacherKD
    >>> out_s, outs_t = torch.randn(8, 10, requires_grad=True), [torch.randn(8, 10) for _ in range(3)]
    >>> MultiTeacherKD()(out_s, outs_t).backward()
    >>> out_s.grad.norm() > 0
    tensor(True)
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MultiTeacherKD(nn.Module):
    """Soft targets of several teachers, all of one weight.

    Args:
        T: temperature, > 0; 4.
        mode: what is averaged: 'loss', 'prob' or 'logit'.

    Shape:
        out_s: (N, K); outs_t: list of M tensors (N, K), or stacked (M, N, K). Returns a scalar. No gradient
        reaches outs_t. Computed in float32, or in float64 as the student.

    Raises:
        ValueError: T is not positive; mode is another word; outs_t is empty; shapes differ.
    """

    def __init__(self, T: float = 4.0, mode: str = 'loss') -> None:
        super().__init__()
        if not T > 0:
            raise ValueError(f'MultiTeacherKD: T must be > 0, got {T}')
        if mode not in ('loss', 'prob', 'logit'):
            raise ValueError(f'MultiTeacherKD: mode must be loss, prob or logit, got {mode!r}')
        self.T, self.mode = T, mode

    def forward(self, out_s: Tensor, outs_t: list[Tensor]) -> Tensor:
        outs_t = _teachers('MultiTeacherKD', out_s, outs_t)
        log_q = F.log_softmax(_full(out_s) / self.T, dim=1)
        if self.mode == 'logit':
            log_p = F.log_softmax(outs_t.mean(dim=0) / self.T, dim=1)
        else:
            log_p = F.log_softmax(outs_t / self.T, dim=2)
        if self.mode == 'prob':
            log_p = _log_mean(log_p)
        return _kl(log_p, log_q).sum(dim=-1).mean() * self.T**2


def _log_mean(log_p: Tensor) -> Tensor:
    """The logarithm of the mean over the first axis of what the logarithms are of."""
    return log_p.logsumexp(dim=0) - math.log(len(log_p))


def _teachers(who: str, out_s: Tensor, outs_t: list[Tensor] | Tensor, least: int = 1) -> Tensor:
    """Logits of all teachers in one tensor (M, N, K), detached, in the precision of the student."""
    _expect(who, 'out_s', out_s, 'N', 'K')
    if len(outs_t) < least:
        raise ValueError(
            f'{who}: outs_t must hold {least} or more tensors, got {len(outs_t)}: give one per teacher'
        )
    for i, z in enumerate(outs_t):
        _expect(who, f'outs_t[{i}]', z, *out_s.shape)
    return torch.stack([_full(z.detach(), out_s) for z in outs_t])


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


def _full(x: Tensor, like: Tensor | None = None) -> Tensor:
    """In float32, or float64 if the student (like) is. Inference tensors are copied, to serve backward."""
    x = x.double() if (x if like is None else like).dtype == torch.float64 else x.float()
    compiling = getattr(torch.compiler, 'is_compiling', bool)()  # torch 2.2 cannot tell: False
    return x.clone() if not compiling and x.is_inference() else x
