"""AT, attention transfer: match where a layer is active, whatever its channels.

S. Zagoruyko, N. Komodakis, "Paying More Attention to Attention: Improving the Performance of Convolutional
Neural Networks via Attention Transfer", ICLR 2017, arXiv:1612.03928.

    Q[n, h, w] = mean over c of |fm[n, c, h, w]|^p          attention map, flattened to M = H W numbers
    q[n] = Q[n] / ||Q[n]||_2
    loss = mean over n and m of (q_s - q_t)^2

Tap: the map at the end of each stage, one loss per stage. Channels may differ. If the sizes differ, both maps
are average-pooled to the smaller height and the smaller width before the attention map is built.

Differences: the authors' code, not their equation 2 (which has the norm itself, halved, instead of the mean
of squares). The absolute value is kept for every p; RepDistiller and mdistiller drop it, so odd p cancels
between channels there. The authors weight the sum over three stages by 1000; with our mean over stages that
is 3000, and the default of 1000 is the seed zoo's.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class AT(nn.Module):
    """Mean squared difference of normalised spatial attention maps, for one pair of layers.

    Args:
        p: power of the activations, > 0; 2 is the authors'. Below 1 the slope at 0 is infinite and taken as
        0.

    Shape:
        fm_s: (N, C_s, H_s, W_s), fm_t: (N, C_t, H_t, W_t). Returns a scalar. No gradient reaches fm_t.
        A sample whose map is all zero has attention 0 and gradient 0.

    Raises:
        ValueError: p is not positive; a map is not 4-D; the batch sizes differ.
    """

    def __init__(self, p: float = 2.0) -> None:
        super().__init__()
        if not p > 0:
            raise ValueError(f'AT: p must be > 0, got {p}')
        self.p = p

    def forward(self, fm_s: Tensor, fm_t: Tensor) -> Tensor:
        if fm_s.dim() != 4:
            raise ValueError(f'AT: fm_s must be (N, C, H, W), got {tuple(fm_s.shape)}')
        if fm_t.dim() != 4 or len(fm_t) != len(fm_s):
            raise ValueError(f'AT: fm_t must be ({len(fm_s)}, C, H, W) as fm_s, got {tuple(fm_t.shape)}')
        fm_s, fm_t = _same_size(_full(fm_s), _full(fm_t.detach()))
        return F.mse_loss(self.attention(fm_s), self.attention(fm_t))

    def attention(self, fm: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, H W), rows of length 1, or 0 where the map is zero."""
        if self.p == 2:
            energy = fm.square()
        elif self.p >= 1:
            energy = fm.abs().pow(self.p)
        else:  # keep zeros away from the power: its slope there is inf, and inf * 0 is NaN
            zero = fm == 0
            energy = torch.where(zero, 0.0, torch.where(zero, 1.0, fm).abs().pow(self.p))
        return _unit(energy.mean(dim=1).flatten(1))


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
