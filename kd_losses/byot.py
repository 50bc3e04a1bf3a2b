"""BYOT, be your own teacher: exits after earlier stages learn from the network's own end.

L. Zhang, J. Song, A. Gao, J. Chen, C. Bao, K. Ma, "Be Your Own Teacher: Improve the Performance of
Convolutional Neural Networks via Self Distillation", ICCV 2019, arXiv:1905.08094.

    index 0: the deepest classifier, 1, 2, ...: exits, shallower and shallower
    H_i = - mean over n of sum over k of softmax(outs[0] / T) * log softmax(outs[i] / T)
    F_i = Euclidean length, over the whole batch, of (A_i * feats[i] - feats[0]);  A_i is learned
    loss = CE(outs[0]) + sum over i > 0 of [(1 - alpha) * CE(outs[i]) + alpha * H_i + beta * F_i]

Tap: logits and pooled features of all classifiers. What comes from index 0 is a target and gets no gradient
in H and F. No teacher. Contains its cross-entropy. The exits may be kept or dropped.

Differences: the authors' code leaves F_1 out, against its own comment; skip=(1,) does that. As in their code
there is no T^2, and F is the length itself, not its square.

Source: ArchipLab-LinfengZhang/pytorch-self-distillation-final, train.py and resnet.py, with skip=(1,); all
exits: formula only.

Use:
    >>> import torch
    >>> from byot import BYOT
    >>> outs = [torch.randn(8, 10, requires_grad=True) for _ in range(3)]  # the deepest classifier first
    >>> feats = [torch.randn(8, 64), torch.randn(8, 32), torch.randn(8, 16)]
    >>> BYOT([64, 32, 16])(outs, feats, torch.arange(8)).backward()
    >>> outs[1].grad.norm() > 0
    tensor(True)
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class BYOT(nn.Module):
    """Cross-entropy, soft targets and features for every exit.

    Args:
        feat_dims: list of the widths of feats, the deepest first.
        T: temperature, > 0; 3.
        alpha: share of the soft targets at an exit; 0.3.
        beta: weight of the features; 0.03.
        skip: indices of exits without the feature term; none.

    Shape:
        outs: list of L tensors (N, K); feats: list of L tensors (N, feat_dims[i]); target: (N,) labels.
        Returns a scalar. `terms` returns the sums (hard, soft, features), weights included.
        Rows of label -100 are left out. Computed in float32, or in float64 as the student.

    Raises:
        ValueError: T is not positive; lists of another length; shapes differ.
    """

    def __init__(
        self, feat_dims: list, T: float = 3.0, alpha: float = 0.3, beta: float = 0.03, skip: tuple = ()
    ) -> None:
        super().__init__()
        if not T > 0:
            raise ValueError(f'BYOT: T must be > 0, got {T}')
        self.feat_dims, self.T, self.alpha, self.beta, self.skip = (
            list(feat_dims),
            T,
            alpha,
            beta,
            tuple(skip),
        )
        self.adapt = nn.ModuleList(nn.Linear(d, feat_dims[0]) for d in feat_dims[1:])

    def forward(self, outs: list[Tensor], feats: list[Tensor], target: Tensor) -> Tensor:
        return sum(self.terms(outs, feats, target))

    def terms(self, outs: list[Tensor], feats: list[Tensor], target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        target, valid = self._check(outs, feats, target)
        with _no_autocast(outs[0]):
            (out, *outs), (feat, *feats) = [_full(x) for x in outs], [_full(x) for x in feats]
            hard = _ce(out, target, valid)
            lengths = torch.zeros_like(hard)
            hard = hard + (1 - self.alpha) * sum(_ce(z, target, valid) for z in outs)
            q = F.softmax(out.detach() / self.T, dim=1)  # one for all exits: their logarithms are summed
            log_p = sum(F.log_softmax(z / self.T, dim=1) for z in outs)
            soft = -self.alpha * _per_sample(torch.where(q == 0, 0.0, q * log_p), valid)
            goal = feat.detach()
            for i, (shallow, adapt) in enumerate(zip(feats, self.adapt), 1):
                if i not in self.skip:
                    gap = _run(adapt, shallow) - goal
                    gap = gap if valid is None else torch.where(valid[:, None], gap, 0.0)
                    lengths = lengths + torch.linalg.vector_norm(gap)
            return hard, soft, self.beta * lengths

    def _check(self, outs: list[Tensor], feats: list[Tensor], target: Tensor) -> tuple[Tensor, Tensor]:
        if len(outs) != len(self.feat_dims) or len(feats) != len(outs):
            got = f'{len(outs)} and {len(feats)}'
            raise ValueError(
                f'BYOT: outs and feats must hold {len(self.feat_dims)} tensors, got {got}: one per feat_dims'
            )
        for i, (out, feat, width) in enumerate(zip(outs, feats, self.feat_dims)):
            _expect('BYOT', f'outs[{i}]', out, *(('N', 'K') if i == 0 else outs[0].shape))
            _expect('BYOT', f'feats[{i}]', feat, len(out), width)
        return _labels('BYOT', target, *outs[0].shape)


class BYOTStudent(nn.Module):
    """A network with an exit after every stage but the last; in use without them.

    An exit is a depthwise-separable convolution per remaining stage, with its stride and channels, an average
    over positions, and a linear classifier.

    Args:
        net: `net(x, True)` gives (out, feat, fms, pres, extra).
        shapes: (C, H, W) of the maps of all stages, shallow to deep.
        num_classes: K.

    Shape:
        x: (N, 3, H, W). Returns logits; with True the network's tuple, its `extra` (outs, feats), the deepest
        classifier first, as BYOT wants them.
    """

    def __init__(self, net: nn.Module, shapes: list, num_classes: int) -> None:
        super().__init__()
        self.net, self.exits, self.heads = net, nn.ModuleList(), nn.ModuleList()
        for k in range(len(shapes) - 1):
            steps = [_separable(a, b) for a, b in zip(shapes[k:], shapes[k + 1 :])]
            self.exits.append(nn.Sequential(*steps))
            self.heads.append(nn.Linear(shapes[-1][0], num_classes))

    def deployed(self) -> nn.Module:
        """What is kept after training."""
        return self.net

    def forward(self, x: Tensor, feats: bool = False):
        f = self.net(x, True)
        if not feats:
            return f.out
        stages = f.fms[-1 - len(self.exits) : -1]
        ends = [exit(fm).mean(dim=(2, 3)) for exit, fm in zip(self.exits, stages)]
        outs = [head(end) for head, end in zip(self.heads, ends)]
        return f._replace(extra=([f.out, *outs[::-1]], [f.feat, *ends[::-1]]))


def _separable(a: tuple, b: tuple) -> nn.Sequential:
    """From a map (C, H, W) to one of the next stage's channels and size."""
    stride = max(round(a[1] / b[1]), 1)
    return nn.Sequential(
        *(nn.Conv2d(a[0], a[0], 3, stride, 1, groups=a[0], bias=False), nn.BatchNorm2d(a[0]), nn.ReLU()),
        *(nn.Conv2d(a[0], b[0], 1, bias=False), nn.BatchNorm2d(b[0]), nn.ReLU()),
    )


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


def _labels(who: str, target: Tensor, n: int, K: int, name: str = 'target') -> tuple[Tensor, Tensor | None]:
    """n labels of 0..K-1 as int64, and which rows count, None for all: not those of -100, which are 0 then.

    Other labels are refused, but on a GPU, where looking at them would wait, only by the kernels.
    """
    _expect(who, name, target, n)
    if target.is_floating_point():
        raise ValueError(f'{who}: {name} must be ({n},) of integers, got {target.dtype}: {name}.long()')
    target, compiling = target.long(), getattr(torch.compiler, 'is_compiling', bool)()
    if not compiling and target.is_inference():  # what a teacher says under inference_mode: for backward
        target = target.clone()
    if target.device.type == 'cpu' and not compiling:
        (lowest,), (highest,) = (y.tolist() for y in target.aminmax(dim=0, keepdim=True))
        if lowest >= 0 and highest < K:
            return target, None
        for y in target.tolist():
            if y != -100 and not 0 <= y < K:
                raise ValueError(f'{who}: {name} must be in 0..{K - 1}, or -100 to leave a row out, got {y}')
    valid = target != -100
    return torch.where(valid, target, 0), valid


def _ce(out: Tensor, target: Tensor, valid: Tensor | None) -> Tensor:
    """Cross-entropy, the mean over the rows that count."""
    if valid is None:
        return F.cross_entropy(out, target)
    return _mean(F.cross_entropy(out, target, reduction='none'), valid)


def _per_sample(x: Tensor, valid: Tensor | None, axis: int = 0) -> Tensor:
    """The sum over all axes but that of the samples, and the mean over the samples that count."""
    if valid is None:
        return x.sum() / x.shape[axis]
    return _mean(x.movedim(axis, 0).flatten(1).sum(dim=1), valid)


def _mean(rows: Tensor, valid: Tensor | None) -> Tensor:
    """Over the rows (N, ...) that count; 0 if none does."""
    if valid is None:
        return rows.mean(dim=0)
    counts = valid.reshape(-1, *[1] * (rows.dim() - 1))
    return torch.where(counts, rows, 0.0).sum(dim=0) / valid.sum().clamp(min=1)


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
    return kd(*s.extra, batch.target)


def build(loss, probe, **options):
    stages = len(probe.s.fms) - 1
    return loss([probe.s.feat.shape[1]] + [probe.s.fms[-1].shape[1]] * (stages - 1), **options)


def student(net, kd, probe):
    return BYOTStudent(net, [x.shape[1:] for x in probe.s.fms[1:]], probe.num_classes)
