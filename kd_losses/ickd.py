"""ICKD, inter-channel correlation: match which channels fire together.

L. Liu, Q. Huang, S. Lin, H. Xie, B. Wang, X. Chang, X. Liang, "Exploring Inter-Channel Correlation for
Diversity-preserved Knowledge Distillation", ICCV 2021, arXiv:2202.03680.

    x = batch norm of a 1x1 convolution of fm_s (trained with the student), as (N, C_t, H W); t = fm_t, too
    G[n] = x[n] x[n]^T, every row divided by its length
    loss = mean over n and rows of the squared distance between the rows of G_s and G_t

Tap: the last stage's map, after its ReLU. Channels differ through the convolution; sizes may differ, they are
summed out. The authors weigh it by 2.5 beside cross-entropy, alone or with soft targets.

Differences: the authors' CIFAR code. Its unused teacher embedding is left out; a dead channel gets no
gradient where theirs is about 1e10.
"""

import torch
from torch import Tensor, nn


class ICKD(nn.Module):
    """Squared difference of row-normalised channel Gram matrices.

    Args:
        s_channels, t_channels: channels of the two maps.

    Shape:
        fm_s: (N, s_channels, H_s, W_s), fm_t: (N, t_channels, H_t, W_t). Returns a scalar.
        No gradient reaches fm_t.

    Raises:
        ValueError: a map is not 4-D or has other channels than announced; the batch sizes differ.
    """

    def __init__(self, s_channels: int, t_channels: int) -> None:
        super().__init__()
        self.s_channels, self.t_channels = s_channels, t_channels
        self.embed_s = nn.Sequential(
            nn.Conv2d(s_channels, t_channels, kernel_size=1, bias=False), nn.BatchNorm2d(t_channels)
        )

    def forward(self, fm_s: Tensor, fm_t: Tensor) -> Tensor:
        if fm_s.dim() != 4 or fm_s.shape[1] != self.s_channels:
            raise ValueError(f'ICKD: fm_s must be (N, {self.s_channels}, H, W), got {tuple(fm_s.shape)}')
        if fm_t.dim() != 4 or fm_t.shape[:2] != (len(fm_s), self.t_channels):
            raise ValueError(
                f'ICKD: fm_t must be ({len(fm_s)}, {self.t_channels}, H, W) as fm_s and t_channels say, '
                f'got {tuple(fm_t.shape)}'
            )
        with torch.autocast(fm_s.device.type, enabled=False):
            g_s, g_t = _correlation(self.embed_s(_full(fm_s))), _correlation(_full(fm_t.detach()))
            return (g_s - g_t).square().sum(dim=2).mean()


def _correlation(fm: Tensor) -> Tensor:
    x = fm.flatten(2)
    return _unit(x @ x.mT)


def _unit(x: Tensor) -> Tensor:
    """Rows divided by their length; a zero row stays zero and gets no gradient."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    alive = norm > 1e-12
    return torch.where(alive, x / torch.where(alive, norm, 1.0), 0.0)


def _full(x: Tensor) -> Tensor:
    """Half precision to float32; float64 stays."""
    return x if x.dtype == torch.float64 else x.float()
