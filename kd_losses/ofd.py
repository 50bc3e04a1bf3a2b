"""OFD, overhaul of feature distillation: regress pre-ReLU maps, but only where it matters after the ReLU.

B. Heo, J. Kim, S. Yun, H. Park, N. Kwak, J. Y. Choi, "A Comprehensive Overhaul of Feature Distillation", ICCV
2019, arXiv:1904.01866.

    s = batch norm of a 1x1 convolution of fm_s (the connector, trained with the student)
    t' = max(fm_t, m_c)            m_c < 0: what the teacher's channel is worth on average when negative
    loss = sum over c, h, w of (s - t')^2 where s > t' or t' > 0, else 0; mean over n      ('batchmean')

    m_c = E[x | x < 0], x ~ N(mu, sigma^2), with mu = bias and sigma = |weight| of the teacher's batch norm
        = mu - sigma phi(mu / sigma) / Phi(-mu / sigma), or -3 sigma where Phi(-mu / sigma) <= 0.001

Tap: the maps BEFORE the last ReLU of each stage, one module per stage. A teacher map of another size is
average-pooled to the student's.

Differences: the authors' loss and margin; they sum the stages with weights 1/4, 1/2, 1 times 1e-3 and keep
the teacher in train mode, we average equal stages with reduction='mean' and the seed zoo's weight 0.5,
teacher in eval mode. margin=None takes the mean of the negative entries of each batch
(Knowledge-Distillation-Zoo). sigma = 0 crashes elsewhere; here m = min(mu, 0).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class OFD(nn.Module):
    """Partial squared error to a margin-rectified teacher map.

    Args:
        s_channels, t_channels: channels of the two maps.
        margin: (t_channels,) negative numbers, e.g. `OFD.margin_from_bn(bn.weight, bn.bias)`; None: from each
        batch. reduction: 'batchmean' divides the sum by N (authors), 'mean' by the number of elements.

    Shape:
        fm_s: (N, s_channels, H, W), fm_t: (N, t_channels, H_t, W_t), both pre-activation. Returns a scalar.
        No gradient reaches fm_t.

    Raises:
        ValueError: unknown reduction; margin, fm_s or fm_t of a wrong shape.
    """

    def __init__(
        self, s_channels: int, t_channels: int, margin: Tensor | None = None, reduction: str = 'batchmean'
    ) -> None:
        super().__init__()
        if reduction not in ('batchmean', 'mean'):
            raise ValueError(f"OFD: reduction must be 'batchmean' or 'mean', got {reduction!r}")
        if margin is not None and tuple(margin.shape) != (t_channels,):
            raise ValueError(f'OFD: margin must be ({t_channels},), got {tuple(margin.shape)}')
        self.s_channels, self.t_channels, self.reduction = s_channels, t_channels, reduction
        self.connector = nn.Sequential(
            nn.Conv2d(s_channels, t_channels, kernel_size=1, bias=False), nn.BatchNorm2d(t_channels)
        )
        nn.init.normal_(self.connector[0].weight, std=math.sqrt(2 / t_channels))
        self.register_buffer(
            'margin', None if margin is None else margin.detach().clone().reshape(1, -1, 1, 1)
        )

    @staticmethod
    def margin_from_bn(weight: Tensor, bias: Tensor) -> Tensor:
        """Expected negative part per channel, (C,), from the affine parameters of a batch norm, each (C,)."""
        mu, sigma = bias.detach().double(), weight.detach().double().abs()
        sane = sigma.clamp(min=1e-12)
        z = mu / sane
        below = torch.special.ndtr(-z)  # P(x < 0)
        density = torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi)
        margin = torch.where(below > 0.001, mu - sane * density / below.clamp(min=0.001), -3 * sane)
        return torch.where(sigma < 1e-12, mu.clamp(max=0), margin).to(weight.dtype)

    @staticmethod
    def margin_from_batch(fm_t: Tensor) -> Tensor:
        """Mean of the negative entries per channel of a map (N, C, H, W), as (1, C, 1, 1); 0 without any."""
        negative = (fm_t < 0).to(fm_t.dtype)
        count = negative.sum(dim=(0, 2, 3), keepdim=True)
        return (fm_t * negative).sum(dim=(0, 2, 3), keepdim=True) / (count + 1e-6)

    def forward(self, fm_s: Tensor, fm_t: Tensor) -> Tensor:
        if fm_s.dim() != 4 or fm_s.shape[1] != self.s_channels:
            raise ValueError(f'OFD: fm_s must be (N, {self.s_channels}, H, W), got {tuple(fm_s.shape)}')
        if fm_t.dim() != 4 or fm_t.shape[:2] != (len(fm_s), self.t_channels):
            raise ValueError(
                f'OFD: fm_t must be ({len(fm_s)}, {self.t_channels}, H, W) as fm_s and t_channels say, '
                f'got {tuple(fm_t.shape)}'
            )
        with torch.autocast(fm_s.device.type, enabled=False):
            s = self.connector(_full(fm_s))
            with torch.no_grad():
                t = _full(fm_t)
                if t.shape[2:] != s.shape[2:]:
                    t = F.adaptive_avg_pool2d(t, s.shape[2:])
                t = torch.maximum(t, self.margin_from_batch(t) if self.margin is None else self.margin)
                # where nothing is demanded the target is the student itself: error and gradient are exactly 0
                target = torch.where((s > t) | (t > 0), t, s)
            if self.reduction == 'mean':
                return F.mse_loss(s, target)
            return F.mse_loss(s, target, reduction='sum') / len(s)


def _full(x: Tensor) -> Tensor:
    """Half precision to float32; float64 stays."""
    return x if x.dtype == torch.float64 else x.float()


# ------------------------------------------ how the training scripts use it; a copied file may drop this


def feed(kd, s, t, batch):
    return sum(loss(x, y) for loss, x, y in zip(kd, s.pres[1:], t.pres[1:])) / len(kd)


def build(loss, probe, **options):
    """One for each stage, its margin from the teacher's batch norm."""
    pairs = zip(probe.s.pres[1:], probe.t.pres[1:], probe.net_t.bn_before_relu())
    return nn.ModuleList(
        loss(x.shape[1], y.shape[1],
             **{'margin': loss.margin_from_bn(bn.weight, bn.bias), 'reduction': 'mean', **options})
        for x, y, bn in pairs
    )  # fmt: skip
