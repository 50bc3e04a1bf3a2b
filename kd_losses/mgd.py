"""MGD, masked generative distillation: rebuild the teacher's map from a part of the student's.

Z. Yang, Z. Li, M. Shao, D. Shi, Z. Yuan, C. Yuan, "Masked Generative Distillation", ECCV 2022,
arXiv:2205.01529.

    x = 1x1 convolution of fm_s where the channels differ, else fm_s
    mask = 0 with probability mask_ratio, else 1, drawn anew every step, per channel (or per position)
    g = 3x3 convolution, ReLU, 3x3 convolution of x * mask                       (trained with the student)
    loss = mean over n of sum over c, h, w of (g - fm_t)^2

Tap: the last stage's map; equal sizes. The sum makes the value 1e3 to 1e5, hence tiny weights: 0.0012 on
CIFAR-100, 7e-5 on ImageNet.

Differences: the authors' classification code, which masks channels; the paper and their detection code mask
positions (channel_mask=False). The weight is the trainer's.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MGD(nn.Module):
    """Squared error of a teacher map generated from a masked student map.

    Args:
        s_channels, t_channels: channels of the two maps.
        mask_ratio: share of channels (positions) hidden; 0.15.
        channel_mask: hide whole channels, else positions.

    Shape:
        fm_s: (N, s_channels, H, W), fm_t: (N, t_channels, H, W). mask: (N, t_channels, 1, 1) or (N, 1, H, W)
        of 0 and 1 instead of a drawn one. generator: where to draw from. Returns a scalar. No gradient
        reaches fm_t.

    Raises:
        ValueError: mask_ratio is not in [0, 1); a map has other channels or sizes than announced; mask does
        not fit.
    """

    def __init__(
        self, s_channels: int, t_channels: int, mask_ratio: float = 0.15, channel_mask: bool = True
    ) -> None:
        super().__init__()
        if not 0 <= mask_ratio < 1:
            raise ValueError(f'MGD: mask_ratio must be in [0, 1), got {mask_ratio}')
        self.s_channels, self.t_channels = s_channels, t_channels
        self.mask_ratio, self.channel_mask = mask_ratio, channel_mask
        self.align = nn.Conv2d(s_channels, t_channels, kernel_size=1) if s_channels != t_channels else None
        self.generation = nn.Sequential(
            nn.Conv2d(t_channels, t_channels, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.Conv2d(t_channels, t_channels, kernel_size=3, padding=1),
        )

    def forward(
        self, fm_s: Tensor, fm_t: Tensor, mask: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        if fm_s.dim() != 4 or fm_s.shape[1] != self.s_channels:
            raise ValueError(f'MGD: fm_s must be (N, {self.s_channels}, H, W), got {tuple(fm_s.shape)}')
        n, _, h, w = fm_s.shape
        if fm_t.shape != (n, self.t_channels, h, w):
            raise ValueError(
                f'MGD: fm_t must be {(n, self.t_channels, h, w)} as fm_s, got {tuple(fm_t.shape)}'
            )
        shape = (n, self.t_channels, 1, 1) if self.channel_mask else (n, 1, h, w)
        if mask is None:
            mask = torch.rand(shape, device=fm_s.device, generator=generator) >= self.mask_ratio
        elif mask.shape != shape:
            raise ValueError(f'MGD: mask must be {shape}, got {tuple(mask.shape)}')
        with torch.autocast(fm_s.device.type, enabled=False):
            x, fm_t = _full(fm_s), _full(fm_t.detach())
            x = x if self.align is None else self.align(x)
            return F.mse_loss(self.generation(x * mask.to(x.dtype)), fm_t, reduction='sum') / n


def _full(x: Tensor) -> Tensor:
    """Half precision to float32; float64 stays."""
    return x if x.dtype == torch.float64 else x.float()
