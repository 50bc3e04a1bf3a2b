"""IKD, inner knowledge distillation: a pruned network regresses every block of the network it was cut from.

Y. Aflalo, A. Noy, M. Lin, I. Friedman, L. Zelnik, "Knapsack Pruning with Inner Distillation", 2020,
arXiv:2002.08258.

    P = linear map over channels where their number differs, else identity (trained with the student)
    loss = mean over all elements of (P(fm_s) - fm_t)^2

Tap: the output of every block or stage, one module each, averaged; equal sizes. The teacher is the network
before pruning; any pair of equal layout works. The authors weigh the mean by 0.2.

Differences: the authors' code; its linear layer on moved axes is a 1x1 convolution here.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class IKD(nn.Module):
    """Mean squared error of a linearly mapped student map, for one pair of blocks.

    Args:
        s_channels, t_channels: channels of the two maps.

    Shape:
        fm_s: (N, s_channels, H, W), fm_t: (N, t_channels, H, W). Returns a scalar. No gradient reaches fm_t.

    Raises:
        ValueError: a map has other channels than announced; batch or sizes differ.
    """

    def __init__(self, s_channels: int, t_channels: int) -> None:
        super().__init__()
        self.s_channels, self.t_channels = s_channels, t_channels
        self.projection = None
        if s_channels != t_channels:
            self.projection = nn.Conv2d(s_channels, t_channels, kernel_size=1, bias=False)

    def forward(self, fm_s: Tensor, fm_t: Tensor) -> Tensor:
        if fm_s.dim() != 4 or fm_s.shape[1] != self.s_channels:
            raise ValueError(f'IKD: fm_s must be (N, {self.s_channels}, H, W), got {tuple(fm_s.shape)}')
        wanted = (len(fm_s), self.t_channels, *fm_s.shape[2:])
        if fm_t.shape != wanted:
            raise ValueError(f'IKD: fm_t must be {wanted} as fm_s, got {tuple(fm_t.shape)}')
        with torch.autocast(fm_s.device.type, enabled=False):
            fm_s, fm_t = _full(fm_s), _full(fm_t.detach())
            return F.mse_loss(fm_s if self.projection is None else self.projection(fm_s), fm_t)


def _full(x: Tensor) -> Tensor:
    """Half precision to float32; float64 stays."""
    return x if x.dtype == torch.float64 else x.float()
