"""Layer-wise amalgamation: compress the teachers' maps into one, and let the student's map follow it.

C. Shen, X. Wang, J. Song, L. Sun, M. Song, "Amalgamating Knowledge towards Comprehensive Classification",
AAAI 2019, arXiv:1811.02796.

    R = enc(concatenated teacher maps);  D_1 ... D_m = dec(R);  A = fam(fm_s)       (1x1 convolutions)
    amal   = mean over all elements of (A - R)^2, R held constant
    recons = sum over teachers of mean over elements of (D_i - fm_t_i)^2
    loss = w_amal amal + w_recons recons

So enc and dec learn to compress, and only the student and fam follow.

Tap: the output of each stage after its ReLU; one module per stage, equal height and width. Beside it:
concat_kd on the logits.

Differences: the paper trains in three stages (compress, layer by layer, jointly); like the authors' later
code (KamalEngine) everything is trained at once. That code attaches a block to every convolution of a
ResNet-18; we attach three to a CIFAR ResNet.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LayerwiseKA(nn.Module):
    """Auto-encoder of the teachers' maps at one layer, and the student's distance to its code.

    Args:
        s_channels: of the student's map, also the width of the code.
        t_channels: list, of each teacher's map.
        w_amal, w_recons: weights of the two terms, 1 and 1.

    Shape:
        fm_s: (N, s_channels, H, W); fms_t: list of (N, t_channels[i], H, W). Returns a scalar, with
        return_terms=True also {'amal', 'recons'} without weights. No gradient reaches fms_t.

    Raises:
        ValueError: t_channels is empty; a map has other channels, batch or size.
    """

    def __init__(
        self, s_channels: int, t_channels: list[int], w_amal: float = 1.0, w_recons: float = 1.0
    ) -> None:
        super().__init__()
        if not t_channels:
            raise ValueError('LayerwiseKA: t_channels must name the channels of one teacher or more, got []')
        self.t_channels, self.w_amal, self.w_recons = list(t_channels), w_amal, w_recons
        self.enc = nn.Conv2d(sum(t_channels), s_channels, kernel_size=1)
        self.fam = nn.Conv2d(s_channels, s_channels, kernel_size=1)
        self.dec = nn.Conv2d(s_channels, sum(t_channels), kernel_size=1)

    def forward(self, fm_s: Tensor, fms_t: list[Tensor], return_terms: bool = False):
        c_s = self.fam.in_channels
        if fm_s.dim() != 4 or fm_s.shape[1] != c_s:
            raise ValueError(f'LayerwiseKA: fm_s must be (N, {c_s}, H, W), got {tuple(fm_s.shape)}')
        if len(fms_t) != len(self.t_channels):
            raise ValueError(f'LayerwiseKA: fms_t must hold {len(self.t_channels)} maps, got {len(fms_t)}')
        for i, (fm_t, channels) in enumerate(zip(fms_t, self.t_channels)):
            wanted = (len(fm_s), channels, *fm_s.shape[2:])
            if fm_t.shape != wanted:
                raise ValueError(f'LayerwiseKA: fms_t[{i}] must be {wanted}, got {tuple(fm_t.shape)}')
        with torch.autocast(fm_s.device.type, enabled=False):
            joined = torch.cat([_full(fm_t.detach()) for fm_t in fms_t], dim=1)
            code = self.enc(joined)
            amal = F.mse_loss(self.fam(_full(fm_s)), code.detach())
            decoded = zip(self.dec(code).split(self.t_channels, dim=1), joined.split(self.t_channels, dim=1))
            recons = sum(F.mse_loss(got, wanted) for got, wanted in decoded)
            loss = self.w_amal * amal + self.w_recons * recons
        return (loss, {'amal': amal, 'recons': recons}) if return_terms else loss


def _full(x: Tensor) -> Tensor:
    """Half precision to float32; float64 stays."""
    return x if x.dtype == torch.float64 else x.float()
