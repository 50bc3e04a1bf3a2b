"""NST, neuron selectivity transfer: match the distributions of the channels' activation patterns.

Z. Huang, N. Wang, "Like What You Like: Knowledge Distill via Neuron Selectivity Transfer", 2017,
arXiv:1707.01219.

Every channel of a map is a point: its H W values divided by their length (s_i, i = 1..C_s; t_j, j = 1..C_t).
The loss is the squared maximum mean discrepancy (biased estimate) between the two sets of points:

    loss = mean over n of   1/C_t^2 sum_jj' k(t_j, t_j') + 1/C_s^2 sum_ii' k(s_i, s_i')
                            - 2/(C_s C_t) sum_ij k(s_i, t_j)

    poly      k(x, y) = (x.y + c)^d
    linear    k(x, y) = x.y
    gaussian  k(x, y) = exp(-||x - y||^2 / (2 sigma^2)), sigma^2 = mean of ||s_i - t_j||^2 over the sample's
              pairs, without gradient

Tap: the last stage's map (Knowledge-Distillation-Zoo) or every stage's (RepDistiller). Channels may differ;
maps of different size are average-pooled to the smaller height and width.

Differences: the authors' code (polynomial only) drops the first sum, which is constant; we keep it, so the
loss is 0 for equal maps. Which pairs define sigma^2 no published code says; per sample and across networks is
our choice. Cost: the zoos build an (N, C_s, C_t, H W) tensor; here only Gram matrices, of channels or of
positions, whichever is smaller.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class NST(nn.Module):
    """Squared MMD between the normalised channels of two maps.

    Args:
        kernel: 'poly', 'linear' or 'gaussian'.
        d, c: power (a positive integer) and offset of the polynomial kernel; 2 and 0 are the authors'.

    Shape:
        fm_s: (N, C_s, H_s, W_s), fm_t: (N, C_t, H_t, W_t). Returns a scalar. No gradient reaches fm_t.
        A channel that is zero everywhere counts as the zero vector and gets no gradient.

    Raises:
        ValueError: unknown kernel; d is not a positive integer; a map is not 4-D; the batch sizes differ.
    """

    def __init__(self, kernel: str = 'poly', d: int = 2, c: float = 0.0) -> None:
        super().__init__()
        if kernel not in _KERNELS:
            raise ValueError(f'NST: kernel must be one of {sorted(_KERNELS)}, got {kernel!r}')
        if d != int(d) or d < 1:
            raise ValueError(f'NST: d must be a positive integer, got {d}')
        self.kernel, self.d, self.c = kernel, int(d), c

    def forward(self, fm_s: Tensor, fm_t: Tensor) -> Tensor:
        if fm_s.dim() != 4:
            raise ValueError(f'NST: fm_s must be (N, C, H, W), got {tuple(fm_s.shape)}')
        if fm_t.dim() != 4 or len(fm_t) != len(fm_s):
            raise ValueError(f'NST: fm_t must be ({len(fm_s)}, C, H, W) as fm_s, got {tuple(fm_t.shape)}')
        fm_s, fm_t = _same_size(_full(fm_s), _full(fm_t.detach()))
        s, t = _unit(fm_s.flatten(2)), _unit(fm_t.flatten(2))  # (N, C, M)
        with torch.autocast(s.device.type, enabled=False):
            return _KERNELS[self.kernel](s, t, self.d, self.c).mean()


def _poly(s: Tensor, t: Tensor, d: int, c: float) -> Tensor:
    c_s, c_t, m = s.shape[1], t.shape[1], s.shape[2]
    if d == 2 and c == 0 and m * (c_s + c_t) < c_s**2 + c_s * c_t + c_t**2:
        # sum over i, j of (s_i.t_j)^2 is the inner product of S^T S and T^T T, so the three sums are one norm
        return (s.mT @ s / c_s - t.mT @ t / c_t).square().sum(dim=(1, 2))
    return _mmd(lambda x, y: (x @ y.mT + c).pow(d), s, t)


def _linear(s: Tensor, t: Tensor, d: int, c: float) -> Tensor:
    return (s.mean(dim=1) - t.mean(dim=1)).square().sum(dim=1)


def _gaussian(s: Tensor, t: Tensor, d: int, c: float) -> Tensor:
    def distance(x, y):
        return x.square().sum(2)[:, :, None] + y.square().sum(2)[:, None, :] - 2 * x @ y.mT

    sigma2 = distance(s.detach(), t).mean(dim=(1, 2), keepdim=True).clamp(min=1e-12)
    return _mmd(lambda x, y: torch.exp(-distance(x, y) / (2 * sigma2)), s, t)


_KERNELS = {'poly': _poly, 'linear': _linear, 'gaussian': _gaussian}


def _mmd(k, s: Tensor, t: Tensor) -> Tensor:
    return k(t, t).mean(dim=(1, 2)) + k(s, s).mean(dim=(1, 2)) - 2 * k(s, t).mean(dim=(1, 2))


def _same_size(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Average-pool two maps to the smaller of their heights and of their widths."""
    size = (min(a.shape[2], b.shape[2]), min(a.shape[3], b.shape[3]))
    return tuple(x if x.shape[2:] == size else F.adaptive_avg_pool2d(x, size) for x in (a, b))


def _unit(x: Tensor) -> Tensor:
    """Rows divided by their length; a zero row stays zero and gets no gradient."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    alive = norm > 1e-12
    return torch.where(alive, x / torch.where(alive, norm, 1.0), 0.0)


def _full(x: Tensor) -> Tensor:
    """Half precision to float32; float64 stays."""
    return x if x.dtype == torch.float64 else x.float()
