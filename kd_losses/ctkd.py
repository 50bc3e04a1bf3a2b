"""CTKD, curriculum temperature: soft targets whose temperature learns to make the task harder.

Z. Li, X. Li, L. Yang, B. Zhao, R. Song, L. Luo, J. Li, J. Yang, "Curriculum Temperature for Knowledge
Distillation", AAAI 2023, arXiv:2211.16231.

    Tau = t_start + t_range * sigmoid(theta)      theta: one learnable number, 1 at first (Tau 15.6)
    loss = Tau^2 * mean over n of KL(softmax(out_t / Tau) || softmax(out_s / Tau))
    the gradient that reaches theta is multiplied by -lam: theta climbs where the student descends
    lam rises from 0 to 1 along half a cosine over the first 10 epochs (`cosine_lambda`)

Tap: the logits. theta belongs to the student's optimiser, weight decay included. Cross-entropy weighs 0.1,
this loss 0.9 (CIFAR). `temperature` is Tau, a tensor, for any other loss that wants it.

Differences: the authors' global version; lam runs from 0 to 1 and is negated inside, where their factor runs
from 0 to -1. The temperature per sample, which their README mentions, is left out.

Source: zhengli97/CTKD, models/temp_global.py (Global_T), distiller_zoo/KD.py, train_student.py (CosineDecay).

Use:
    >>> import torch
    >>> from ctkd import CTKD
    >>> out_s, out_t = torch.randn(8, 10, requires_grad=True), torch.randn(8, 10)
    >>> CTKD()(out_s, out_t, lam=1.0).backward()
    >>> out_s.grad.norm() > 0
    tensor(True)
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class CTKD(nn.Module):
    """KL divergence at a temperature trained against the student by gradient reversal.

    Args:
        t_start: smallest temperature, > 0; 1.
        t_range: width of its range, >= 0; 20.

    Shape:
        out_s, out_t: (N, K), equal. lam: number >= 0, the strength of the reversal. Returns a scalar. No
        gradient reaches out_t.
        Computed in float32, or in float64 as the student.

    Raises:
        ValueError: t_start or t_range is not legal; lam < 0; the shapes differ or are not (N, K).
    """

    def __init__(self, t_start: float = 1.0, t_range: float = 20.0) -> None:
        super().__init__()
        if not t_start > 0 or t_range < 0:
            raise ValueError(f'CTKD: t_start must be > 0 and t_range >= 0, got {t_start} and {t_range}')
        self.t_start, self.t_range = t_start, t_range
        self.theta = nn.Parameter(torch.ones(1))

    @property
    def temperature(self) -> Tensor:
        """(1,), detached."""
        return self.t_start + self.t_range * torch.sigmoid(self.theta.detach())

    def forward(self, out_s: Tensor, out_t: Tensor, lam: float) -> Tensor:
        _expect('CTKD', 'out_s', out_s, 'N', 'K')
        _expect('CTKD', 'out_t', out_t, *out_s.shape)
        if lam < 0:
            raise ValueError(
                f"CTKD: lam must be >= 0, got {lam}: it is negated inside, the authors' -1 is 1 here"
            )
        with _no_autocast(out_s):
            out_s, out_t = _full(out_s), _full(out_t.detach(), out_s)
            theta = _Reversal.apply(self.theta, float(lam)).to(out_s.dtype)
            T = self.t_start + self.t_range * torch.sigmoid(theta)
            # -inf, a legal probability of 0, must not reach the gradient of T
            log_p_s, log_p_t = (
                F.log_softmax(torch.where(z == -torch.inf, z, z.masked_fill(z == -torch.inf, 0.0) / T), dim=1)
                for z in (out_s, out_t)
            )
            p_t = log_p_t.exp()
            p_s, gap = log_p_s.exp(), torch.where(p_t == 0, 0.0, log_p_t - log_p_s)
            # with p_s - p_t = (p_s + p_t) tanh(-gap / 2) added, whose sum is 0: near the teacher the terms of
            # p_t * gap are as large as their rounding, which is all that the gradient of T would see
            kl = torch.where(p_t == 0, p_s, p_t * gap - (p_t + p_s) * torch.tanh(gap / 2)).sum(dim=1).mean()
            return (kl * T.square()).squeeze(0)


class _Reversal(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, lam: float) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.lam = inputs[1]

    @staticmethod
    def backward(ctx, grad: Tensor):
        return -ctx.lam * grad, None


def cosine_lambda(epoch: int, max_value: float = 1.0, num_loops: float = 10) -> float:
    """Strength of the reversal in an epoch, counted from 1: half a cosine up to max_value at num_loops."""
    return max_value * (1 - math.cos(math.pi * min(epoch, num_loops) / num_loops)) / 2


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


def _no_autocast(x: Tensor) -> torch.autocast:
    """Matrix products and convolutions in the precision of their tensors; there is no autocast on meta."""
    return torch.autocast('cpu' if x.is_meta else x.device.type, enabled=False)


def _full(x: Tensor, like: Tensor | None = None) -> Tensor:
    """In float32, or float64 if the student (like) is. Inference tensors are copied, to serve backward."""
    x = x.double() if (x if like is None else like).dtype == torch.float64 else x.float()
    compiling = getattr(torch.compiler, 'is_compiling', bool)()  # torch 2.2 cannot tell: False
    return x.clone() if not compiling and x.is_inference() else x


# ------------------------------------------ how the training scripts use it; a copied file may drop this


def feed(kd, s, t, batch):
    return kd(s.out, t.out, batch.inner)
