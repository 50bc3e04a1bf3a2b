"""RADIO, several foundation models into one: pooled embeddings and maps of each, every one on its own scale.

M. Ranzinger, G. Heinrich, J. Kautz, P. Molchanov, "AM-RADIO: Agglomerative Vision Foundation Model - Reduce
All Domains Into One", CVPR 2024, arXiv:2312.06709; M. Ranzinger, J. Barker, G. Heinrich, P. Molchanov, B.
Catanzaro, A. Tao, "PHI-S: Distribution Balancing for Label-Free Multi-Teacher Distillation", arXiv:2410.01680
(2024).

    head = Linear, inner times x + Linear(GELU(LayerNorm(x))), then Linear(GELU(LayerNorm(x)))
    S_i = 1 - mean over n of cos(head_i(feat_s), feats_t[i])
    y_i = PHIS_i(fms_t[i]), student's map and y_i at the smaller size, a = head'_i(student's positions)
    feature 'balanced': F_i = (1 - w_l1) * (1 - mean cos(a, y_i)) + w_l1 * mean smooth L1(a - y_i, beta 2)
    feature 'mse':      F_i = mean (a - y_i)^2
    loss = sum over i of [w_summary_i * S_i + w_feature_i * F_i]
    PHIS(x) = W (x - mean), W = Hadamard / sqrt(C) * V' / sqrt(mean of L), V diag(L) V' = covariance of x

After PHI-S all channels have variance 1 over the calibration images, and distances are only scaled.

Tap: pooled embedding and last map of the student and of every teacher (None: a teacher lacks it). No labels.

Differences: the authors have published no training code; this follows their heads and PHI-S, and NVIDIA's
re-use of the trainer for the losses. There PHI-S is estimated anew every 100 batches, here once. Weights 0.9
and 0.1 of the paper from memory, unverified.

Source: NVlabs/RADIO, radio/adaptor_mlp.py and examples/common/phi_s.py; NVIDIA/tao_pytorch_backend,
nvidia_tao_pytorch/cv/classification_pyt/distillation/loss.py.

Use:
    >>> import torch
    >>> from radio import RADIO
    >>> feat_s, fm_s = torch.randn(8, 4, requires_grad=True), torch.randn(8, 4, 6, 6, requires_grad=True)
    >>> feats_t, fms_t = [torch.randn(8, 6), torch.randn(8, 7)], [torch.randn(8, 8, 6, 6), None]
    >>> loss = RADIO(4, 4, [6, 7], [8, None], hidden=16)
    >>> loss.calibrate(fms_t)
    >>> loss.fit()
    >>> loss(feat_s, fm_s, feats_t, fms_t).backward()
    >>> fm_s.grad.norm() > 0
    tensor(True)
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RADIO(nn.Module):
    """Heads from the student to every teacher, and the distances of what they give.

    Args:
        s_dim, s_channels: widths of the student's embedding and map.
        t_dims, t_channels: lists, of every teacher's; None where it has none.
        hidden: inner width of the heads; 1024.
        inner: residual blocks of a head; 0.
        feature: 'balanced' (cosine and smooth L1) or 'mse'.
        w_l1: share of smooth L1; 0.1.
        w_summary, w_feature: weights of embeddings and maps, a number or one per teacher; 1.

    Shape:
        feat_s: (N, s_dim), fm_s: (N, s_channels, H, W), feats_t: list of (N, D_i) or None, fms_t: list of
        (N, C_i, H_i, W_i) or None. Returns a scalar, `terms` the lists (S_i, F_i), None where left out.
        No gradient reaches the teachers. `calibrate(fms_t)`, for some batches, then `fit()` come first.
        Computed in float32, or in float64 as the student.

    Raises:
        ValueError: an argument is not legal; a teacher has neither; shapes are wrong; not fitted.
    """

    def __init__(
        self,
        s_dim: int,
        s_channels: int,
        t_dims: list,
        t_channels: list,
        hidden: int = 1024,
        inner: int = 0,
        feature: str = 'balanced',
        w_l1: float = 0.1,
        w_summary: float | list = 1.0,
        w_feature: float | list = 1.0,
    ) -> None:
        super().__init__()
        if feature not in ('balanced', 'mse'):
            raise ValueError(f'RADIO: feature must be balanced or mse, got {feature!r}')
        if len(t_dims) != len(t_channels) or any(d is None and c is None for d, c in zip(t_dims, t_channels)):
            raise ValueError(
                f'RADIO: t_dims and t_channels must give a width of each teacher, got {t_dims} and '
                f'{t_channels}'
            )
        self.s_dim, self.s_channels, self.t_dims, self.t_channels = s_dim, s_channels, t_dims, t_channels
        self.feature, self.w_l1 = feature, w_l1
        count = len(t_dims)
        self.w_summary, self.w_feature = (
            list(w) if isinstance(w, (list, tuple)) else [w] * count for w in (w_summary, w_feature)
        )
        if len(self.w_summary) != count or len(self.w_feature) != count:
            raise ValueError(f'RADIO: w_summary and w_feature need {count} weights or one, got others')
        empty = nn.Identity
        self.summary = nn.ModuleList(empty() if d is None else _Head(s_dim, hidden, d, inner) for d in t_dims)
        self.features = nn.ModuleList(
            empty() if c is None else _Head(s_channels, hidden, c, inner) for c in t_channels
        )
        self.phis = nn.ModuleList(empty() if c is None else PHIS(c) for c in t_channels)

    def forward(self, feat_s: Tensor, fm_s: Tensor, feats_t: list, fms_t: list) -> Tensor:
        summaries, features = self.terms(feat_s, fm_s, feats_t, fms_t)
        weighted = [*zip(self.w_summary, summaries), *zip(self.w_feature, features)]
        return sum(w * term for w, term in weighted if term is not None)

    def terms(self, feat_s: Tensor, fm_s: Tensor, feats_t: list, fms_t: list) -> tuple[list, list]:
        _expect('RADIO', 'feat_s', feat_s, 'N', self.s_dim)
        _expect('RADIO', 'fm_s', fm_s, len(feat_s), self.s_channels, 'H', 'W')
        for name, given in (('feats_t', feats_t), ('fms_t', fms_t)):
            if len(given) != len(self.t_dims):
                raise ValueError(
                    f'RADIO: {name} must hold {len(self.t_dims)} tensors or None, got {len(given)}: '
                    'one per teacher'
                )
        summaries, features = [], []
        for i, (feat, fm) in enumerate(zip(feats_t, fms_t)):
            if feat is None and fm is None:
                raise ValueError(
                    f'RADIO: feats_t[{i}] or fms_t[{i}] must be there, got None: leave the teacher out'
                )
            with _no_autocast(feat_s):
                summaries.append(None if feat is None else self._summary(i, feat_s, feat))
                features.append(None if fm is None else self._feature(i, fm_s, fm))
        return summaries, features

    def _summary(self, i: int, feat_s: Tensor, feat_t: Tensor) -> Tensor:
        _expect('RADIO', f'feats_t[{i}]', feat_t, len(feat_s), self.t_dims[i])
        return 1 - _cosine_rows(self.summary[i](_full(feat_s)), _full(feat_t.detach(), feat_s)).mean()

    def _feature(self, i: int, fm_s: Tensor, fm_t: Tensor) -> Tensor:
        _expect('RADIO', f'fms_t[{i}]', fm_t, len(fm_s), self.t_channels[i], 'H', 'W')
        y = self.phis[i](_full(fm_t.detach(), fm_s))
        size = tuple(min(a, b) for a, b in zip(fm_s.shape[2:], y.shape[2:]))
        a = self.features[i](_at_size(_full(fm_s), size).flatten(2).mT)
        b = _at_size(y, size).flatten(2).mT
        if self.feature == 'mse':
            return F.mse_loss(a, b)
        cosine = 1 - _cosine_rows(a, b).mean()
        return (1 - self.w_l1) * cosine + self.w_l1 * F.smooth_l1_loss(a, b, beta=2.0)

    def calibrate(self, fms_t: list) -> None:
        """Let every teacher's PHI-S see maps."""
        for phis, fm in zip(self.phis, fms_t):
            if fm is not None:
                phis.update(fm)

    def fit(self) -> None:
        for phis in self.phis:
            if isinstance(phis, PHIS):
                phis.fit()


class PHIS(nn.Module):
    """Rotation and one scale after which all channels have variance 1.

    Args:
        dim: channels.
        rotate: False: the scale alone; True.

    Shape:
        x: (N, dim, H, W). Returns its shape; so does `inverse`. `update(x)` for some batches, then `fit()`.

    Raises:
        ValueError: used before it was fitted; fewer than two positions were seen, or all are alike.
    """

    def __init__(self, dim: int, rotate: bool = True) -> None:
        super().__init__()
        self.dim, self.rotate, self.fitted = dim, rotate, False
        self.register_buffer('count', torch.zeros((), dtype=torch.float64))
        self.register_buffer('mean', torch.zeros(dim, dtype=torch.float64))
        self.register_buffer('scatter', torch.zeros(dim, dim, dtype=torch.float64))
        self.register_buffer('centre', torch.zeros(dim))
        self.register_buffer('whiten', torch.eye(dim))
        self.register_buffer('alpha', torch.ones(()))

    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        _expect('PHIS', 'fm', x, 'N', self.dim, 'H', 'W')
        rows = _double(x).to(self.mean.device).movedim(1, -1).flatten(0, -2)
        k, m = len(rows), rows.mean(dim=0)
        n, mean = self.count.double(), self.mean.double()
        centred = rows - m
        outer = (m - mean)[:, None] * (m - mean)[None, :] * (k * n / (n + k))
        self.scatter += _exact(centred).T @ centred + outer
        self.mean.copy_(mean + (m - mean) * (k / (n + k)))
        self.count += k

    def forget(self) -> None:
        """As if nothing had been seen; what was fitted stays until the next fit."""
        for seen in (self.count, self.mean, self.scatter):
            seen.zero_()

    @property
    def cov(self) -> Tensor:
        return self.scatter.double() / (self.count.double() - 1)

    @torch.no_grad()
    def fit(self) -> None:
        if float(self.count) < 2:
            raise ValueError(
                f'PHIS: fm of two positions or more must be seen, got {float(self.count):g}: update'
            )
        values, vectors = torch.linalg.eigh(self.cov)
        size = float(values.clamp(min=0).mean())
        if size == 0:
            raise ValueError('PHIS: fm must vary, got one value everywhere: give other images to update')
        self.alpha.fill_(1 / math.sqrt(size))
        one = torch.eye(self.dim, dtype=torch.float64, device=values.device)
        turn = self.hadamard(self.dim).to(one) @ vectors.T if self.rotate else one
        self.centre.copy_(self.mean)
        self.whiten.copy_(turn / math.sqrt(size))
        self.fitted = True

    def forward(self, x: Tensor) -> Tensor:
        _expect('PHIS', 'fm', x, 'N', self.dim, 'H', 'W')
        if not self.fitted:
            raise ValueError('PHIS: fm must be seen before, got none: update with some batches, then fit')
        x = _full(x)
        gap = _exact(x - _full(self.centre, x)[:, None, None])
        return torch.einsum('dc,nchw->ndhw', _full(self.whiten, x).to(gap), gap).to(x.dtype)

    def inverse(self, x: Tensor) -> Tensor:
        z = _exact(_full(x))
        W = _full(self.whiten, x).to(z)
        back = torch.einsum('dc,ndhw->nchw', W, z) / self.alpha.to(z) ** 2
        return (back + self.centre.to(z)[:, None, None]).to(_full(x).dtype)

    def _apply(self, fn, *args, **kwargs):
        """What was seen stays in float64, on the CPU where the device has none (Apple's)."""
        kept = {name: self._buffers[name] for name in ('count', 'mean', 'scatter')}
        place = fn(torch.zeros((), device=self.whiten.device)).device

        def moved(x: Tensor) -> Tensor:
            there = x.cpu() if place.type == 'mps' else fn(x)
            return there if there.dtype == x.dtype else x.to(place)

        seen = {name: moved(x) for name, x in kept.items()}
        try:
            self._buffers |= dict.fromkeys(kept)
            super()._apply(fn, *args, **kwargs)
        finally:  # a move that fails leaves them here
            self._buffers |= kept
        self._buffers |= seen
        return self

    def get_extra_state(self) -> bool:
        return self.fitted

    def set_extra_state(self, state: bool) -> None:
        self.fitted = bool(state)

    @staticmethod
    def hadamard(n: int) -> Tensor:
        """(n, n) of equal magnitudes and orthogonal, length 1; a random rotation where none is found."""
        made = _hadamard(n)
        if made is None:
            signs = torch.randint(2, (n, n), generator=torch.Generator().manual_seed(0)).double() * 2 - 1
            return torch.linalg.qr(signs).Q
        return made / math.sqrt(n)


def _double(x: Tensor) -> Tensor:
    """In float64, on the CPU where the device has none (Apple's)."""
    return (x.cpu() if x.device.type == 'mps' else x).double()


class _Head(nn.Module):
    """Linear, residual blocks, then LayerNorm, GELU, Linear."""

    def __init__(self, c_in: int, hidden: int, c_out: int, inner: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(c_in, hidden)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(hidden), nn.GELU(), nn.Linear(hidden, hidden)) for _ in range(inner)
        )
        self.final = nn.Sequential(nn.LayerNorm(hidden), nn.GELU(), nn.Linear(hidden, c_out))
        nn.init.zeros_(self.final[2].bias)

    def forward(self, x: Tensor) -> Tensor:
        x = _run(self.fc1, x)
        for block in self.blocks:
            x = x + _run(block, x)
        return _run(self.final, x)


def _at_size(fm: Tensor, size: tuple[int, int]) -> Tensor:
    if fm.shape[2:] == size:
        return fm
    return F.interpolate(fm, size=size, mode='bilinear', align_corners=True)


def _hadamard(n: int) -> Tensor | None:
    """(n, n) of 1 and -1: Sylvester's times one of Paley's; None where neither fits."""
    power = 0
    while n % 2 ** (power + 1) == 0:
        power += 1
    if n == 2**power:
        return _sylvester(n)
    for i in range(power - 1, -1, -1):
        r = n // 2**i
        if _prime(r - 1) and (r - 1) % 4 == 3:
            return torch.kron(_sylvester(2**i), _paley_1(r - 1))
        if r % 2 == 0 and _prime(r // 2 - 1) and (r // 2 - 1) % 4 == 1:
            return torch.kron(_sylvester(2**i), _paley_2(r // 2 - 1))
    return None


def _sylvester(n: int) -> Tensor:
    made = torch.ones(1, 1, dtype=torch.float64)
    while len(made) < n:
        made = torch.cat([torch.cat([made, made], dim=1), torch.cat([made, -made], dim=1)])
    return made


def _prime(q: int) -> bool:
    return q > 1 and all(q % d for d in range(2, math.isqrt(q) + 1))


def _legendre(q: int) -> Tensor:
    """(q, q) symbols of a - b: 0, 1 for a square, else -1."""
    squares = {a * a % q for a in range(1, q)}
    symbol = torch.tensor([0.0] + [1.0 if a in squares else -1.0 for a in range(1, q)], dtype=torch.float64)
    a = torch.arange(q)
    return symbol[(a[:, None] - a[None, :]) % q]


def _paley_1(q: int) -> Tensor:
    made = torch.ones(q + 1, q + 1, dtype=torch.float64)
    made[1:, 0] = -1
    made[1:, 1:] = torch.eye(q, dtype=torch.float64) + _legendre(q)
    return made


def _paley_2(q: int) -> Tensor:
    core = torch.ones(q + 1, q + 1, dtype=torch.float64)
    core[0, 0] = 0
    core[1:, 1:] = _legendre(q)
    zero = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
    one = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    return torch.kron((core == 0).double(), zero) + torch.kron(core, one)


def _cosine_rows(a: Tensor, b: Tensor) -> Tensor:
    """Cosines along the last axis; 0, without gradient, where a vector is 0."""
    units = []
    for x in (a, b):
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        dead = norm <= 1e-12  # NaN is not: it must show in the loss
        units.append(torch.where(dead, 0.0, x / torch.where(dead, 1.0, norm).clamp(min=1e-8)))
    return (units[0] * units[1]).sum(dim=-1)


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


def _exact(x: Tensor) -> Tensor:
    """For products that decide the loss: in float64 where float32 ones are rounded, TF32 for example."""
    return x.double() if x.dtype == torch.float32 and _rounded() and x.device.type != 'mps' else x


def _rounded() -> bool:
    """Whether torch.set_float32_matmul_precision or its newer forms ask for less than float32."""
    mode = getattr(torch.backends.cuda.matmul, 'fp32_precision', None)
    if mode is None:  # before torch 2.9
        return torch.get_float32_matmul_precision() != 'highest'
    rounded = ('tf32', 'bf16')
    return mode in rounded or torch.backends.mkldnn.matmul.fp32_precision in rounded


_rounded._dynamo_marked_constant = True  # torch.compiler.assume_constant_result, without its imports


def _full(x: Tensor, like: Tensor | None = None) -> Tensor:
    """In float32, or float64 if the student (like) is. Inference tensors are copied, to serve backward."""
    x = x.double() if (x if like is None else like).dtype == torch.float64 else x.float()
    compiling = getattr(torch.compiler, 'is_compiling', bool)()  # torch 2.2 cannot tell: False
    return x.clone() if not compiling and x.is_inference() else x


# ------------------------------------------ how the training scripts use it; a copied file may drop this


def feed(ka, s, all_t, batch):
    summaries, features = ka.terms(s.feat, s.fms[-1], [t.feat for t in all_t], [t.fms[-1] for t in all_t])
    loss = sum(w * term for w, term in [*zip(ka.w_summary, summaries), *zip(ka.w_feature, features)])
    return loss, {'summary': sum(summaries), 'feature': sum(features)}


def build(loss, probe, hidden=256, **options):
    """Heads for small networks: the authors' are 1024 wide. A first fit, so that the loss can be tried."""
    s, all_t = probe.s, probe.all_t
    widths = [t.feat.shape[1] for t in all_t], [t.fms[-1].shape[1] for t in all_t]
    ka = loss(s.feat.shape[1], s.fms[-1].shape[1], *widths, hidden=hidden, **options)
    ka.calibrate([t.fms[-1].cpu() for t in all_t])
    ka.fit()
    return ka


def before(ka, teachers_on, sample):
    """The scale of every teacher, from a few hundred images; the batch that `build` saw does not count."""
    for phis in ka.phis:
        if isinstance(phis, PHIS):
            phis.forget()
    for img, *_ in sample():
        ka.calibrate([t.fms[-1] for t in teachers_on(img)])
    ka.fit()
