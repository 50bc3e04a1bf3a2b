"""AFD, attentive feature distillation: regress normalised channels, weighed by a learned channel attention.

K. Wang, X. Gao, Y. Zhao, X. Li, D. Dou, C.-Z. Xu, "Pay Attention to Features, Transfer Learn Faster CNNs",
ICLR 2020.

    p = mean over h, w of fm_t;  r = sigmoid(1x1 conv, ReLU, 1x1 conv of p);  rho = r / sum over c of r
    u[n, c] = fm[n, c] / (||fm[n, c]||_2 + 1e-6)              each channel of each sample, over its positions
    loss = mean over n of sum over c of rho[n, c] * mean over h, w of (u_s - u_t)^2

Tap: the map at the end of each stage, after its ReLU, one module per stage. The attention is trained with the
student. Channels are matched one to one, so student and teacher maps must have one shape.

Differences: no authors' code was found. The paper's attention is linear in all positions with a softmax; the
squeeze-and-excitation form here is Knowledge-Distillation-Zoo's. A map that is zero has a steep slope (1e6)
on a tap before the ReLU; behind the ReLU it is masked.
"""

import torch
from torch import Tensor, nn


class AFD(nn.Module):
    """Attention-weighted squared error of normalised channels, for one pair of layers.

    Args:
        s_channels, t_channels: channels of the two maps, equal.
        att_f: hidden width of the attention as a share of the channels; 1.

    Shape:
        fm_s, fm_t: (N, C, H, W), equal. Returns a scalar. No gradient reaches fm_t.
        `attention_of(fm_t)` gives rho, (N, C).

    Raises:
        ValueError: the channel counts differ; a map is not (N, C, H, W); the shapes differ.
    """

    def __init__(self, s_channels: int, t_channels: int, att_f: float = 1.0) -> None:
        super().__init__()
        if s_channels != t_channels:
            raise ValueError(f'AFD: s_channels must equal t_channels, got {s_channels} and {t_channels}')
        hidden = max(1, int(t_channels * att_f))
        self.channels = t_channels
        self.attention = nn.Sequential(
            nn.Conv2d(t_channels, hidden, kernel_size=1),
            nn.ReLU(),
            nn.Conv2d(hidden, t_channels, kernel_size=1),
        )
        for layer in self.attention[::2]:
            nn.init.kaiming_normal_(layer.weight, mode='fan_out', nonlinearity='relu')
            nn.init.zeros_(layer.bias)

    def forward(self, fm_s: Tensor, fm_t: Tensor) -> Tensor:
        if fm_s.dim() != 4 or fm_s.shape[1] != self.channels:
            raise ValueError(f'AFD: fm_s must be (N, {self.channels}, H, W), got {tuple(fm_s.shape)}')
        if fm_t.shape != fm_s.shape:
            raise ValueError(f'AFD: fm_t must be {tuple(fm_s.shape)} as fm_s, got {tuple(fm_t.shape)}')
        with torch.autocast(fm_s.device.type, enabled=False):
            fm_s, fm_t = _full(fm_s), _full(fm_t.detach())
            error = (_channels(fm_s) - _channels(fm_t)).square().mean(dim=2)
            return (self.attention_of(fm_t) * error).sum(dim=1).mean()

    def attention_of(self, fm_t: Tensor) -> Tensor:
        r = self.attention(fm_t.mean(dim=(2, 3), keepdim=True)).flatten(1).sigmoid()
        return r / r.sum(dim=1, keepdim=True).clamp(min=1e-12)


def _channels(fm: Tensor) -> Tensor:
    """(N, C, H W), each channel of length 1."""
    fm = fm.flatten(2)
    return fm / (torch.linalg.vector_norm(fm, dim=2, keepdim=True) + 1e-6)


def _full(x: Tensor) -> Tensor:
    """Half precision to float32; float64 stays."""
    return x if x.dtype == torch.float64 else x.float()
