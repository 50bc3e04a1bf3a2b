"""SAD, self attention distillation: each block's attention imitates that of the next, deeper block.

Y. Hou, Z. Ma, C. Liu, C. C. Loy, "Learning Lightweight Lane Detection CNNs by Self Attention Distillation",
ICCV 2019, arXiv:1908.00821.

    G(A) = sum over channels of A^2;  the deeper block's G is enlarged to the earlier one's size, bilinearly
    Psi = softmax over all positions of G / T
    loss = mean over n and positions of (Psi(fm) - Psi(fm_next))^2            no gradient to fm_next

Tap: maps of consecutive blocks of ONE network, one call per pair, summed. No teacher. Switched on late, after
about two thirds of the training.

Differences: the authors' released files do not hold this loss; written from the formula, checked against an
unofficial implementation, which lets the gradient into the deeper map as well. Large activations make Psi
one-hot; a larger T helps.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SAD(nn.Module):
    """Mean squared difference of spatial attention distributions of two blocks of a network.

    Args:
        T: divides the energies before the softmax, > 0; 1.

    Shape:
        fm: (N, C_1, H, W), fm_next: (N, C_2, h, w), not larger. Returns a scalar. No gradient reaches
        fm_next.

    Raises:
        ValueError: T is not positive; a map is not 4-D; batch sizes differ; fm_next is larger.
    """

    def __init__(self, T: float = 1.0) -> None:
        super().__init__()
        if not T > 0:
            raise ValueError(f'SAD: T must be > 0, got {T}')
        self.T = T

    def forward(self, fm: Tensor, fm_next: Tensor) -> Tensor:
        if fm.dim() != 4:
            raise ValueError(f'SAD: fm must be (N, C, H, W), got {tuple(fm.shape)}')
        fits = fm_next.dim() == 4 and len(fm_next) == len(fm)
        if not fits or fm_next.shape[2] > fm.shape[2] or fm_next.shape[3] > fm.shape[3]:
            raise ValueError(
                f'SAD: fm_next must be ({len(fm)}, C, h, w), not larger than fm {tuple(fm.shape)}, '
                f'got {tuple(fm_next.shape)}'
            )
        energy = _full(fm).square().sum(dim=1)
        deeper = _full(fm_next.detach()).square().sum(dim=1)
        if deeper.shape != energy.shape:
            deeper = F.interpolate(
                deeper[:, None], size=energy.shape[1:], mode='bilinear', align_corners=False
            )[:, 0]
        return F.mse_loss(*(F.softmax(g.flatten(1) / self.T, dim=1) for g in (energy, deeper)))


def _full(x: Tensor) -> Tensor:
    """Half precision to float32; float64 stays."""
    return x if x.dtype == torch.float64 else x.float()


# ------------------------------------------ how the training scripts use it; a copied file may drop this


def feed(kd, s, t, batch):
    """Each stage from the next."""
    return sum(kd(x, y) for x, y in zip(s.fms[1:], s.fms[2:]))
