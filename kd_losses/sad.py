"""SAD, self attention distillation: each block's attention imitates that of the next, deeper block.

Y. Hou, Z. Ma, C. Liu, C. C. Loy, "Learning Lightweight Lane Detection CNNs by Self Attention Distillation",
ICCV 2019, arXiv:1908.00821.

    G(A) = sum over channels of A^2;  the deeper block's G is enlarged to the earlier one's size, bilinearly
    Psi = softmax over all positions of G / T
    loss = mean over n and positions of (Psi(fm) - Psi(fm_next))^2            no gradient to fm_next

Tap: maps of consecutive blocks of ONE network, one call per pair, summed. No teacher. The authors switch it
on after about two thirds of the training.

Differences: the authors' released files do not hold this loss; written from the formula, checked against an
unofficial implementation, which lets the gradient into the deeper map as well. Large activations make Psi
one-hot; a larger T helps.

Source: formula only; InhwanBae/ENet-SAD_Pytorch (unofficial), model_ENET_SAD.py (at_gen) was read.

Use:
    >>> import torch
    >>> from sad import SAD
    >>> fm, fm_next = torch.randn(8, 16, 8, 8, requires_grad=True), torch.randn(8, 32, 4, 4)
    >>> SAD()(fm, fm_next).backward()
    >>> fm.grad.norm() > 0
    tensor(True)
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SAD(nn.Module):
    """Mean squared difference of spatial attention distributions of two blocks of a network.

    Args:
        T: divides the energies before the softmax, > 0; 1.

    Shape:
        fm: (N, C_1, H, W), fm_next: (N, C_2, h, w), not larger. Returns a scalar. No gradient reaches
        fm_next.
        Computed in float32, or in float64 as the student.

    Raises:
        ValueError: T is not positive; a map is not 4-D; batch sizes differ; fm_next is larger.
    """

    def __init__(self, T: float = 1.0) -> None:
        super().__init__()
        if not T > 0:
            raise ValueError(f'SAD: T must be > 0, got {T}')
        self.T = T

    def forward(self, fm: Tensor, fm_next: Tensor) -> Tensor:
        _expect('SAD', 'fm', fm, 'N', 'C', 'H', 'W')
        _expect('SAD', 'fm_next', fm_next, len(fm), 'C', 'H', 'W')
        if fm_next.shape[2] > fm.shape[2] or fm_next.shape[3] > fm.shape[3]:
            raise ValueError(
                f'SAD: fm_next must not be larger than fm {tuple(fm.shape)}, got {tuple(fm_next.shape)}: '
                'the deeper map comes second'
            )
        energy = _full(fm).square().sum(dim=1)
        deeper = _full(fm_next.detach(), fm).square().sum(dim=1)
        if deeper.shape != energy.shape:
            deeper = F.interpolate(
                deeper[:, None], size=energy.shape[1:], mode='bilinear', align_corners=False
            )[:, 0]
        return F.mse_loss(*(F.softmax(g.flatten(1) / self.T, dim=1) for g in (energy, deeper)))


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


# ------------------------------------------ how the training scripts use it; a copied file may drop this


def feed(kd, s, t, batch):
    """Each stage from the next."""
    return sum(kd(x, y) for x, y in zip(s.fms[1:], s.fms[2:]))
