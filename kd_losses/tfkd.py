"""Tf-KD, teacher-free knowledge distillation: a made-up teacher, or the network's own earlier training.

L. Yuan, F. E. H. Tay, G. Li, T. Wang, J. Feng, "Revisiting Knowledge Distillation via Label Smoothing
Regularization", CVPR 2020, arXiv:1909.11723.

    p = correct_prob on the true class, (1 - correct_prob) / (K - 1) on each other
    TfKDReg:   q = softmax(p / T)                               (variant 'paper': softmax(log(p) / T))
        loss = (1 - alpha) CE + alpha multiplier mean over n and k of q (log q - log softmax(out_s))
        (variant 'paper': mean over n of the sum over k, no multiplier)
    TfKDSelf:  the teacher is the same architecture, trained alone before loss = (1 - alpha) CE + alpha
        multiplier T^2 mean over n and k of KL of softmax(. / T), teacher's to student's

Tap: logits and labels. Both contain their cross-entropy.

Differences: none from the authors' code. It applies a softmax to probabilities, so its virtual teacher is
almost uniform; variant='paper' softens as the paper says. The divergence is averaged over N K elements:
multiplier = K gives the usual mean over samples.
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
        out_s: (N, K), K >= 2; target: (N,) int64. Returns a scalar.

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
        if not T > 0 or not 0 < correct_prob < 1:
            raise ValueError(
                f'TfKDReg: T > 0 and 0 < correct_prob < 1 are needed, got {T} and {correct_prob}'
            )
        if variant not in ('code', 'paper'):
            raise ValueError(f'TfKDReg: variant must be "code" or "paper", got {variant!r}')
        self.T, self.alpha, self.multiplier = T, alpha, multiplier
        self.correct_prob, self.variant = correct_prob, variant

    def forward(self, out_s: Tensor, target: Tensor) -> Tensor:
        _check('TfKDReg', out_s, target)
        out_s = _full(out_s)
        classes = torch.arange(out_s.shape[1], device=out_s.device)
        wrong = (1 - self.correct_prob) / (out_s.shape[1] - 1)
        p = torch.full_like(out_s, wrong).masked_fill(target[:, None] == classes, self.correct_prob)
        log_q = F.log_softmax((p if self.variant == 'code' else p.log()) / self.T, dim=1)
        kl = (log_q.exp() * (log_q - F.log_softmax(out_s, dim=1))).sum(dim=1).mean()
        factor = self.multiplier / out_s.shape[1] if self.variant == 'code' else 1
        return (1 - self.alpha) * F.cross_entropy(out_s, target) + self.alpha * factor * kl


class TfKDSelf(nn.Module):
    """Cross-entropy and soft targets from the same network trained before; out_s, out_t (N, K), target (N,).

    T: 6, > 0. alpha: share of the soft targets, 0.95. multiplier: factor on their mean over N K elements, 50.
    """

    def __init__(self, T: float = 6.0, alpha: float = 0.95, multiplier: float = 50.0) -> None:
        super().__init__()
        if not T > 0:
            raise ValueError(f'TfKDSelf: T must be > 0, got {T}')
        self.T, self.alpha, self.multiplier = T, alpha, multiplier

    def forward(self, out_s: Tensor, out_t: Tensor, target: Tensor) -> Tensor:
        _check('TfKDSelf', out_s, target)
        if out_t.shape != out_s.shape:
            raise ValueError(
                f'TfKDSelf: out_t must be {tuple(out_s.shape)} as out_s, got {tuple(out_t.shape)}'
            )
        out_s, out_t = _full(out_s), _full(out_t.detach())
        log_p, log_q = F.log_softmax(out_s / self.T, dim=1), F.log_softmax(out_t / self.T, dim=1)
        q = log_q.exp()
        kl = torch.where(q > 0, q * (log_q - log_p), 0.0).mean() * self.T**2
        return (1 - self.alpha) * F.cross_entropy(out_s, target) + self.alpha * self.multiplier * kl


def _check(who: str, out_s: Tensor, target: Tensor) -> None:
    if out_s.dim() != 2 or out_s.shape[1] < 2:
        raise ValueError(f'{who}: out_s must be (N, K) with K >= 2, got {tuple(out_s.shape)}')
    if target.shape != out_s.shape[:1] or target.is_floating_point():
        raise ValueError(
            f'{who}: target must be ({len(out_s)},) of integers, got {tuple(target.shape)} of {target.dtype}'
        )


def _full(x: Tensor) -> Tensor:
    """Half precision to float32; float64 stays."""
    return x if x.dtype == torch.float64 else x.float()


# ------------------------------------------ how the training scripts use it; a copied file may drop this


def feed(kd, s, t, batch):
    return kd(s.out, batch.target)
