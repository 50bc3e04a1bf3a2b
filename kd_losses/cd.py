"""CD, channel distillation: match how strongly each channel fires on average.

Z. Zhou, C. Zhuge, X. Guan, W. Liu, "Channel Distillation: Channel-Wise Attention for Knowledge Distillation",
2020, arXiv:2006.01683.

    c = ReLU of a batch norm of a 1x1 convolution of fm_s (the connector, trained with the student)
    loss = mean over n and channels of (average over positions of c - average of fm_t)^2

Tap: the map at the end of each stage, after its ReLU, one module per stage. Channels and sizes may differ.

The paper's other two parts are here as well. GKD: soft targets on the samples that the teacher gets right,
    T^2 sum over n of m_n KL(softmax(out_t / T) || softmax(out_s / T)) / sum of m_n, 0 if it gets none right
and EDT, `edt_weight`, the authors' schedule: the feature loss alone at first, then everything, weights
decaying.

Differences: the authors sum four stages with weight 6; we average. Their teacher runs with batch statistics
by accident, ours does not; their GKD adds spurious terms where a teacher probability underflows and divides
by zero when no sample is right.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class CD(nn.Module):
    """Squared error of channel means, for one pair of layers.

    Args:
        s_channels, t_channels: channels of the two maps; the connector is there also when they agree.

    Shape:
        fm_s: (N, s_channels, H_s, W_s), fm_t: (N, t_channels, H_t, W_t). Returns a scalar.
        No gradient reaches fm_t.

    Raises:
        ValueError: a map is not 4-D or has other channels than announced; the batch sizes differ.
    """

    def __init__(self, s_channels: int, t_channels: int) -> None:
        super().__init__()
        self.s_channels, self.t_channels = s_channels, t_channels
        self.connector = nn.Sequential(
            nn.Conv2d(s_channels, t_channels, kernel_size=1, bias=False),
            nn.BatchNorm2d(t_channels),
            nn.ReLU(),
        )

    def forward(self, fm_s: Tensor, fm_t: Tensor) -> Tensor:
        if fm_s.dim() != 4 or fm_s.shape[1] != self.s_channels:
            raise ValueError(f'CD: fm_s must be (N, {self.s_channels}, H, W), got {tuple(fm_s.shape)}')
        if fm_t.dim() != 4 or fm_t.shape[:2] != (len(fm_s), self.t_channels):
            raise ValueError(
                f'CD: fm_t must be ({len(fm_s)}, {self.t_channels}, H, W) as fm_s and t_channels say, '
                f'got {tuple(fm_t.shape)}'
            )
        with torch.autocast(fm_s.device.type, enabled=False):
            c = self.connector(_full(fm_s)).mean(dim=(2, 3))
            return F.mse_loss(c, _full(fm_t.detach()).mean(dim=(2, 3)))


class GKD(nn.Module):
    """Soft targets from the samples that the teacher gets right; out_s, out_t (N, K), target (N,)."""

    def __init__(self, T: float = 1.0) -> None:
        super().__init__()
        if not T > 0:
            raise ValueError(f'GKD: T must be > 0, got {T}')
        self.T = T

    def forward(self, out_s: Tensor, out_t: Tensor, target: Tensor) -> Tensor:
        if out_s.dim() != 2 or out_t.shape != out_s.shape or target.shape != out_s.shape[:1]:
            shapes = [tuple(x.shape) for x in (out_s, out_t, target)]
            raise ValueError(f'GKD: out_s, out_t and target must be (N, K), (N, K) and (N,), got {shapes}')
        out_s, out_t = _full(out_s), _full(out_t.detach())
        log_p, log_q = F.log_softmax(out_s / self.T, dim=1), F.log_softmax(out_t / self.T, dim=1)
        q = log_q.exp()
        kl = torch.where(q > 0, q * (log_q - log_p), 0.0).sum(dim=1)
        right = (out_t.argmax(dim=1) == target).to(kl.dtype)
        return (right * kl).sum() / right.sum().clamp(min=1) * self.T**2


def edt_weight(
    base: float,
    epoch: int,
    factor: float,
    is_feature_loss: bool,
    milestones: tuple = (60, 160),
    off_until: int = 60,
) -> float:
    """The authors' early-decay schedule, epochs counted from 1: base * factor^(milestones reached), and 0 up
    to off_until for losses that are not on features (cross-entropy, GKD)."""
    if not is_feature_loss and epoch <= off_until:
        return 0.0
    return base * factor ** sum(epoch >= m for m in milestones)


def _full(x: Tensor) -> Tensor:
    """Half precision to float32; float64 stays."""
    return x if x.dtype == torch.float64 else x.float()
