"""ReviewKD, knowledge review: fuse the student's stages from deep to shallow, compare each with the teacher.

P. Chen, S. Liu, H. Zhao, J. Jia, "Distilling Knowledge via Knowledge Review", CVPR 2021, arXiv:2104.09044.

    from the deepest level i = L to 1, with the fused map y of the level below:
      x = batch norm of a 1x1 convolution of fms_s[i]
      a = sigmoid(1x1 conv of [x, y]), two channels
      y = x * a_1 + y * a_2 (y resized to x; the deepest level has y = x), resized to the teacher's map
      out_i = batch norm of a 3x3 convolution of y
    HCL(a, b) = weighted mean of the squared errors of the maps and of their averages on grids of 4, 2 and 1
                per side (only grids smaller than the map), with weights 1, 1/2, 1/4, 1/8
    loss = sum over levels of HCL(out_i, fms_t[i])

Tap: the maps of all stages and the pooled embedding as (N, D, 1, 1); student after its ReLUs, teacher before.
The modules are trained with the student. The authors raise the weight over the first 20 epochs.

Differences: the authors' CIFAR code; sizes come from the tensors, so maps need not be square.

Source: dvlab-research/ReviewKD, CIFAR-100/model/reviewkd.py (ABF, ReviewKD, hcl).

Use:
    >>> import torch
    >>> from reviewkd import ReviewKD
    >>> fms_s = [torch.randn(8, 16, 8, 8, requires_grad=True), torch.randn(8, 32, 4, 4)]
    >>> fms_t = [torch.randn(8, 64, 8, 8), torch.randn(8, 128, 4, 4)]
    >>> ReviewKD([16, 32], [64, 128])(fms_s, fms_t).backward()
    >>> fms_s[0].grad.norm() > 0
    tensor(True)
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ReviewKD(nn.Module):
    """Hierarchical context loss between fused student maps and teacher maps.

    Args:
        s_channels, t_channels: channels of every level, shallow to deep, equally many.
        mid_channels: width of the fusion; None means min(512, s_channels[-1]).

    Shape:
        fms_s, fms_t: lists of L maps, shallow to deep, (N, s_channels[i], H, W) and (N, t_channels[i], H',
        W'). Returns a scalar. No gradient reaches fms_t. `fuse` returns the L outputs, `terms` their losses.
        Computed in float32, or in float64 as the student.

    Raises:
        ValueError: the numbers of levels differ; mid_channels < 1; a map is not 4-D or has other channels
            than announced; the batch sizes differ.
    """

    def __init__(self, s_channels: list, t_channels: list, mid_channels: int | None = None) -> None:
        super().__init__()
        if len(s_channels) != len(t_channels):
            raise ValueError(
                f'ReviewKD: t_channels must have {len(s_channels)} levels, got {len(t_channels)}: '
                'tap as many stages of both'
            )
        mid = min(512, s_channels[-1]) if mid_channels is None else mid_channels
        if mid < 1:
            raise ValueError(f'ReviewKD: mid_channels must be 1 or more, got {mid_channels}')
        self.s_channels, self.t_channels = list(s_channels), list(t_channels)
        self.hcl = HCL()
        last = len(s_channels) - 1
        self.abfs = nn.ModuleList(
            ABF(c_s, mid, c_t, fuse=i < last) for i, (c_s, c_t) in enumerate(zip(s_channels, t_channels))
        )

    def forward(self, fms_s: list[Tensor], fms_t: list[Tensor]) -> Tensor:
        return sum(self.terms(fms_s, fms_t))

    def terms(self, fms_s: list[Tensor], fms_t: list[Tensor]) -> list[Tensor]:
        outs = self.fuse(fms_s, fms_t)
        return [self.hcl(out, t) for out, t in zip(outs, fms_t)]

    def fuse(self, fms_s: list[Tensor], fms_t: list[Tensor]) -> list[Tensor]:
        self._check('fms_s', fms_s, self.s_channels, (len(fms_s[0]) if len(fms_s) else 0) or 'N')
        self._check('fms_t', fms_t, self.t_channels, len(fms_s[0]))
        if self.training and any(fm[:, 0].numel() == 1 for fm in fms_s):  # torch would not say which
            raise ValueError(
                'ReviewKD: fms_s must hold more than 1 value per channel in training, for batch norm, '
                f'got {[tuple(fm.shape) for fm in fms_s]}: leave a last batch of one out, drop_last=True'
            )
        outs, y = [], None
        with _no_autocast(fms_s[0]):
            for abf, s, t in zip(reversed(self.abfs), reversed(fms_s), reversed(fms_t)):
                out, y = _run(abf, _full(s, fms_s[0]), y, t.shape[2:])
                outs.append(out)
        return outs[::-1]

    @staticmethod
    def _check(name: str, fms: list[Tensor], channels: list[int], n: int) -> None:
        if len(fms) != len(channels):
            raise ValueError(
                f'ReviewKD: {name} must hold {len(channels)} maps, got {len(fms)}: a list, one per level'
            )
        for fm, c in zip(fms, channels):
            _expect('ReviewKD', name, fm, n, c, 'H', 'W')


class HCL(nn.Module):
    """Squared error of two (N, C, H, W) maps and, with halved weights, of their averages on coarser grids."""

    def forward(self, fm_s: Tensor, fm_t: Tensor) -> Tensor:
        _expect('HCL', 'fm_s', fm_s, 'N', 'C', 'H', 'W')
        _expect('HCL', 'fm_t', fm_t, *fm_s.shape)
        fm_s, fm_t = _full(fm_s), _full(fm_t.detach(), fm_s)
        loss, weight, total = F.mse_loss(fm_s, fm_t), 1.0, 1.0
        for side in (4, 2, 1):
            if side < fm_s.shape[2]:
                weight /= 2
                total += weight
                pooled = F.adaptive_avg_pool2d(fm_s, side), F.adaptive_avg_pool2d(fm_t, side)
                loss = loss + weight * F.mse_loss(*pooled)
        return loss / total


class ABF(nn.Module):
    """Attention-based fusion of one level, fm_s, with the fused map y of the level below (None without fuse).

    Returns the output of the teacher's width and size (H, W), and the fused map for the next level up.
    """

    def __init__(self, s_channels: int, mid_channels: int, t_channels: int, fuse: bool) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(
            nn.Conv2d(s_channels, mid_channels, kernel_size=1, bias=False), nn.BatchNorm2d(mid_channels)
        )
        self.conv2 = nn.Sequential(
            nn.Conv2d(mid_channels, t_channels, kernel_size=3, padding=1, bias=False),
            nn.BatchNorm2d(t_channels),
        )
        self.att_conv = None
        if fuse:
            self.att_conv = nn.Sequential(nn.Conv2d(2 * mid_channels, 2, kernel_size=1), nn.Sigmoid())
        for conv in (self.conv1[0], self.conv2[0]):
            nn.init.kaiming_uniform_(conv.weight, a=1)

    def forward(self, fm_s: Tensor, y: Tensor | None, size: torch.Size) -> tuple[Tensor, Tensor]:
        x = self.conv1(fm_s)
        if self.att_conv is not None:
            y = F.interpolate(y, x.shape[2:])
            a = self.att_conv(torch.cat([x, y], dim=1))
            x = x * a[:, :1] + y * a[:, 1:]
        if x.shape[2:] != size:
            x = F.interpolate(x, size)
        return self.conv2(x), x


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
    return kd(_levels(s.fms, s), _levels(t.pres, t))


def build(loss, probe, **options):
    return loss(*([x.shape[1] for x in _levels(f.fms, f)] for f in (probe.s, probe.t)), **options)


def _levels(maps, f):
    """The stages' maps, and the embedding as a map."""
    return [*maps[1:], f.feat[:, :, None, None]]
