"""FCFD, function-consistent feature distillation: a good imitation must work inside the other network.

D. Liu, M. Kan, S. Shan, X. Chen, "Function-Consistent Feature Distillation", ICLR 2023, arXiv:2304.11832.

    bridge_k: convolution, batch norm: the student's map of stage k to the teacher's space, and one back
    A_k = sum over bridged maps b of mean over elements of (b - fm_t)^2;  at the last stage plus, for each,
          mean over n, c of (average over positions of ReLU(b) - that of ReLU(fm_t))^2
    mixed paths: the first stages of one network, a bridge, the later stages and classifier of the other
    KL(o) = T^2 * mean over n of KL(softmax(out_t / T) || softmax(o / T))
    loss = l2_weight * ramp * sum over k of A_k + KL(out_s) + sum over this step's mixed paths of KL(out_mix)

Tap: the maps between all stages; networks that can be run from the middle. Each step draws two of the paths
(student first or teacher first, switching after any inner stage). Gradients pass through the teacher's later
stages to the student. ramp rises over the first 20 of 240 epochs.

Differences: the authors' formula; their training loop cannot be run without their networks, so the test
vector was computed from the formula on given maps.

Source: formula only, as read from LiuDongyang6/FCFD, classification/models/meta.py (MetaModel) and
classification/cifar/main.py.

Use:
    >>> import torch
    >>> from fcfd import FCFD
    >>> out_s, out_t, mixed = torch.randn(8, 10, requires_grad=True), torch.randn(8, 10), [torch.randn(8, 10)]
    >>> fm_s, fm_t = torch.randn(8, 16, 4, 4, requires_grad=True), torch.randn(8, 32, 4, 4)
    >>> kd = FCFD([16], [32])
    >>> kd([[kd.to_teacher(fm_s, 1)]], [fm_t], out_s, out_t, mixed).backward()
    >>> fm_s.grad.norm() > 0
    tensor(True)
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FCFD(nn.Module):
    """Appearance and function errors; `to_teacher` and `to_student` are the bridges.

    Args:
        s_channels, t_channels: lists, channels of stages 1, 2, ... of the two networks.
        strides: student's size over teacher's per stage, each 1, 2 or 0.5; None: all 1.
        T: temperature, > 0; 4.
        l2_weight: weight of the appearance terms; 5 (0.02 for resnet56 to resnet20).
        s_post_relu, t_post_relu: whether that network's stages take maps after a ReLU; True.

    Shape:
        maps: list over stages of lists of maps in the teacher's space, each of the teacher map's shape;
        fms_t: list of the teacher's maps (N, C, H, W); out_s, out_t: (N, K); outs_mix: list of (N, K), may be
        empty. ramp: factor of the epoch. Returns a scalar. No gradient reaches fms_t and out_t. `appearance`
        gives one stage's A_k.
        Computed in float32, or in float64 as the student.

    Raises:
        ValueError: T is not positive; lists of unequal length; a stride is none of the three; shapes differ.
    """

    def __init__(
        self,
        s_channels: list,
        t_channels: list,
        strides: list | None = None,
        T: float = 4.0,
        l2_weight: float = 5.0,
        s_post_relu: bool = True,
        t_post_relu: bool = True,
    ) -> None:
        super().__init__()
        if not T > 0:
            raise ValueError(f'FCFD: T must be > 0, got {T}')
        strides = [1] * len(s_channels) if strides is None else strides
        if not len(s_channels) == len(t_channels) == len(strides):
            raise ValueError(
                f'FCFD: s_channels, t_channels and strides must have one length, '
                f'got {s_channels}, {t_channels} and {strides}'
            )
        self.T, self.l2_weight = T, l2_weight
        self.bridges_t = nn.ModuleList(
            _bridge(s, t, r, t_post_relu) for s, t, r in zip(s_channels, t_channels, strides)
        )
        self.bridges_s = nn.ModuleList(
            _bridge(t, s, 1 / r, s_post_relu) for s, t, r in zip(s_channels, t_channels, strides)
        )

    def to_teacher(self, fm_s: Tensor, k: int) -> Tensor:
        """The student's map of stage k = 1, 2, ... in the teacher's space."""
        bridge = self._of_stage(self.bridges_t, k, 'fm_s', fm_s)
        with _no_autocast(fm_s):
            return _run(bridge, _full(fm_s))

    def to_student(self, fm_t: Tensor, k: int) -> Tensor:
        """The teacher's map of stage k = 1, 2, ... in the student's space."""
        bridge = self._of_stage(self.bridges_s, k, 'fm_t', fm_t)
        with _no_autocast(fm_t):
            # the student is not here to ask: float64 if teacher and bridge agree on it
            like = next(bridge.parameters())
            return _run(bridge, _full(fm_t.detach(), like if fm_t.dtype == torch.float64 else fm_t))

    @staticmethod
    def _of_stage(bridges: nn.ModuleList, k: int, name: str, fm: Tensor) -> nn.Module:
        if not 1 <= k <= len(bridges):
            raise ValueError(f'FCFD: k must be in 1..{len(bridges)}, got {k}: stages count from 1')
        _expect('FCFD', name, fm, 'N', bridges[k - 1][0].in_channels, 'H', 'W')
        return bridges[k - 1]

    def forward(
        self,
        maps: list[list[Tensor]],
        fms_t: list[Tensor],
        out_s: Tensor,
        out_t: Tensor,
        outs_mix: list[Tensor],
        ramp: float = 1.0,
    ) -> Tensor:
        if len(maps) != len(fms_t) or not maps:
            raise ValueError(
                f'FCFD: maps and fms_t must be lists of one length, '
                f'got {len(maps)} and {len(fms_t)}: one per stage'
            )
        last = len(maps) - 1
        appearance = sum(self.appearance(b, fm_t, k == last) for k, (b, fm_t) in enumerate(zip(maps, fms_t)))
        divergence = sum(self.divergence(out, out_t) for out in (out_s, *outs_mix))
        return self.l2_weight * ramp * appearance + divergence

    def appearance(self, maps: list[Tensor], fm_t: Tensor, last: bool = False) -> Tensor:
        """A_k of one stage."""
        total = 0.0
        _expect('FCFD', 'fms_t', fm_t, 'N', 'C', 'H', 'W')
        for b in maps:
            _expect('FCFD', 'maps', b, *fm_t.shape)
            pair = _full(b), _full(fm_t.detach(), b)
            total = total + F.mse_loss(*pair)
            if last:
                total = total + F.mse_loss(*(x.relu().mean(dim=(2, 3)) for x in pair))
        return total

    def divergence(self, out: Tensor, out_t: Tensor) -> Tensor:
        """T^2 KL of softened probabilities, teacher's to the other's."""
        _expect('FCFD', 'out_s', out, 'N', 'K')
        _expect('FCFD', 'out_t', out_t, *out.shape)
        log_p = F.log_softmax(_full(out) / self.T, dim=1)
        log_q = F.log_softmax(_full(out_t.detach(), out) / self.T, dim=1)
        q = log_q.exp()
        return torch.where(q == 0, 0.0, q * (log_q - log_p)).sum(dim=1).mean() * self.T**2


class ghost_statistics:
    """`with ghost_statistics(net):` its batch norms, in training, leave their running statistics alone."""

    def __init__(self, net: nn.Module) -> None:
        norms = (m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))
        self.momenta = [(m, m.momentum) for m in norms]

    def __enter__(self) -> None:
        for m, _ in self.momenta:
            m.momentum = 0.0

    def __exit__(self, *_) -> None:
        for m, momentum in self.momenta:
            m.momentum = momentum


def _bridge(c_in: int, c_out: int, ratio: float, post_relu: bool) -> nn.Sequential:
    """From one network's map to the other's place; ratio: size of the input over size of the output."""
    if ratio == 1:
        conv = nn.Conv2d(c_in, c_out, 3, padding=1, bias=False)
    elif ratio == 2:
        conv = nn.Conv2d(c_in, c_out, 3, stride=2, padding=1)
    elif ratio == 0.5:
        conv = nn.ConvTranspose2d(c_in, c_out, 4, stride=2, padding=1)
    else:
        raise ValueError(f'FCFD: strides must be 1, 2 or 0.5, got {ratio}')
    if ratio >= 1:
        nn.init.kaiming_normal_(conv.weight, mode='fan_out', nonlinearity='relu')
    return nn.Sequential(conv, nn.BatchNorm2d(c_out), *([nn.LeakyReLU(0.1)] if post_relu else []))


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
    """Two random paths through both networks, beside the student's own."""
    last = len(s.fms) - 1
    maps = [[kd.to_teacher(s.fms[k], k)] for k in range(1, last + 1)]
    outs = []
    paths = [(student_first, k) for student_first in (True, False) for k in range(1, last)]
    for student_first, k in batch.rng.sample(paths, 2):
        if student_first:
            rest = batch.net_t.after(k, maps[k - 1][0])
            for stage, fm in zip(maps[k:], rest.fms):
                stage.append(fm)
        else:
            with ghost_statistics(batch.net_s):
                rest = batch.net_s.after(k, kd.to_student(t.fms[k], k))
        outs.append(rest.out)
    return kd(maps, t.fms[1:], s.out, t.out, outs, batch.inner)


def build(loss, probe, **options):
    s, t = probe.s.fms[1:], probe.t.fms[1:]
    scales = [x.shape[2] / y.shape[2] for x, y in zip(s, t)]
    # wide networks hand on their maps before the ReLU: a bridge to them must make negative values, too
    after_relu = {
        f'{side}_post_relu': not any(bool((fm < 0).any()) for fm in maps)
        for side, maps in (('s', s), ('t', t))
    }
    return loss([x.shape[1] for x in s], [x.shape[1] for x in t], scales, **{**after_relu, **options})
