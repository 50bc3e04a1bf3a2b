"""MGD, masked generative distillation: rebuild the teacher's map from a part of the student's.

Z. Yang, Z. Li, M. Shao, D. Shi, Z. Yuan, C. Yuan, "Masked Generative Distillation", ECCV 2022,
arXiv:2205.01529.

    x = 1x1 convolution of fm_s where the channels differ, else fm_s
    mask = 0 with probability mask_ratio, else 1, drawn anew every step, per channel (or per position)
    g = 3x3 convolution, ReLU, 3x3 convolution of x * mask                       (trained with the student)
    loss = mean over n of sum over c, h, w of (g - fm_t)^2

Tap: the last stage's map; equal sizes. The sum makes the value 1e3 to 1e5, hence tiny weights: 0.0012 on
CIFAR-100, 7e-5 on ImageNet.

Differences: the authors' classification code, which masks channels; the paper and their detection code mask
positions (channel_mask=False). The weight is not part of the loss.

Source: yzd-v/MGD, cls/mmcls/distillation/losses/mgd.py (MGDLoss).

Use:
    >>> import torch
    >>> from mgd import MGD
    >>> fm_s, fm_t = torch.randn(8, 16, 8, 8, requires_grad=True), torch.randn(8, 32, 8, 8)
    >>> MGD(16, 32)(fm_s, fm_t).backward()
    >>> fm_s.grad.norm() > 0
    tensor(True)
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MGD(nn.Module):
    """Squared error of a teacher map generated from a masked student map.

    Args:
        s_channels, t_channels: channels of the two maps.
        mask_ratio: share of channels (positions) hidden; 0.15.
        channel_mask: hide whole channels, else positions.

    Shape:
        fm_s: (N, s_channels, H, W), fm_t: (N, t_channels, H, W). mask: (N, t_channels, 1, 1) or (N, 1, H, W)
        of 0 and 1 instead of a drawn one. generator: where to draw from. Returns a scalar. No gradient
        reaches fm_t.
        Computed in float32, or in float64 as the student.

    Raises:
        ValueError: mask_ratio is not in [0, 1); a map has other channels or sizes than announced; mask does
        not fit.
    """

    def __init__(
        self, s_channels: int, t_channels: int, mask_ratio: float = 0.15, channel_mask: bool = True
    ) -> None:
        super().__init__()
        if not 0 <= mask_ratio < 1:
            raise ValueError(f'MGD: mask_ratio must be in [0, 1), got {mask_ratio}')
        self.s_channels, self.t_channels = s_channels, t_channels
        self.mask_ratio, self.channel_mask = mask_ratio, channel_mask
        self.align = nn.Conv2d(s_channels, t_channels, kernel_size=1) if s_channels != t_channels else None
        self.generation = nn.Sequential(
            nn.Conv2d(t_channels, t_channels, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.Conv2d(t_channels, t_channels, kernel_size=3, padding=1),
        )

    def forward(
        self, fm_s: Tensor, fm_t: Tensor, mask: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        _expect('MGD', 'fm_s', fm_s, 'N', self.s_channels, 'H', 'W')
        _expect('MGD', 'fm_t', fm_t, len(fm_s), self.t_channels, *fm_s.shape[2:])
        n, _, h, w = fm_s.shape
        shape = (n, self.t_channels, 1, 1) if self.channel_mask else (n, 1, h, w)
        if mask is None:
            mask = torch.rand(shape, device=fm_s.device, **_by(generator)) >= self.mask_ratio
        else:
            _expect('MGD', 'mask', mask, *shape)
        with _no_autocast(fm_s):
            x, fm_t = _full(fm_s), _full(fm_t.detach(), fm_s)
            x = x if self.align is None else _run(self.align, x)
            return F.mse_loss(_run(self.generation, x * mask.to(x.dtype)), fm_t, reduction='sum') / n


def _by(generator: torch.Generator | None) -> dict:
    """Left out where there is none: torch.compile cannot pass None for a batch of another size."""
    return {} if generator is None else {'generator': generator}


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
