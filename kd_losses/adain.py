"""AdaIN-KD: the teacher, given its own map with the student's statistics, should not notice the difference.

J. Yang, B. Martinez, A. Bulat, G. Tzimiropoulos, "Knowledge Distillation via Adaptive Instance
Normalization", 2020, arXiv:2003.04289.

    mu, sigma: mean and deviation over positions, per sample and channel, sigma = sqrt(variance + eps)
    stat = mean over n, c of (mu_s - mu_t)^2 + mean over n, c of (sigma_s - sigma_t)^2
    y = sigma_s (fm_t - mu_t) / sigma_t + mu_s
    adain = mean over n, k of (teacher_tail(y) - out_t)^2    teacher_tail: the teacher from here on
    loss = stat_weight stat + adain                         the student is reached through mu_s and sigma_s

Tap: maps of the same depth, by default the last before its ReLU (the tail is then ReLU, average, classifier),
and the teacher's logits. Sizes may differ; channels through a connector (1x1 convolution, batch norm, ReLU).

Differences: a reconstruction. The authors' code for this paper is not public and only the abstract could be
read; the formula is from secondary sources, the weights are guesses.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class AdaINKD(nn.Module):
    """Squared errors of channel statistics, and of the teacher's logits under the student's statistics.

    Args:
        s_channels, t_channels: channels of the two maps; a connector is built where they differ. None: equal.
        stat_weight: weight of the statistics; 1.
        eps: added to the variance, > 0; 1e-5.

    Shape:
        fm_s: (N, s_channels, H_s, W_s), fm_t: (N, t_channels, H_t, W_t), each of more than one position;
        out_t: (N, K); teacher_tail: callable (N, t_channels, H_t, W_t) -> (N, K), frozen. Returns a scalar.
        No gradient reaches fm_t and out_t. `terms` returns (stat, adain).

    Raises:
        ValueError: only one of the channels is given; eps is not positive; shapes do not fit.
    """

    def __init__(
        self,
        s_channels: int | None = None,
        t_channels: int | None = None,
        stat_weight: float = 1.0,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        if (s_channels is None) != (t_channels is None):
            raise ValueError(
                f'AdaINKD: give s_channels and t_channels or neither, got {s_channels}, {t_channels}'
            )
        if not eps > 0:
            raise ValueError(f'AdaINKD: eps must be > 0, got {eps}')
        self.s_channels, self.stat_weight, self.eps = s_channels, stat_weight, eps
        self.connector = None
        if s_channels != t_channels:
            self.connector = nn.Sequential(
                nn.Conv2d(s_channels, t_channels, 1, bias=False), nn.BatchNorm2d(t_channels), nn.ReLU()
            )

    def forward(self, fm_s: Tensor, fm_t: Tensor, out_t: Tensor, teacher_tail) -> Tensor:
        stat, adain = self.terms(fm_s, fm_t, out_t, teacher_tail)
        return self.stat_weight * stat + adain

    def terms(self, fm_s: Tensor, fm_t: Tensor, out_t: Tensor, teacher_tail) -> tuple[Tensor, Tensor]:
        if fm_s.dim() != 4 or self.s_channels not in (None, fm_s.shape[1]) or fm_s[0, 0].numel() < 2:
            raise ValueError(
                f'AdaINKD: fm_s must be (N, {self.s_channels or "C"}, H, W) with H W > 1, '
                f'got {tuple(fm_s.shape)}'
            )
        channels = fm_s.shape[1] if self.connector is None else self.connector[0].out_channels
        if fm_t.dim() != 4 or fm_t.shape[:2] != (len(fm_s), channels) or fm_t[0, 0].numel() < 2:
            raise ValueError(
                f'AdaINKD: fm_t must be ({len(fm_s)}, {channels}, H, W) with H W > 1, got {tuple(fm_t.shape)}'
            )
        with torch.autocast(fm_s.device.type, enabled=False):
            s, t = _full(fm_s), _full(fm_t.detach())
            mu_s, sigma_s = self._statistics(s if self.connector is None else self.connector(s))
            mu_t, sigma_t = self._statistics(t)
            stat = F.mse_loss(mu_s, mu_t) + F.mse_loss(sigma_s, sigma_t)
            out = _full(teacher_tail(sigma_s * (t - mu_t) / sigma_t + mu_s))
            if out_t.shape != out.shape:
                raise ValueError(
                    f'AdaINKD: out_t must be {tuple(out.shape)} as teacher_tail gives, '
                    f'got {tuple(out_t.shape)}'
                )
            return stat, F.mse_loss(out, _full(out_t.detach()))

    def _statistics(self, fm: Tensor) -> tuple[Tensor, Tensor]:
        """(N, C, 1, 1) each."""
        variance, mean = torch.var_mean(fm, dim=(2, 3), correction=0, keepdim=True)
        return mean, (variance + self.eps).sqrt()


def _full(x: Tensor) -> Tensor:
    """Half precision to float32; float64 stays."""
    return x if x.dtype == torch.float64 else x.float()


# ------------------------------------------ how the training scripts use it; a copied file may drop this


def feed(kd, s, t, batch):
    def rest(fm):  # of the teacher, after its last map
        return batch.net_t.classifier_layer()(fm.relu().mean(dim=(2, 3)))

    return kd(s.pres[-1], t.pres[-1], t.out, rest)
