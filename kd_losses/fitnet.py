"""FitNet, hints: regress one of the teacher's feature maps.

A. Romero, N. Ballas, S. E. Kahou, A. Chassang, C. Gatta, Y. Bengio, "FitNets: Hints for Thin Deep Nets", ICLR
2015, arXiv:1412.6550.

    loss = mean over all elements of (r(fm_s) - fm_t)^2
    r = identity where the channels agree, else 1x1 convolution, batch norm, ReLU (trained with the student)

Tap: one map in the middle (RepDistiller, mdistiller: second stage) or at the end (Knowledge-Distillation-Zoo:
last stage, as this collection's trainer), after its ReLU; relu=False for a tap before it. Also takes
(N, D) embeddings of equal width.

Differences: the paper trains the student's lower half on the hint first and its code has half the squared
error summed over one axis; like every later zoo we add the plain mean to the cross-entropy. The regressor is
RepDistiller's for equal sizes; maps of different sizes are refused, not resized.

Source: AberHu/Knowledge-Distillation-Zoo, kd_losses/fitnet.py, and HobbitLong/RepDistiller,
distiller_zoo/FitNet.py and models/util.py (ConvReg); the authors' code, adri-romsor/FitNets, is Theano.

Use:
    >>> import torch
    >>> from fitnet import FitNet
    >>> fm_s, fm_t = torch.randn(8, 16, 8, 8, requires_grad=True), torch.randn(8, 32, 8, 8)
    >>> FitNet(16, 32)(fm_s, fm_t).backward()
    >>> fm_s.grad.norm() > 0
    tensor(True)
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FitNet(nn.Module):
    """Mean squared error between a (regressed) student map and a teacher map.

    Args:
        s_channels, t_channels: channels of the two maps. Omitted or equal: no regressor, no parameters.
        relu: end the regressor with a ReLU, as a tap after a ReLU wants.

    Shape:
        fm_s: (N, s_channels, H, W), fm_t: (N, t_channels, H, W); without a regressor any two equal shapes.
        Returns a scalar. No gradient reaches fm_t.
        Computed in float32, or in float64 as the student.

    Raises:
        ValueError: only one of the two channel counts is given; the shapes differ after the regressor.
    """

    def __init__(
        self, s_channels: int | None = None, t_channels: int | None = None, relu: bool = True
    ) -> None:
        super().__init__()
        if (s_channels is None) != (t_channels is None):
            raise ValueError(
                f'FitNet: give both or neither of s_channels and t_channels, '
                f'got {s_channels} and {t_channels}'
            )
        self.regressor = None
        if s_channels != t_channels:
            layers = [nn.Conv2d(s_channels, t_channels, kernel_size=1), nn.BatchNorm2d(t_channels)]
            self.regressor = nn.Sequential(*layers, nn.ReLU()) if relu else nn.Sequential(*layers)
            if not relu:  # another key: a state of the other form would load without a word
                self.register_buffer('no_relu', torch.ones(1))

    def forward(self, fm_s: Tensor, fm_t: Tensor) -> Tensor:
        wanted, t_channels = ('N', *'D' * (fm_s.dim() - 1 or 1)), fm_s.shape[1:2]
        if self.regressor is not None:
            wanted, t_channels = (
                ('N', self.regressor[0].in_channels, 'H', 'W'),
                [self.regressor[0].out_channels],
            )
        _expect('FitNet', 'fm_s', fm_s, *wanted)
        _expect('FitNet', 'fm_t', fm_t, len(fm_s), *t_channels, *fm_s.shape[2:])
        with _no_autocast(fm_s):
            fm_s, fm_t = _full(fm_s), _full(fm_t.detach(), fm_s)
            return F.mse_loss(fm_s if self.regressor is None else _run(self.regressor, fm_s), fm_t)


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
    """No ReLU in front of a map with negative values, as wide networks and MobileNetV2 hand on."""
    fm_t = probe.t.fms[-1]
    relu = {'relu': not bool((fm_t < 0).any())}
    return loss(probe.s.fms[-1].shape[1], fm_t.shape[1], **{**relu, **options})
