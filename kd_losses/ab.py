"""AB, activation boundaries: make the student's neurons fire where the teacher's do, however strongly.

B. Heo, M. Lee, S. Yun, J. Y. Choi, "Knowledge Transfer via Distillation of Activation Boundaries Formed by
Hidden Neurons", AAAI 2019, arXiv:1811.03233.

    s = fm_s, or a batch norm of a 1x1 convolution of it (the connector) where the channels differ
    term = (s + margin)^2  where the teacher is off (t <= 0) and s > -margin
           (s - margin)^2  where it is on (t > 0) and s <= margin
           0               otherwise
    loss = mean over n, c, h, w of term

Tap: the maps BEFORE the ReLU at the end of each stage (after it, no value is negative and every 0 counts as
off); equal sizes. Two phases: the first trains with this loss alone and leaves the classifier untouched; the
second trains with cross-entropy alone and a new optimiser. Not a distance: the loss of a map against itself
is positive inside the margin.

Differences: the authors' element-wise loss. The mean over elements and margin 2 (set by train_kd.py) are
those of Knowledge-Distillation-Zoo; the authors sum over elements, divide by N (reduction='batchmean', margin
1) and weigh the stages, from the last, by 0.003 * (1, 1/2, 1/4). Their CIFAR script leaves the teacher in
training mode; ours is in eval mode. Afterwards it has soft targets alone (T = 3), ours cross-entropy alone.

Source: bhheo/AB_distillation, cifar10_AB_distillation.py (criterion_alternative_L2) for 'batchmean';
AberHu/Knowledge-Distillation-Zoo, kd_losses/ab.py for 'mean'.

Use:
    >>> import torch
    >>> from ab import AB
    >>> fm_s, fm_t = torch.randn(8, 16, 8, 8, requires_grad=True), torch.randn(8, 32, 8, 8)
    >>> AB(16, 32)(fm_s, fm_t).backward()
    >>> fm_s.grad.norm() > 0
    tensor(True)
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class AB(nn.Module):
    """Squared hinge that pushes each student neuron to the teacher's side of 0, by a margin.

    Args:
        s_channels, t_channels: channels of the two maps; a connector is built where they differ. None: equal.
        margin: distance to the boundary that is demanded, > 0; 1 (Knowledge-Distillation-Zoo 2).
        reduction: 'mean' over all elements, or 'batchmean', the sum over elements divided by N.

    Shape:
        fm_s: (N, s_channels, H, W), fm_t: (N, t_channels, H, W). Returns a scalar. No gradient reaches fm_t.
        Computed in float32, or in float64 as the student.

    Raises:
        ValueError: only one of the channels is given; margin or reduction is not legal; the maps do not fit.
    """

    def __init__(
        self,
        s_channels: int | None = None,
        t_channels: int | None = None,
        margin: float = 1.0,
        reduction: str = 'mean',
    ) -> None:
        super().__init__()
        if (s_channels is None) != (t_channels is None):
            raise ValueError(f'AB: give s_channels and t_channels or neither, got {s_channels}, {t_channels}')
        if not margin > 0:
            raise ValueError(f'AB: margin must be > 0, got {margin}')
        if reduction not in ('mean', 'batchmean'):
            raise ValueError(f'AB: reduction must be "mean" or "batchmean", got {reduction!r}')
        self.s_channels, self.margin, self.reduction = s_channels, margin, reduction
        self.connector = None
        if s_channels != t_channels:
            self.connector = nn.Sequential(
                nn.Conv2d(s_channels, t_channels, kernel_size=1, bias=False), nn.BatchNorm2d(t_channels)
            )
            nn.init.normal_(self.connector[0].weight, std=(2 / t_channels) ** 0.5)

    def forward(self, fm_s: Tensor, fm_t: Tensor) -> Tensor:
        _expect('AB', 'fm_s', fm_s, 'N', self.s_channels or 'C', 'H', 'W')
        t_channels = fm_s.shape[1] if self.connector is None else self.connector[0].out_channels
        _expect('AB', 'fm_t', fm_t, len(fm_s), t_channels, *fm_s.shape[2:])
        with _no_autocast(fm_s):
            s = _full(fm_s) if self.connector is None else _run(self.connector, _full(fm_s))
            with torch.no_grad():
                # a target that equals s where nothing is demanded: no masks, one fused kernel
                t = _full(fm_t, s)
                y = torch.where(t > 0, s.clamp(min=self.margin), s.clamp(max=-self.margin))
                hidden = 0 * t.sum()  # the comparison does not see NaN and inf
            if self.reduction == 'mean':
                return F.mse_loss(s, y) + hidden
            return F.mse_loss(s, y, reduction='sum') / len(s) + hidden


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


def build(loss, probe, **options):
    """One for each stage, with the margin of Knowledge-Distillation-Zoo."""
    for side, f in (('student', probe.s), ('teacher', probe.t)):
        if any((pre >= 0).all() and pre.any() for pre in f.pres[1:]):
            raise ValueError(
                f'AB: the {side} must give maps from before the ReLU, got one without a negative number: '
                f'name those layers, models.hooks.Tap(..., pres=[...])'
            )
    pairs = zip(probe.s.pres[1:], probe.t.pres[1:])
    return nn.ModuleList(loss(x.shape[1], y.shape[1], **{'margin': 2.0, **options}) for x, y in pairs)
