"""CAMKD, confidence-aware teachers: those that are right about an image teach more of it.

H. Zhang, D. Chen, C. Wang, "Confidence-Aware Multi-Teacher Knowledge Distillation", ICASSP 2022,
arXiv:2201.00007.

    c_mn = CE(outs_t[m, n], target[n])
    w_mn = (1 - softmax over m of c_mn) / (M - 1)                            (of one image they sum to 1)
    KD = mean over m and n of w_mn * T^2 * KL(softmax(outs_t[m, n] / T) || softmax(out_s[n] / T))
    w'_mn = the same of CE(outs_feat[m, n], target[n])
    FEAT = mean over m and n of w'_mn * mean over C, H, W of (fms_s[m] - fms_t[m])^2
    loss = KD + beta * FEAT

fms_s[m] is the student's last map as adapter m makes it (size of teacher m's map, 1x1 convolution, batch
norm, ReLU), outs_feat[m] what teacher m's own classifier says of it. The gradient also flows through w'.

Tap: logits, last maps, labels, the teachers' classifiers. Forward is KD; `feature_loss` is FEAT.

Differences: the authors' code divides by M although the weights of an image sum to 1 already; kept, since
beta = 50 belongs to it (the paper does not divide, from memory, unverified). Their loop resizes the student's
map again and again, so a teacher sees it at the sizes of those before it; here each resize starts from the
original. FEAT is off in the first epoch, as there.

Source: Rorozhl/CA-MKD, distiller_zoo/CAMKD.py, helper/loops.py and models/util.py.

Use:
    >>> import torch
    >>> from camkd import CAMKD
    >>> out_s, outs_t = torch.randn(8, 10, requires_grad=True), [torch.randn(8, 10) for _ in range(3)]
    >>> CAMKD()(out_s, outs_t, torch.arange(8)).backward()
    >>> out_s.grad.norm() > 0
    tensor(True)
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class CAMKD(nn.Module):
    """Soft targets and maps of several teachers, weighed by how well each predicts the label.

    Args:
        T: temperature of the soft targets, > 0; 4.
        beta: weight of the maps where a training adds both terms, see feed; 50.

    Shape:
        out_s: (N, K); outs_t: list of M >= 2 tensors (N, K), or stacked (M, N, K); target: (N,) labels.
        Returns a scalar. No gradient reaches outs_t. Rows of label -100 are left out.
        `feature_loss(fms_s, fms_t, outs_feat, target)`: lists of M maps (N, C_m, H_m, W_m), the student's
        adapted (see FeatureAdapters), of M maps of the teachers, of M logits (N, K). `weights(outs, target)`
        returns (M, N). Computed in float32, or in float64 as the student.

    Raises:
        ValueError: T is not positive; there are fewer than two teachers; shapes or labels are wrong.
    """

    def __init__(self, T: float = 4.0, beta: float = 50.0) -> None:
        super().__init__()
        if not T > 0:
            raise ValueError(f'CAMKD: T must be > 0, got {T}')
        self.T, self.beta = T, beta

    def forward(self, out_s: Tensor, outs_t: list[Tensor], target: Tensor) -> Tensor:
        outs_t = _teachers('CAMKD', out_s, outs_t, least=2)
        w = self.weights(outs_t, target)
        _, valid = _labels('CAMKD', target, *out_s.shape)
        log_q = F.log_softmax(_full(out_s) / self.T, dim=1)
        kl = _kl(F.log_softmax(outs_t / self.T, dim=2), log_q).sum(dim=2) * self.T**2
        return _mean((w * kl).mean(dim=0), valid)

    def feature_loss(
        self, fms_s: list[Tensor], fms_t: list[Tensor], outs_feat: list[Tensor], target: Tensor
    ) -> Tensor:
        for name, given in (('fms_s', fms_s), ('outs_feat', outs_feat)):
            if len(given) != len(fms_t) or len(fms_t) < 2:
                raise ValueError(
                    f'CAMKD: {name} must hold a tensor per teacher, two or more, got {len(given)} for '
                    f'{len(fms_t)} teachers: see FeatureAdapters'
                )
        for i, (x, y, z) in enumerate(zip(fms_s, fms_t, outs_feat)):
            _expect('CAMKD', f'fms_s[{i}]', x, 'N', 'C', 'H', 'W')
            _expect('CAMKD', f'fms_t[{i}]', y, *x.shape)
            _expect('CAMKD', f'outs_feat[{i}]', z, len(x), outs_feat[0].shape[-1])
        outs_feat = torch.stack([_full(z) for z in outs_feat])
        _, valid = _labels('CAMKD', target, *outs_feat.shape[1:])
        w = self.weights(outs_feat, target)
        errors = [
            (_full(x) - _full(y.detach(), x)).square().mean(dim=(1, 2, 3)) for x, y in zip(fms_s, fms_t)
        ]
        return _mean((w * torch.stack(errors)).mean(dim=0), valid)

    @staticmethod
    def weights(outs: Tensor, target: Tensor) -> Tensor:
        """(M, N, K) logits, (N,) labels -> (M, N)."""
        target, _ = _labels('CAMKD', target, *outs.shape[1:])
        ce = torch.stack([F.cross_entropy(z, target, reduction='none') for z in outs])
        ce = torch.where(ce == torch.inf, 1e4, ce)  # who excludes the right class has no weight beside others
        return (1 - ce.softmax(dim=0)) / (len(outs) - 1)


class FeatureAdapters(nn.Module):
    """The student's last map as each teacher's: its size, then 1x1 convolution, batch norm, ReLU.

    Args:
        s_channels: channels of the student's map.
        t_channels: those of every teacher's.

    Shape:
        fm_s: (N, s_channels, H, W); sizes: of the teachers' maps. Returns a list of maps.
    """

    def __init__(self, s_channels: int, t_channels: list[int]) -> None:
        super().__init__()
        self.s_channels = s_channels
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Conv2d(s_channels, c, 1, bias=False), nn.BatchNorm2d(c), nn.ReLU())
            for c in t_channels
        )

    def forward(self, fm_s: Tensor, sizes: list[tuple[int, int]]) -> list[Tensor]:
        _expect('FeatureAdapters', 'fm_s', fm_s, 'N', self.s_channels, 'H', 'W')
        if len(sizes) != len(self.layers):
            raise ValueError(
                f'FeatureAdapters: sizes must hold {len(self.layers)} pairs, got {len(sizes)}: '
                'one per teacher'
            )
        with _no_autocast(fm_s):
            return [
                _run(layer, _resized(_full(fm_s), tuple(size))) for layer, size in zip(self.layers, sizes)
            ]


def _resized(fm: Tensor, size: tuple[int, int]) -> Tensor:
    """Averaged if it is larger, interpolated if it is smaller."""
    if fm.shape[2:] == size:
        return fm
    if fm.shape[2] > size[0] or fm.shape[3] > size[1]:
        return F.adaptive_avg_pool2d(fm, size)
    return F.interpolate(fm, size=size, mode='bilinear', align_corners=False)


def _teachers(who: str, out_s: Tensor, outs_t: list[Tensor] | Tensor, least: int = 1) -> Tensor:
    """Logits of all teachers in one tensor (M, N, K), detached, in the precision of the student."""
    _expect(who, 'out_s', out_s, 'N', 'K')
    if len(outs_t) < least:
        raise ValueError(
            f'{who}: outs_t must hold {least} or more tensors, got {len(outs_t)}: give one per teacher'
        )
    for i, z in enumerate(outs_t):
        _expect(who, f'outs_t[{i}]', z, *out_s.shape)
    return torch.stack([_full(z.detach(), out_s) for z in outs_t])


def _kl(log_p_t: Tensor, log_p_s: Tensor, on_host: bool = False) -> Tensor:
    """p_t (log p_t - log p_s), and 0 where p_t is 0 whatever the logarithms are.

    on_host: p_t may be looked at, as labels on the CPU were: the mask, a third of the time, only if needed.
    """
    p_t = log_p_t.exp()
    kl = p_t * (log_p_t - log_p_s)
    if on_host and p_t.amin().view(1).tolist()[0] > 0:  # not with NaN
        return kl
    return torch.where(p_t == 0, 0.0, kl)


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


def _mean(rows: Tensor, valid: Tensor | None) -> Tensor:
    """Over the rows (N, ...) that count; 0 if none does."""
    if valid is None:
        return rows.mean(dim=0)
    counts = valid.reshape(-1, *[1] * (rows.dim() - 1))
    return torch.where(counts, rows, 0.0).sum(dim=0) / valid.sum().clamp(min=1)


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


def feed(kd, s, t, batch):
    """batch.inner: 0 in the first epoch, when the maps do not count yet."""
    fm_s, *fms_t = (
        f.pres[-1].relu() if sums else f.fms[-1] for f, sums in zip((s, *batch.all_t), kd.sums)
    )  # as they are averaged for the classifier
    fms_s = kd.adapters(fm_s, [fm.shape[2:] for fm in fms_t])
    outs_feat = []
    with _no_autocast(fms_s[0]):
        for layer, fm in zip([net.classifier_layer() for net in batch.nets_t], fms_s):
            weight, bias = (None if x is None else _full(x.detach(), fm) for x in (layer.weight, layer.bias))
            outs_feat.append(F.linear(fm.mean(dim=(2, 3)), weight, bias))
    soft = kd(s.out, [f.out for f in batch.all_t], batch.target)
    return soft + batch.inner * kd.beta * kd.feature_loss(fms_s, fms_t, outs_feat, batch.target)


def build(loss, probe, **options):
    kd = loss(**options)
    kd.adapters = FeatureAdapters(probe.s.fms[-1].shape[1], [f.fms[-1].shape[1] for f in probe.all_t])
    kd.sums = [_sums(f) for f in (probe.s, *probe.all_t)]
    return kd


def _sums(f) -> bool:
    """Whether the last map is before a ReLU, as a wide network's: not after it, and not without one."""
    return bool((f.fms[-1] < 0).any()) and not torch.equal(f.fms[-1], f.pres[-1])
