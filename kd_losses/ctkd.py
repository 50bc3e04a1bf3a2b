"""CTKD, curriculum temperature: soft targets whose temperature learns to make the task harder.

Z. Li, X. Li, L. Yang, B. Zhao, R. Song, L. Luo, J. Li, J. Yang, "Curriculum Temperature for Knowledge
Distillation", AAAI 2023, arXiv:2211.16231.

    Tau = t_start + t_range sigmoid(theta),  theta one learnable number, 1 at first (Tau 15.6)
    loss = Tau^2 mean over n of KL(softmax(out_t / Tau) || softmax(out_s / Tau))
    the gradient that reaches theta is multiplied by -lam: theta climbs where the student descends
    lam rises from 0 to 1 along half a cosine over the first 10 epochs (`cosine_lambda`)

Tap: the logits. theta belongs to the student's optimiser, weight decay included. Cross-entropy weighs 0.1,
this loss 0.9 (CIFAR). `temperature` is Tau, a tensor, for any other loss that wants it.

Differences: the authors' global version; a positive lam is negated here (theirs runs from 0 to -1). The
temperature per sample of their README is left out.
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

    Raises:
        ValueError: t_start or t_range is not legal; the shapes differ or are not (N, K).
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
        if out_s.dim() != 2:
            raise ValueError(f'CTKD: out_s must be (N, K), got {tuple(out_s.shape)}')
        if out_t.shape != out_s.shape:
            raise ValueError(f'CTKD: out_t must be {tuple(out_s.shape)} as out_s, got {tuple(out_t.shape)}')
        with torch.autocast(out_s.device.type, enabled=False):
            out_s, out_t = _full(out_s), _full(out_t.detach())
            theta = _Reversal.apply(self.theta, float(lam)).to(out_s.dtype)
            T = self.t_start + self.t_range * torch.sigmoid(theta)
            log_p_s, log_p_t = F.log_softmax(out_s / T, dim=1), F.log_softmax(out_t / T, dim=1)
            p_t = log_p_t.exp()
            kl = torch.where(p_t > 0, p_t * (log_p_t - log_p_s), 0.0).sum(dim=1).mean()
            return (kl * T.square()).squeeze(0)


class _Reversal(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, lam: float) -> Tensor:
        ctx.lam = lam
        return x.clone()

    @staticmethod
    def backward(ctx, grad: Tensor):
        return -ctx.lam * grad, None


def cosine_lambda(epoch: int, max_value: float = 1.0, num_loops: float = 10) -> float:
    """Strength of the reversal in an epoch, counted from 1: half a cosine up to max_value at num_loops."""
    return max_value * (1 - math.cos(math.pi * min(epoch, num_loops) / num_loops)) / 2


def _full(x: Tensor) -> Tensor:
    """Half precision to float32; float64 stays."""
    return x if x.dtype == torch.float64 else x.float()


# ------------------------------------------ how the training scripts use it; a copied file may drop this


def feed(kd, s, t, batch):
    return kd(s.out, t.out, batch.inner)
