"""AB, activation boundaries: make the student's neurons fire where the teacher's do, however strongly.

B. Heo, M. Lee, S. Yun, J. Y. Choi, "Knowledge Transfer via Distillation of Activation Boundaries Formed by
Hidden Neurons", AAAI 2019, arXiv:1811.03233.

    s = fm_s, or a batch norm of a 1x1 convolution of it (the connector) where the channels differ
    term = (s + margin)^2  where the teacher is off (t <= 0) and s > -margin
           (s - margin)^2  where it is on (t > 0) and s <= margin
           0               elsewhere
    loss = mean over n, c, h, w of term

Tap: the maps BEFORE the ReLU at the end of each stage (after it, no value is negative and every 0 counts as
off); equal sizes. Two stages: this loss alone initialises everything but the classifier, then cross-entropy
alone trains the student. Not a distance: the loss of a map against itself is positive inside the margin.

Differences: the authors' element-wise loss. The mean over elements and margin 2 are Knowledge-Distillation-
Zoo's; the authors sum over elements, divide by N (reduction='batchmean', margin 1) and weigh the stages, from
the last, 1, 1/2, 1/4 times 3/1000. Their CIFAR script leaves the teacher in training mode; ours is in eval.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class AB(nn.Module):
    """Squared hinge that pushes each student neuron to the teacher's side of 0, by a margin.

    Args:
        s_channels, t_channels: channels of the two maps; a connector is built where they differ. None: equal.
        margin: distance to the boundary that is demanded, > 0; 1 (Knowledge-Distillation-Zoo 2).
        reduction: 'mean' over all elements, or 'batchmean', the sum over elements divided by N.

    Shape:
        fm_s: (N, s_channels, H, W), fm_t: (N, t_channels, H, W). Returns a scalar. No gradient reaches fm_t.

    Raises:
        ValueError: only one of the channels is given; margin or reduction is not legal; the maps do not fit.
    """

    def __init__(
        self,
        s_channels: int | None = None,
        t_channels: int | None = None,
        margin: float = 1.0,
        reduction: str = 'mean',
    ) -> None:
        super().__init__()
        if (s_channels is None) != (t_channels is None):
            raise ValueError(f'AB: give s_channels and t_channels or neither, got {s_channels}, {t_channels}')
        if not margin > 0:
            raise ValueError(f'AB: margin must be > 0, got {margin}')
        if reduction not in ('mean', 'batchmean'):
            raise ValueError(f'AB: reduction must be "mean" or "batchmean", got {reduction!r}')
        self.s_channels, self.margin, self.reduction = s_channels, margin, reduction
        self.connector = None
        if s_channels != t_channels:
            self.connector = nn.Sequential(
                nn.Conv2d(s_channels, t_channels, kernel_size=1, bias=False), nn.BatchNorm2d(t_channels)
            )
            nn.init.normal_(self.connector[0].weight, std=(2 / t_channels) ** 0.5)

    def forward(self, fm_s: Tensor, fm_t: Tensor) -> Tensor:
        if fm_s.dim() != 4 or self.s_channels not in (None, fm_s.shape[1]):
            raise ValueError(f'AB: fm_s must be (N, {self.s_channels or "C"}, H, W), got {tuple(fm_s.shape)}')
        wanted = (len(fm_s), fm_s.shape[1] if self.connector is None else self.connector[0].out_channels)
        wanted += tuple(fm_s.shape[2:])
        if fm_t.shape != wanted:
            raise ValueError(f'AB: fm_t must be {wanted} as fm_s, got {tuple(fm_t.shape)}')
        with torch.autocast(fm_s.device.type, enabled=False):
            s = _full(fm_s) if self.connector is None else self.connector(_full(fm_s))
            with (
                torch.no_grad()
            ):  # a target that equals s where nothing is demanded: no masks, one fused kernel
                on = fm_t > 0
                y = torch.where(on, s.clamp(min=self.margin), s.clamp(max=-self.margin))
            if self.reduction == 'mean':
                return F.mse_loss(s, y)
            return F.mse_loss(s, y, reduction='sum') / len(s)


def _full(x: Tensor) -> Tensor:
    """Half precision to float32; float64 stays."""
    return x if x.dtype == torch.float64 else x.float()


# ------------------------------------------ how the training scripts use it; a copied file may drop this


def build(loss, probe, **options):
    """One for each stage, with the margin of Knowledge-Distillation-Zoo."""
    pairs = zip(probe.s.pres[1:], probe.t.pres[1:])
    return nn.ModuleList(loss(x.shape[1], y.shape[1], **{'margin': 2.0, **options}) for x, y in pairs)
