"""IKD, inner knowledge distillation: a pruned network regresses every block of the network it was cut from.

Y. Aflalo, A. Noy, M. Lin, I. Friedman, L. Zelnik, "Knapsack Pruning with Inner Distillation", 2020,
arXiv:2002.08258.

    P = linear map over channels where their number differs, else identity (trained with the student)
    loss = mean over all elements of (P(fm_s) - fm_t)^2

Tap: the output of every block or stage, one module each, averaged; equal sizes. The teacher is the network
before pruning; any pair of equal layout works. The authors weigh the mean by 0.2.

Differences: the authors' code; its linear layer on moved axes is a 1x1 convolution here.

Source: yoniaflalo/knapsack_pruning, external/utils_pruning.py (build_co_train_model).

Use:
    >>> import torch
    >>> from ikd import IKD
    >>> fm_s, fm_t = torch.randn(8, 16, 8, 8, requires_grad=True), torch.randn(8, 32, 8, 8)
    >>> IKD(16, 32)(fm_s, fm_t).backward()
    >>> fm_s.grad.norm() > 0
    tensor(True)
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class IKD(nn.Module):
    """Mean squared error of a linearly mapped student map, for one pair of blocks.

    Args:
        s_channels, t_channels: channels of the two maps.

    Shape:
        fm_s: (N, s_channels, H, W), fm_t: (N, t_channels, H, W). Returns a scalar. No gradient reaches fm_t.
        Computed in float32, or in float64 as the student.

    Raises:
        ValueError: a map has other channels than announced; batch or sizes differ.
    """

    def __init__(self, s_channels: int, t_channels: int) -> None:
        super().__init__()
        self.s_channels, self.t_channels = s_channels, t_channels
        self.projection = None
        if s_channels != t_channels:
            self.projection = nn.Conv2d(s_channels, t_channels, kernel_size=1, bias=False)

    def forward(self, fm_s: Tensor, fm_t: Tensor) -> Tensor:
        _expect('IKD', 'fm_s', fm_s, 'N', self.s_channels, 'H', 'W')
        _expect('IKD', 'fm_t', fm_t, len(fm_s), self.t_channels, *fm_s.shape[2:])
        with _no_autocast(fm_s):
            fm_s, fm_t = _full(fm_s), _full(fm_t.detach(), fm_s)
            return F.mse_loss(fm_s if self.projection is None else _run(self.projection, fm_s), fm_t)


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


def _run(module: nn.Module, x: Tensor, *more):
    """module(x, ...) in the precision of x, whatever half() or double() has made of the parameters."""
    if all(p.dtype == x.dtype for p in module.parameters()):
        return module(x, *more)
    state = {name: _full(p, x) for name, p in module.named_parameters()}
    state |= {name: _full(b, x) if b.is_floating_point() else b for name, b in module.named_buffers()}
    y = torch.func.functional_call(module, state, (x, *more))
    with torch.no_grad():
        for name, b in module.named_buffers():  # running statistics
            if b is not state[name]:  # a copy onto itself is a change, which backward would refuse
                b.copy_(state[name])
    return y


def _no_autocast(x: Tensor) -> torch.autocast:
    """Matrix products and convolutions in the precision of their tensors; there is no autocast on meta."""
    return torch.autocast('cpu' if x.is_meta else x.device.type, enabled=False)


def _full(x: Tensor, like: Tensor | None = None) -> Tensor:
    """In float32, or float64 if the student (like) is. Inference tensors are copied, to serve backward."""
    x = x.double() if (x if like is None else like).dtype == torch.float64 else x.float()
    compiling = getattr(torch.compiler, 'is_compiling', bool)()  # torch 2.2 cannot tell: False
    return x.clone() if not compiling and x.is_inference() else x
