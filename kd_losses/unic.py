"""UNIC, several encoders into one: normalised targets, a ladder of projectors, the worst teacher first.

M. B. Sariyildiz, P. Weinzaepfel, T. Lucas, D. Larlus, Y. Kalantidis, "UNIC: Universal Classification Models
via Multi-teacher Distillation", ECCV 2024, arXiv:2408.05088.

    y = (x - m) / (s + eps) of each teacher's tensors, with statistics kept per channel; then
    m = (1 - r) * m + r * mean(x),  s = (1 - r) * s + r * (std(x) + eps)
    out = sum over stages of fc2(GELU(fc1(student's tensor)))    per teacher and kind (pooled map, positions)
    l = lam_cos * (1 - cos(out, y)) + lam_sl1 * mean over channels of smooth L1(out - y)
    L[i, n] = mean over the kinds of l of teacher i for image n      (positions averaged)
    keep[i, n] = 1 for the teacher with the largest L of an image, for others with probability 1 - drop
    loss = sum over i, n of keep * L / sum over i, n of keep

Tap: per stage the pooled map (N, C) and the positions (N, P, C), P alike for all; of each teacher one of
both. No labels. r falls along a cosine from 1 to 0.001, see `momentum`.

Differences: the authors' code, also where its comment says otherwise: an image with more teachers weighs
more. Ours: a channel that is constant is not divided by less than 1e-3; statistics skip a batch of one value
or of values that are not finite; nothing is dropped in eval mode.

Source: naver/unic, modeling/losses.py, modeling/teacher_dropping.py, modeling/unic.py and utils.py.

Use:
    >>> import torch
    >>> from unic import UNIC
    >>> cls_s, patch_s = torch.randn(8, 4, requires_grad=True), torch.randn(8, 9, 4, requires_grad=True)
    >>> clss_t, patches_t = [torch.randn(8, 6)], [torch.randn(8, 9, 6)]
    >>> UNIC([4], [6])([cls_s], [patch_s], clss_t, patches_t).backward()
    >>> cls_s.grad.norm() * patch_s.grad.norm() > 0
    tensor(True)
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class UNIC(nn.Module):
    """Cosine and smooth L1 distances to the normalised features of several encoders.

    Args:
        s_channels: widths of the student's stages, shallow to deep.
        t_dims: widths of the teachers.
        hidden, last_hidden: inner widths of the projectors; 768, of the last stage 3072.
        lam_cos, lam_sl1: weights of the two distances; 0.5 each.
        drop: probability to leave out a teacher that is not the worst of an image; 0.5.
        kinds: 'cls' (pooled maps), 'patch' (positions), or both.

    Shape:
        clss_s: list over stages of (N, C_b), patches_s: of (N, P, C_b), clss_t: list over teachers of
        (N, D_i), patches_t: of (N, P, D_i); None for a kind that is not in `kinds`. momentum: r of this step.
        keep: (teachers, N) instead of drawn. Returns a scalar, `losses` (teachers, N). No gradient reaches
        the teachers. Computed in float32, or in float64 as the student.

    Raises:
        ValueError: an argument is not legal; lists or shapes are wrong.
    """

    def __init__(
        self,
        s_channels: list[int],
        t_dims: list[int],
        hidden: int = 768,
        last_hidden: int = 3072,
        lam_cos: float = 0.5,
        lam_sl1: float = 0.5,
        drop: float = 0.5,
        kinds: tuple = ('cls', 'patch'),
    ) -> None:
        super().__init__()
        if not kinds or not set(kinds) <= {'cls', 'patch'} or not 0 <= drop <= 1:
            raise ValueError(
                f'UNIC: kinds of cls, patch and drop in [0, 1] are needed, got {kinds} and {drop}'
            )
        self.s_channels, self.t_dims, self.kinds = list(s_channels), list(t_dims), tuple(kinds)
        self.lam_cos, self.lam_sl1, self.drop = lam_cos, lam_sl1, drop
        inner = [hidden] * (len(s_channels) - 1) + [last_hidden]
        self.ladders = nn.ModuleDict(
            {
                kind: nn.ModuleList(
                    nn.ModuleList(_projector(c, width, d) for c, width in zip(s_channels, inner))
                    for d in t_dims
                )
                for kind in kinds
            }
        )
        self.norms = nn.ModuleDict({kind: nn.ModuleList(TeacherNorm(d) for d in t_dims) for kind in kinds})

    def forward(
        self,
        clss_s: list[Tensor] | None,
        patches_s: list[Tensor] | None,
        clss_t: list[Tensor] | None,
        patches_t: list[Tensor] | None,
        momentum: float = 0.001,
        generator: torch.Generator | None = None,
        keep: Tensor | None = None,
    ) -> Tensor:
        each = self.losses(clss_s, patches_s, clss_t, patches_t, momentum)
        if keep is None:
            keep = self.select(each, generator)
        _expect('UNIC', 'keep', keep, *each.shape)
        keep = keep.to(each.dtype)
        return (keep * each).sum() / keep.sum()

    def losses(self, clss_s, patches_s, clss_t, patches_t, momentum: float = 0.001) -> Tensor:
        """(teachers, N); in training mode the statistics are updated."""
        given = {'cls': (clss_s, clss_t), 'patch': (patches_s, patches_t)}
        made = []
        for kind in self.kinds:
            cosine, smooth = self.terms(kind, *given[kind], momentum)
            made.append(self.lam_cos * cosine + self.lam_sl1 * smooth)
        return sum(made) / len(made)

    def terms(self, kind: str, students: list[Tensor], teachers: list[Tensor], momentum: float = 0.001):
        """(teachers, N) cosine and smooth L1 distances of one kind, positions averaged."""
        self._check(kind, students, teachers)
        cosines, smooths = [], []
        for out, x, norm in zip(self.project(kind, students), teachers, self.norms[kind]):
            y = norm(_full(x.detach(), out), momentum)
            cosine = 1 - _cosine_rows(out, y)
            smooth = F.smooth_l1_loss(out, y, reduction='none').mean(dim=-1)
            cosines.append(cosine if kind == 'cls' else cosine.mean(dim=1))
            smooths.append(smooth if kind == 'cls' else smooth.mean(dim=1))
        return torch.stack(cosines), torch.stack(smooths)

    def project(self, kind: str, students: list[Tensor]) -> list[Tensor]:
        """The student's tensors as those of every teacher."""
        with _no_autocast(students[0]):
            return [
                sum(_run(step, _full(x, students[0])) for step, x in zip(ladder, students))
                for ladder in self.ladders[kind]
            ]

    def select(self, losses: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """(teachers, N) of 0 and 1: all in eval mode."""
        u = torch.ones_like(losses, requires_grad=False)
        if self.training and self.drop > 0:
            u = torch.rand(losses.shape, dtype=losses.dtype, device=losses.device, **_by(generator))
        worst = torch.zeros_like(u).scatter_(0, losses.detach().argmax(dim=0, keepdim=True), 1.0)
        return torch.maximum(worst, (u >= self.drop).to(u.dtype))

    def _check(self, kind, students, teachers) -> None:
        plural = {'cls': 'clss', 'patch': 'patches'}[kind]
        for side, given, widths in (('s', students, self.s_channels), ('t', teachers, self.t_dims)):
            if given is None or len(given) != len(widths):
                raise ValueError(
                    f'UNIC: {plural}_{side} must hold {len(widths)} tensors, got '
                    f'{None if given is None else len(given)}: one per stage or teacher'
                )
            for i, (x, width) in enumerate(zip(given, widths)):
                first = students[0].shape[: 1 if kind == 'cls' else 2]
                wanted = [length or letter for length, letter in zip(first, 'NP')]
                if len(wanted) < (1 if kind == 'cls' else 2):
                    wanted = ['N', 'P']
                _expect('UNIC', f'{plural}_{side}[{i}]', x, *wanted, width)


class TeacherNorm(nn.Module):
    """Shifts and scales a teacher's tensors by running statistics of its channels.

    Args:
        dim: channels.
        eps: added to the deviations; 1e-6.

    Shape:
        x: (..., dim); momentum: share of this batch in the statistics, which are updated after their use, in
        training mode. Returns x's shape.
    """

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.register_buffer('mean', torch.zeros(dim))
        self.register_buffer('std', torch.ones(dim))

    @torch.no_grad()
    def forward(self, x: Tensor, momentum: float) -> Tensor:
        mean, std = _full(self.mean, x), _full(self.std, x)
        y = (x - mean) / (std.clamp(min=1e-3) + self.eps)
        rows = x.flatten(0, -2)
        if self.training and len(rows) > 1:
            fine = torch.isfinite(rows).all()
            for kept, old, new in (
                (self.mean, mean, rows.mean(dim=0)),
                (self.std, std, rows.std(dim=0) + self.eps),
            ):
                kept.copy_(torch.where(fine, (1 - momentum) * old + momentum * new, old))
        return y


def momentum(step: int, steps: int, start: float = 1.0, end: float = 0.001) -> float:
    """r of a step: along a cosine from start to end."""
    return end + 0.5 * (start - end) * (1 + math.cos(math.pi * min(step / steps, 1.0)))


def _projector(c_in: int, hidden: int, c_out: int) -> nn.Sequential:
    made = nn.Sequential(nn.Linear(c_in, hidden), nn.GELU(), nn.Linear(hidden, c_out))
    for layer in (made[0], made[2]):
        nn.init.trunc_normal_(layer.weight, std=0.02)
        nn.init.zeros_(layer.bias)
    return made


def _cosine_rows(a: Tensor, b: Tensor) -> Tensor:
    """Cosines along the last axis; 0, without gradient, where a vector is 0."""
    units = []
    for x in (a, b):
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        dead = norm <= 1e-12  # NaN is not: it must show in the loss
        units.append(torch.where(dead, 0.0, x / torch.where(dead, 1.0, norm).clamp(min=1e-8)))
    return (units[0] * units[1]).sum(dim=-1)


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


def _no_autocast(x: Tensor) -> torch.autocast:
    """Matrix products and convolutions in the precision of their tensors; there is no autocast on meta."""
    return torch.autocast('cpu' if x.is_meta else x.device.type, enabled=False)


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


def _full(x: Tensor, like: Tensor | None = None) -> Tensor:
    """In float32, or float64 if the student (like) is. Inference tensors are copied, to serve backward."""
    x = x.double() if (x if like is None else like).dtype == torch.float64 else x.float()
    compiling = getattr(torch.compiler, 'is_compiling', bool)()  # torch 2.2 cannot tell: False
    return x.clone() if not compiling and x.is_inference() else x


# ------------------------------------------ how the training scripts use it; a copied file may drop this


def feed(ka, s, all_t, batch):
    """Pooled maps and positions of every stage, maps averaged to the size of the smallest one."""
    maps_s, maps_t = s.fms[1:], [t.fms[-1] for t in all_t]
    size = tuple(min(fm.shape[axis] for fm in [*maps_s, *maps_t]) for axis in (2, 3))
    clss = [[fm.mean(dim=(2, 3)) for fm in maps] for maps in (maps_s, maps_t)]
    patches = [[F.adaptive_avg_pool2d(fm, size).flatten(2).mT for fm in maps] for maps in (maps_s, maps_t)]
    each = ka.losses(clss[0], patches[0], clss[1], patches[1], momentum(batch.done, 1))
    generator = torch.Generator(each.device).manual_seed(batch.rng.getrandbits(60))
    keep = ka.select(each, generator)
    loss = (keep * each).sum() / keep.sum()
    return loss, {f'teacher{i}': row.mean() for i, row in enumerate(each, 1)}


def build(loss, probe, hidden=64, last_hidden=256, **options):
    """Projectors for small networks: the authors' are 768 and 3072 wide."""
    widths = ([fm.shape[1] for fm in probe.s.fms[1:]], [t.fms[-1].shape[1] for t in probe.all_t])
    return loss(*widths, hidden=hidden, last_hidden=last_hidden, **options)
