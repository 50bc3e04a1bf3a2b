"""VID, variational information distillation: maximise a bound on the information shared with the teacher.

S. Ahn, S. X. Hu, A. Damianou, N. D. Lawrence, Z. Dai, "Variational Information Distillation for Knowledge
Transfer", CVPR 2019, arXiv:1904.05835.

The teacher's map is modelled as a Gaussian around a regression from the student's, one learned variance per
channel:

    mu = 1x1 conv, ReLU, 1x1 conv, ReLU, 1x1 conv of fm_s (no bias);  var_c = softplus(alpha_c) + eps
    loss = mean over n, c, h, w of 1/2 (log var_c + (mu - fm_t)^2 / var_c)

The constant log(2 pi) / 2 is dropped, so the loss may be negative.

Tap: the map after each stage, one module per stage, trained with the student. Channels differ through the
regression; maps of different size are average-pooled to the smaller height and width (the student's before
mu).

Differences: RepDistiller's form (its header says it is the author's), which adds stages where we average; the
convolutions start as in Knowledge-Distillation-Zoo (Kaiming normal, fan out). mdistiller forgets to train
alpha.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class VID(nn.Module):
    """Gaussian negative log-likelihood of a teacher map given a student map.

    Args:
        s_channels, t_channels: channels of the two maps.
        mid_channels: hidden width of the regression; None means t_channels.
        init_var: variance to start from, 5.
        eps: floor of the variance, 1e-5; must be below init_var.

    Shape:
        fm_s: (N, s_channels, H_s, W_s), fm_t: (N, t_channels, H_t, W_t). Returns a scalar.
        No gradient reaches fm_t.

    Raises:
        ValueError: init_var <= eps; a map is not 4-D or has other channels than announced; the batch sizes
        differ.
    """

    def __init__(
        self,
        s_channels: int,
        t_channels: int,
        mid_channels: int | None = None,
        init_var: float = 5.0,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        if not init_var > eps:
            raise ValueError(f'VID: init_var must be greater than eps = {eps}, got {init_var}')
        mid = t_channels if mid_channels is None else mid_channels
        self.s_channels, self.t_channels, self.eps = s_channels, t_channels, eps
        self.regressor = nn.Sequential(
            nn.Conv2d(s_channels, mid, kernel_size=1, bias=False),
            nn.ReLU(),
            nn.Conv2d(mid, mid, kernel_size=1, bias=False),
            nn.ReLU(),
            nn.Conv2d(mid, t_channels, kernel_size=1, bias=False),
        )
        for layer in self.regressor[::2]:
            nn.init.kaiming_normal_(layer.weight, mode='fan_out', nonlinearity='relu')
        x = init_var - eps
        self.alpha = nn.Parameter(
            torch.full((t_channels,), x + math.log1p(-math.exp(-x)))
        )  # softplus(alpha) = x

    def forward(self, fm_s: Tensor, fm_t: Tensor) -> Tensor:
        if fm_s.dim() != 4 or fm_s.shape[1] != self.s_channels:
            raise ValueError(f'VID: fm_s must be (N, {self.s_channels}, H, W), got {tuple(fm_s.shape)}')
        if fm_t.dim() != 4 or fm_t.shape[:2] != (len(fm_s), self.t_channels):
            raise ValueError(
                f'VID: fm_t must be ({len(fm_s)}, {self.t_channels}, H, W) as fm_s and t_channels say, '
                f'got {tuple(fm_t.shape)}'
            )
        with torch.autocast(fm_s.device.type, enabled=False):
            fm_s, fm_t = _same_size(_full(fm_s), _full(fm_t.detach()))
            var = F.softplus(self.alpha) + self.eps
            # one variance per channel: reduce the squared error first, then everything else is C numbers
            error = (self.regressor(fm_s) - fm_t).square().mean(dim=(0, 2, 3))
            return 0.5 * (var.log() + error / var).mean()


def _same_size(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Average-pool two maps to the smaller of their heights and of their widths."""
    size = (min(a.shape[2], b.shape[2]), min(a.shape[3], b.shape[3]))
    return tuple(x if x.shape[2:] == size else F.adaptive_avg_pool2d(x, size) for x in (a, b))


def _full(x: Tensor) -> Tensor:
    """Half precision to float32; float64 stays."""
    return x if x.dtype == torch.float64 else x.float()
