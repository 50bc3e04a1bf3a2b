"""NKD, normalised distillation: the target class by its confidence, the others by their distribution.

Z. Yang, A. Zeng, Z. Li, T. Zhang, C. Yuan, Y. Li, "From Knowledge Distillation to Self-Knowledge
Distillation: A Unified Approach with Normalized Loss and Customized Soft Labels", ICCV 2023,
arXiv:2303.13005.

    y = target;  q = softmax(out_t), p = softmax(out_s) at temperature 1
    target term      mean over n of -q_y log p_y
    non-target term  q', p' = softmax of out_t / T, out_s / T over the K - 1 classes other than y
                     gamma T^2 mean over n of - sum over k of q'_k log p'_k
    loss = target term + non-target term

Tap: the logits, and the labels; added to cross-entropy. Both terms are cross-entropies, so the loss is not 0
when student and teacher agree.

Differences: none from the authors' code (cls_KD), written with log-softmax.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class NKD(nn.Module):
    """Cross-entropies of the target class and of the renormalised other classes.

    Args:
        gamma: weight of the non-target term; 1.5 on ImageNet, 3.5 on CIFAR-100.
        T: its temperature, > 0; 1 on ImageNet, 3 on CIFAR-100.

    Shape:
        out_s, out_t: (N, K), equal, K >= 2 (with K = 2 the second term is 0); target: (N,) int64, or (N, K)
        probabilities of which the largest counts. Returns a scalar. No gradient reaches out_t.
        `terms` returns (target term, non-target term), gamma T^2 included.

    Raises:
        ValueError: T is not positive; shapes differ; K < 2; target is neither.
    """

    def __init__(self, gamma: float = 1.5, T: float = 1.0) -> None:
        super().__init__()
        if not T > 0:
            raise ValueError(f'NKD: T must be > 0, got {T}')
        self.gamma, self.T = gamma, T

    def forward(self, out_s: Tensor, out_t: Tensor, target: Tensor) -> Tensor:
        target_term, other_term = self.terms(out_s, out_t, target)
        return target_term + other_term

    def terms(self, out_s: Tensor, out_t: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        if out_s.dim() != 2 or out_s.shape[1] < 2:
            raise ValueError(f'NKD: out_s must be (N, K) with K >= 2, got {tuple(out_s.shape)}')
        if out_t.shape != out_s.shape:
            raise ValueError(f'NKD: out_t must be {tuple(out_s.shape)} as out_s, got {tuple(out_t.shape)}')
        if target.shape == out_s.shape:
            target = target.argmax(dim=1)
        if target.shape != out_s.shape[:1] or target.is_floating_point():
            raise ValueError(
                f'NKD: target must be ({len(out_s)},) of integers or {tuple(out_s.shape)}, '
                f'got {tuple(target.shape)} of {target.dtype}'
            )
        out_s, out_t = _full(out_s), _full(out_t.detach())
        y = target[:, None]
        q_y, log_p_y = F.softmax(out_t, dim=1).gather(1, y), F.log_softmax(out_s, dim=1).gather(1, y)
        is_y = y == torch.arange(out_s.shape[1], device=out_s.device)
        q = F.softmax((out_t / self.T).masked_fill(is_y, -torch.inf), dim=1)
        log_p = F.log_softmax((out_s / self.T).masked_fill(is_y, -torch.inf), dim=1)
        others = torch.where(q > 0, q * log_p, 0.0).sum(dim=1)  # 0 at y, where log p' is -inf
        return -(q_y * log_p_y).mean(), -self.gamma * self.T**2 * others.mean()


def _full(x: Tensor) -> Tensor:
    """Half precision to float32; float64 stays."""
    return x if x.dtype == torch.float64 else x.float()
