"""LSKD, logit standardisation: compare the shape of the logits, not their level and spread.

S. Sun, W. Ren, J. Li, R. Wang, X. Cao, "Logit Standardization in Knowledge Distillation", CVPR 2024,
arXiv:2403.01427.

    Z(out)[n, k] = (out[n, k] - mean over k) / (1e-7 + standard deviation over k, with K - 1)
    loss = T^2 mean over n of KL(softmax(Z(out_t) / T) || softmax(Z(out_s) / T))                  (base=None)
    loss = base(Z(out_s), Z(out_t), ...)                                              (any other logit loss)

Tap: the logits. Gradients flow through mean and deviation. The authors weigh it by 9 beside 0.1 cross-entropy
(DKD: alpha and beta times 9 beside 1); cross-entropy sees the raw logits.

Differences: the authors' code (the paper divides by the deviation with K). A sample with constant logits
counts as uniform and gets no gradient; there it is about 1e6.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LSKD(nn.Module):
    """A logit loss on standardised logits.

    Args:
        base: module called as base(Z(out_s), Z(out_t), *args), e.g. DKD(); None: soft targets.
        T: temperature of the soft targets, > 0; 2. Not used with another base.

    Shape:
        out_s, out_t: (N, K), equal, K >= 2. Returns a scalar. No gradient reaches out_t.

    Raises:
        ValueError: T is not positive; the shapes differ or are not (N, K) with K >= 2.
    """

    def __init__(self, base: nn.Module | None = None, T: float = 2.0) -> None:
        super().__init__()
        if not T > 0:
            raise ValueError(f'LSKD: T must be > 0, got {T}')
        self.base, self.T = base, T

    def forward(self, out_s: Tensor, out_t: Tensor, *args) -> Tensor:
        if out_s.dim() != 2 or out_s.shape[1] < 2:
            raise ValueError(f'LSKD: out_s must be (N, K) with K >= 2, got {tuple(out_s.shape)}')
        if out_t.shape != out_s.shape:
            raise ValueError(f'LSKD: out_t must be {tuple(out_s.shape)} as out_s, got {tuple(out_t.shape)}')
        z_s, z_t = standardize(_full(out_s)), standardize(_full(out_t.detach()))
        if self.base is not None:
            return self.base(z_s, z_t, *args)
        log_p_s, log_p_t = F.log_softmax(z_s / self.T, dim=1), F.log_softmax(z_t / self.T, dim=1)
        return (log_p_t.exp() * (log_p_t - log_p_s)).sum(dim=1).mean() * self.T**2


def standardize(out: Tensor, eps: float = 1e-7) -> Tensor:
    """(N, K) logits to mean 0, deviation 1 (with K - 1) per sample; constant rows to 0, without gradient."""
    centred = out - out.mean(dim=1, keepdim=True)
    deviation = torch.linalg.vector_norm(centred, dim=1, keepdim=True) / (out.shape[1] - 1) ** 0.5
    alive = deviation > 1e-12
    return torch.where(alive, centred / (eps + torch.where(alive, deviation, 1.0)), 0.0)


def _full(x: Tensor) -> Tensor:
    """Half precision to float32; float64 stays."""
    return x if x.dtype == torch.float64 else x.float()
