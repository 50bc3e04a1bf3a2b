"""CC, correlation congruence: match a kernel matrix of the batch's embeddings.

B. Peng, X. Jin, J. Liu, S. Zhou, Y. Wu, Y. Liu, D. Li, Z. Zhang, "Correlation Congruence for Knowledge
Distillation", ICCV 2019, arXiv:1904.01802.

    f = feat / ||feat||_2 row by row;  S = f f^T
    rbf_taylor  K = sum over p = 0..P_order of exp(-2 gamma) (2 gamma)^p / p! * S^p     (powers elementwise)
    rbf         K_ij = exp(-gamma ||f_i - f_j||^2), what the series tends to
    bilinear    K = S
    mmd         K_ij = |m_i - m_j|, m = mean of the un-normalised embedding
    loss = mean over i and j of (K_s[i, j] - K_t[i, j])^2

Tap: the pooled embedding before the classifier; widths may differ. The paper adds the soft-target loss
(`cc+st` in train_kd.py) and samples batches with several images per class.

Differences: no authors' code is public; the default is the paper's Gaussian kernel as
Knowledge-Distillation-Zoo expands it. RepDistiller's CC multiplies differences of consecutive samples,
another loss. The mmd kernel is a reconstruction.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class CC(nn.Module):
    """Mean squared difference of two batch kernel matrices.

    Args:
        gamma: width of the Gaussian kernel, 0.4.
        P_order: order of its Taylor series, 2.
        kernel: 'rbf_taylor', 'rbf', 'bilinear' or 'mmd'.

    Shape:
        feat_s: (N, D_s), feat_t: (N, D_t); further axes are flattened. Returns a scalar.
        No gradient reaches feat_t. An all-zero embedding is similar to nothing and gets no gradient.

    Raises:
        ValueError: unknown kernel; P_order is not an integer >= 0; an argument has no feature axis; the batch
            sizes differ.
    """

    def __init__(self, gamma: float = 0.4, P_order: int = 2, kernel: str = 'rbf_taylor') -> None:
        super().__init__()
        if kernel not in _KERNELS:
            raise ValueError(f'CC: kernel must be one of {sorted(_KERNELS)}, got {kernel!r}')
        if P_order != int(P_order) or P_order < 0:
            raise ValueError(f'CC: P_order must be an integer >= 0, got {P_order}')
        self.gamma, self.P_order, self.kernel = gamma, int(P_order), kernel

    def forward(self, feat_s: Tensor, feat_t: Tensor) -> Tensor:
        if feat_s.dim() < 2:
            raise ValueError(f'CC: feat_s must be (N, D), got {tuple(feat_s.shape)}')
        if feat_t.dim() < 2 or len(feat_t) != len(feat_s):
            raise ValueError(f'CC: feat_t must be ({len(feat_s)}, D) as feat_s, got {tuple(feat_t.shape)}')
        matrix = _KERNELS[self.kernel]
        with torch.autocast(feat_s.device.type, enabled=False):
            k_s = matrix(_full(feat_s).flatten(1), self.gamma, self.P_order)
            k_t = matrix(_full(feat_t.detach()).flatten(1), self.gamma, self.P_order)
            return F.mse_loss(k_s, k_t)


def _bilinear(feat: Tensor, gamma: float, order: int) -> Tensor:
    f = _unit(feat)
    return f @ f.T


def _rbf_taylor(feat: Tensor, gamma: float, order: int) -> Tensor:
    s = _bilinear(feat, gamma, order)
    series = torch.ones_like(s)
    for p in range(order, 0, -1):  # Horner: 1 + x/1 (1 + x/2 (1 + ...))
        series = 1 + 2 * gamma / p * s * series
    return math.exp(-2 * gamma) * series


def _rbf(feat: Tensor, gamma: float, order: int) -> Tensor:
    return torch.exp(-2 * gamma * (1 - _bilinear(feat, gamma, order)))


def _mmd(feat: Tensor, gamma: float, order: int) -> Tensor:
    m = feat.mean(dim=1)
    return (m[:, None] - m[None, :]).abs()


_KERNELS = {'rbf_taylor': _rbf_taylor, 'rbf': _rbf, 'bilinear': _bilinear, 'mmd': _mmd}


def _unit(x: Tensor) -> Tensor:
    """Rows divided by their length; a zero row stays zero and gets no gradient."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    alive = norm > 1e-12
    return torch.where(alive, x / torch.where(alive, norm, 1.0), 0.0)


def _full(x: Tensor) -> Tensor:
    """Half precision to float32; float64 stays."""
    return x if x.dtype == torch.float64 else x.float()
