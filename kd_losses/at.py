"""AT, attention transfer: match where a layer is active, whatever its channels.

S. Zagoruyko, N. Komodakis, "Paying More Attention to Attention: Improving the Performance of Convolutional
Neural Networks via Attention Transfer", ICLR 2017, arXiv:1612.03928.

    Q[n, h, w] = mean over c of |fm[n, c, h, w]|^p          attention map, flattened to M = H * W numbers
    q[n] = Q[n] / max(||Q[n]||_2, 1e-12)
    loss = mean over n and m of (q_s - q_t)^2

Tap: the map at the end of each stage, one loss per stage. Channels may differ. If the sizes differ, both maps
are average-pooled to the smaller height and the smaller width before the attention map is built.

Differences: the authors' code, not their equation 2 (which has the norm itself, halved, instead of the mean
of squares). The absolute value is kept for every p; RepDistiller and mdistiller drop it, so that with an odd
p the channels cancel. The authors multiply the sum over three stages by 1000, which is our mean times 3000;
the weight in this collection's trainer, 1000, is that of Knowledge-Distillation-Zoo. They tap the sums of the
residual groups as they are, before batch norm and ReLU.

Source: szagoruyko/attention-transfer, utils.py (at, at_loss).

Use:
    >>> import torch
    >>> from at import AT
    >>> fm_s, fm_t = torch.randn(8, 16, 8, 8, requires_grad=True), torch.randn(8, 64, 4, 4)
    >>> AT()(fm_s, fm_t).backward()
    >>> fm_s.grad.norm() > 0
    tensor(True)
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
        Computed in float32, or in float64 as the student.

    Raises:
        ValueError: p is not positive; a map is not 4-D; the batch sizes differ.
    """

    def __init__(self, p: float = 2.0) -> None:
        super().__init__()
        if not p > 0:
            raise ValueError(f'AT: p must be > 0, got {p}')
        self.p = p

    def forward(self, fm_s: Tensor, fm_t: Tensor) -> Tensor:
        _expect('AT', 'fm_s', fm_s, 'N', 'C', 'H', 'W')
        _expect('AT', 'fm_t', fm_t, len(fm_s), 'C', 'H', 'W')
        fm_s, fm_t = _same_size(_full(fm_s), _full(fm_t.detach(), fm_s))
        return F.mse_loss(self.attention(fm_s), self.attention(fm_t))

    def attention(self, fm: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, H W), rows of length 1; shorter where the map's is below 1e-12."""
        if self.p == 2:
            energy = fm.square()
        elif self.p >= 1:
            energy = fm.abs().pow(self.p)
        else:  # keep zeros away from the power: its slope there is inf, and inf * 0 is NaN
            zero = fm == 0
            energy = torch.where(zero, 0.0, torch.where(zero, 1.0, fm).abs().pow(self.p))
        return F.normalize(energy.mean(dim=1).flatten(1), dim=1)  # by its length, or 1e-12 where that is less


def _same_size(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Average-pool two maps to the smaller of their heights and of their widths."""
    size = (min(a.shape[2], b.shape[2]), min(a.shape[3], b.shape[3]))
    return tuple(x if x.shape[2:] == size else F.adaptive_avg_pool2d(x, size) for x in (a, b))


def _expect(who: str, name: str, x: Tensor, *wanted: int | str) -> None:
    """Refuse another shape and say what to do. A letter is an axis of any length but 0, for K (classes) 1."""
    got = tuple(x.shape)
    right = [n > int(w == 'K') if isinstance(w, str) else n == w for n, w in zip(got, wanted)]
    if len(got) == len(wanted) and all(right) and 0 not in got:
        return
    if 0 in got:
        remedy = 'leave an empty batch out'
    elif len(got) == 2 and len(wanted) == 1:
        remedy = 'a number per row: x.flatten() of (N, 1) or (N, L), x.argmax(1) of one-hot labels'
    elif len(got) > len(wanted) and len(wanted) < 3:
        remedy = (
            'classes last, then flatten: x.movedim(1, -1).flatten(0, 2) for (N, K, H, W), x.flatten(0, 1) '
        )
        remedy += 'for (N, L, V), target.flatten()'
    elif len(wanted) == 4 and len(got) in (3, 5):
        remedy = 'x[..., None] makes a map of (N, C, L), x.flatten(3) one of (N, C, D, H, W)'
    elif len(got) != len(wanted):
        remedy = 'unsqueeze or flatten axes'
    elif not right[0]:
        remedy = 'all arguments need the samples of one batch (drop_last=True if the last one is smaller)'
    elif got[1] == 1 and 'K' in wanted:
        remedy = 'a sigmoid network has two classes, torch.cat([torch.zeros_like(z), z], 1)'
    elif not right[1]:
        remedy = 'give channels, widths or classes as the loss was built for, or as the other side has them'
    else:
        remedy = 'bring maps to one size, F.adaptive_avg_pool2d'
    shape = ', '.join(map(str, wanted)) + ',' * (len(wanted) == 1)
    raise ValueError(f'{who}: {name} must be ({shape}), got {got}: {remedy}')


def _full(x: Tensor, like: Tensor | None = None) -> Tensor:
    """In float32, or float64 if the student (like) is. Inference tensors are copied, to serve backward."""
    x = x.double() if (x if like is None else like).dtype == torch.float64 else x.float()
    compiling = getattr(torch.compiler, 'is_compiling', bool)()  # torch 2.2 cannot tell: False
    return x.clone() if not compiling and x.is_inference() else x
