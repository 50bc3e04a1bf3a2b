"""EBKD, entropy-based weights: of several teachers, those that are sure of an image teach more of it.

K. Kwon, H. Na, H. Lee, N. S. Kim, "Adaptive Knowledge Distillation Based on Entropy", ICASSP 2020.

    H_mn = entropy of softmax(outs_t[m, n])                                  (temperature 1)
    w_mn = 1 - H_mn / sum over j of H_jn                                     (of one image they sum to M - 1)
    loss = mean over m and n of w_mn * T^2 * KL(softmax(outs_t[m, n] / T) || softmax(out_s[n] / T))

Tap: logits of the student and of two or more frozen networks. No labels.

Differences: no code of the authors was found; this is the widely used re-implementation, and whether the
paper divides by M or by M - 1 is not verified: normalize=True divides by M - 1, a weighted mean. The
re-implementation multiplies 0 by the logarithm of 0 for a saturated teacher, which is NaN; here that is 0.
Teachers without any entropy weigh 1 - 1 / M each.

Source: Rorozhl/CA-MKD, helper/loops.py (EBKD).

Use:
    >>> import torch
    >>> from ebkd import EBKD
    >>> out_s, outs_t = torch.randn(8, 10, requires_grad=True), [torch.randn(8, 10) for _ in range(3)]
    >>> EBKD()(out_s, outs_t).backward()
    >>> out_s.grad.norm() > 0
    tensor(True)
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class EBKD(nn.Module):
    """Soft targets of several teachers, weighed per image by what their entropies leave.

    Args:
        T: temperature of the soft targets, > 0; 4.
        normalize: divide by M - 1 instead of M, so that the weights of an image sum to 1; False.

    Shape:
        out_s: (N, K); outs_t: list of M >= 2 tensors (N, K), or stacked (M, N, K). Returns a scalar. No
        gradient reaches outs_t. `weights(outs_t)` returns (M, N).
        Computed in float32, or in float64 as the student.

    Raises:
        ValueError: T is not positive; there are fewer than two teachers; shapes differ.
    """

    def __init__(self, T: float = 4.0, normalize: bool = False) -> None:
        super().__init__()
        if not T > 0:
            raise ValueError(f'EBKD: T must be > 0, got {T}')
        self.T, self.normalize = T, normalize

    def forward(self, out_s: Tensor, outs_t: list[Tensor]) -> Tensor:
        outs_t = _teachers('EBKD', out_s, outs_t, least=2)  # one would have the weight 0
        log_q = F.log_softmax(_full(out_s) / self.T, dim=1)
        kl = _kl(F.log_softmax(outs_t / self.T, dim=2), log_q).sum(dim=2) * self.T**2
        loss = (self.weights(outs_t) * kl).mean()
        return loss * len(outs_t) / (len(outs_t) - 1) if self.normalize else loss

    @staticmethod
    def weights(outs_t: Tensor) -> Tensor:
        """(M, N, K) logits -> (M, N)."""
        log_p = F.log_softmax(outs_t, dim=2)
        p = log_p.exp()
        entropy = -torch.where(p == 0, 0.0, p * log_p).sum(dim=2)
        total = entropy.sum(dim=0)
        sure = total <= 0  # NaN is not: it must show in the loss
        return 1 - torch.where(sure, 1 / len(outs_t), entropy / torch.where(sure, 1.0, total))


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
