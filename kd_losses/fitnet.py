"""FitNet, hints: regress one of the teacher's feature maps.

A. Romero, N. Ballas, S. E. Kahou, A. Chassang, C. Gatta, Y. Bengio, "FitNets: Hints for Thin Deep Nets",
ICLR 2015, arXiv:1412.6550.

    loss = mean over all elements of (r(fm_s) - fm_t)^2
    r = identity where the channels agree, else 1x1 convolution, batch norm, ReLU (trained with the student)

Tap: one map in the middle (RepDistiller, mdistiller: second stage) or at the end (Knowledge-Distillation-Zoo:
last stage, our default), after its ReLU; relu=False for a tap before it. Also takes (N, D) embeddings of
equal width.

Differences: the paper trains the student's lower half on the hint first and its code has half the squared
error summed over one axis; like every later zoo we add the plain mean to the cross-entropy. The regressor is
RepDistiller's for equal sizes; maps of different sizes are refused, not resized.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FitNet(nn.Module):
    """Mean squared error between a (regressed) student map and a teacher map.

    Args:
        s_channels, t_channels: channels of the two maps. Omitted or equal: no regressor, no parameters.
        relu: end the regressor with a ReLU, as a tap after a ReLU wants.

    Shape:
        fm_s: (N, s_channels, H, W), fm_t: (N, t_channels, H, W); without a regressor any two equal shapes.
        Returns a scalar. No gradient reaches fm_t.

    Raises:
        ValueError: only one of the two channel counts is given; the shapes differ after the regressor.
    """

    def __init__(
        self, s_channels: int | None = None, t_channels: int | None = None, relu: bool = True
    ) -> None:
        super().__init__()
        if (s_channels is None) != (t_channels is None):
            raise ValueError(
                f'FitNet: give both or neither of s_channels and t_channels, '
                f'got {s_channels} and {t_channels}'
            )
        self.regressor = None
        if s_channels != t_channels:
            layers = [nn.Conv2d(s_channels, t_channels, kernel_size=1), nn.BatchNorm2d(t_channels)]
            self.regressor = nn.Sequential(*layers, nn.ReLU()) if relu else nn.Sequential(*layers)

    def forward(self, fm_s: Tensor, fm_t: Tensor) -> Tensor:
        wanted = fm_s.shape
        if self.regressor is not None:
            c_s, c_t = self.regressor[0].in_channels, self.regressor[0].out_channels
            if fm_s.dim() != 4 or fm_s.shape[1] != c_s:
                raise ValueError(f'FitNet: fm_s must be (N, {c_s}, H, W), got {tuple(fm_s.shape)}')
            wanted = (len(fm_s), c_t, *fm_s.shape[2:])
        if fm_t.shape != wanted:
            raise ValueError(
                f'FitNet: fm_t must be {tuple(wanted)}, got {tuple(fm_t.shape)} (fm_s is {tuple(fm_s.shape)})'
            )
        with torch.autocast(fm_s.device.type, enabled=False):
            fm_s, fm_t = _full(fm_s), _full(fm_t.detach())
            return F.mse_loss(fm_s if self.regressor is None else self.regressor(fm_s), fm_t)


def _full(x: Tensor) -> Tensor:
    """Half precision to float32; float64 stays."""
    return x if x.dtype == torch.float64 else x.float()
