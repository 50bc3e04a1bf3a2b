"""FGFI, fine-grained feature imitation: the student's map imitates the teacher's where objects nearly are.

T. Wang, L. Yuan, X. Zhang, J. Feng, "Distilling Object Detectors with Fine-grained Feature Imitation", CVPR
2019, arXiv:1906.03609.

    a position is imitated if, for any box b, an anchor there has an overlap with b greater than
        threshold * the largest overlap of any anchor with b                         (imitation_mask)
    N_p = number of imitated positions of the batch
    loss = 1 / (2 * N_p) * sum over them and the channels of (adapter(fm_s) - fm_t)^2,  0 if there is none

Tap: the map that the region proposal network reads. Its own last ReLU: relu=True; maps of a feature pyramid,
which are signed: relu=False, one instance and one call per level, each with its level's anchors, losses
summed. Weight 0.01, after 400 steps without. The adapter is trained with the student; masks need no
network.

Differences: pyramids are ours, the authors have one level. They divide by 0 where no position is imitated.
pixel=1 is their overlap, in which a box from 3 to 3 is one pixel wide; 0 for continuous boxes (torchvision,
COCO).

Source: twangnh/Distilling-Object-Detectors, lib/model/rpn/anchor_target_layer.py and trainval_net_sup.py.

Use:
    >>> import torch
    >>> from fgfi import FGFI, imitation_mask
    >>> fm_s, fm_t = torch.randn(2, 4, 8, 8, requires_grad=True), torch.randn(2, 6, 8, 8).relu()
    >>> FGFI(4, 6)(fm_s, fm_t, torch.rand(2, 8, 8) < 0.5).backward()
    >>> fm_s.grad.norm() > 0
    tensor(True)
"""

import torch
from torch import Tensor, nn


class FGFI(nn.Module):
    """Half the squared error at the imitated positions, summed over the channels.

    Args:
        s_channels, t_channels: channels of the two maps.
        relu: the adapter ends with a ReLU, as the teacher's map does.

    Shape:
        fm_s: (N, s_channels, H, W), fm_t: (N, t_channels, H, W), mask: (N, H, W) or (N, 1, H, W), bool or 0
        and 1; all may be 0. Returns a scalar. No gradient reaches fm_t.
        Computed in float32, or in float64 as the student.

    Raises:
        ValueError: a map has other channels or another size than announced; mask does not fit.
    """

    def __init__(self, s_channels: int, t_channels: int, relu: bool = True) -> None:
        super().__init__()
        self.s_channels, self.t_channels = s_channels, t_channels
        conv = nn.Conv2d(s_channels, t_channels, kernel_size=3, padding=1)
        nn.init.trunc_normal_(conv.weight, std=1e-4, a=-2e-4, b=2e-4)
        nn.init.zeros_(conv.bias)
        self.adapter = nn.Sequential(conv, nn.ReLU()) if relu else nn.Sequential(conv)

    def forward(self, fm_s: Tensor, fm_t: Tensor, mask: Tensor) -> Tensor:
        _expect('FGFI', 'fm_s', fm_s, 'N', self.s_channels, 'H', 'W')
        n, _, *size = fm_s.shape
        _expect('FGFI', 'fm_t', fm_t, n, self.t_channels, *size)
        _expect('FGFI', 'mask', mask, *((n, 1, *size) if mask.dim() == 4 else (n, *size)))
        with _no_autocast(fm_s):
            x, fm_t = _full(fm_s), _full(fm_t.detach(), fm_s)
            mask = _full(mask.detach().reshape(n, *size), fm_s)
            hidden = 0 * x.detach().sum()  # the ReLU may swallow an inf, which must show
            error = (_run(self.adapter, x) - fm_t).square().sum(dim=1)
            return (mask * error).sum() / (2 * mask.sum().clamp(min=1)) + hidden


def imitation_mask(anchors: Tensor, boxes: Tensor, threshold: float = 0.5, pixel: float = 1.0) -> Tensor:
    """Which positions of a picture's map are imitated: (H, W) bool.

    anchors: (H, W, A, 4) x1 y1 x2 y2; boxes: (B, 4), B may be 0; threshold: share of the best overlap; pixel:
    added to lengths.
    """
    _expect('FGFI', 'anchors', anchors, 'H', 'W', 'A', 4)
    if tuple(boxes.shape) == (0, 4):
        return torch.zeros(anchors.shape[:2], dtype=torch.bool, device=anchors.device)
    _expect('FGFI', 'boxes', boxes, 'B', 4)
    a = _full(anchors).flatten(0, 2)[:, None]
    b = _full(boxes, a)
    both = torch.minimum(a[..., 2:], b[:, 2:]) - torch.maximum(a[..., :2], b[:, :2]) + pixel
    both = both.clamp(min=0).prod(dim=2)
    area_a, area_b = ((x[..., 2:] - x[..., :2] + pixel).prod(dim=-1) for x in (a, b))
    overlap = both / (area_a + area_b - both).clamp(min=1e-6)
    near = overlap > threshold * overlap.amax(dim=0)
    return near.view(*anchors.shape[:3], -1).flatten(2).any(dim=2)


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


# ------------------------------------------ how the training scripts use it; a copied file may drop this


def feed(kd, s, t, batch):
    loss = 0.0
    for k, x, y, anchors in zip(kd, s.fms, t.fms, s.anchors_of_levels()):
        loss = loss + k(
            x, y, torch.stack([imitation_mask(anchors, boxes, pixel=0.0) for boxes in batch.boxes])
        )
    return loss


def build(loss, probe, **options):
    widths = ((x.shape[1], y.shape[1]) for x, y in zip(probe.s.fms, probe.t.fms))
    return nn.ModuleList(loss(*pair, **{'relu': False, **options}) for pair in widths)
