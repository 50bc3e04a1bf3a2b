"""WSLD, weighted soft labels: trust the soft label less where the student already beats the teacher.

H. Zhou, L. Song, J. Chen, Y. Zhou, G. Wang, J. Yuan, Q. Zhang, "Rethinking Soft Labels for Knowledge
Distillation: A Bias-Variance Tradeoff Perspective", ICLR 2021, arXiv:2102.00650.

    a_n, b_n = cross-entropy of student and teacher with the label, at temperature 1
    w_n = 1 - exp(-a_n / (b_n + 1e-7))                                                       (no gradient)
    loss = T^2 mean over n of - w_n sum over k of softmax(out_t / T)_k log softmax(out_s / T)_k

Tap: the logits, and the labels; the authors add 2.5 (ImageNet, T 2) or 2.25 (CIFAR-100, T 4) times this to
cross-entropy. A cross-entropy, so it is not 0 when student and teacher agree.

Differences: none from the authors' code.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class WSLD(nn.Module):
    """Soft-label cross-entropy, weighted per sample by how far the student is behind the teacher.

    Args:
        T: temperature, > 0; 4 on CIFAR, 2 on ImageNet.

    Shape:
        out_s, out_t: (N, K), equal; target: (N,) int64. Returns a scalar. No gradient reaches out_t.

    Raises:
        ValueError: T is not positive; shapes differ; target is not (N,) of integers.
    """

    def __init__(self, T: float = 4.0) -> None:
        super().__init__()
        if not T > 0:
            raise ValueError(f'WSLD: T must be > 0, got {T}')
        self.T = T

    def forward(self, out_s: Tensor, out_t: Tensor, target: Tensor) -> Tensor:
        if out_s.dim() != 2:
            raise ValueError(f'WSLD: out_s must be (N, K), got {tuple(out_s.shape)}')
        if out_t.shape != out_s.shape:
            raise ValueError(f'WSLD: out_t must be {tuple(out_s.shape)} as out_s, got {tuple(out_t.shape)}')
        if target.shape != out_s.shape[:1] or target.is_floating_point():
            raise ValueError(
                f'WSLD: target must be ({len(out_s)},) of integers, '
                f'got {tuple(target.shape)} of {target.dtype}'
            )
        out_s, out_t = _full(out_s), _full(out_t.detach())
        with torch.no_grad():
            a, b = (F.cross_entropy(out, target, reduction='none') for out in (out_s, out_t))
            weight = 1 - torch.exp(-(a / (b + 1e-7)).clamp(min=0))
        soft = F.softmax(out_t / self.T, dim=1) * F.log_softmax(out_s / self.T, dim=1)
        return -(weight * soft.sum(dim=1)).mean() * self.T**2


def _full(x: Tensor) -> Tensor:
    """Half precision to float32; float64 stays."""
    return x if x.dtype == torch.float64 else x.float()
