"""CFL, common feature learning: a space where the features of student and teachers lie together.

S. Luo, X. Wang, G. Fang, Y. Hu, D. Tao, M. Song, "Knowledge Amalgamation from Heterogeneous Networks by
Common Feature Learning", IJCAI 2019, arXiv:1906.10546.

    h_s = ext(align_s(f_s))
    h_i = ext(align_i(f_i))
    rec_i = dec_i(h_i)       ext is shared by all networks
    k(a, b) = sum over sigma of exp(-||a - b||^2 / (2 * sigma^2)), samples flattened to unit vectors
    MMD^2(x, y) = max(0, mean of k(x, x') + mean of k(y, y') - 2 * mean of k(x, y))
    mmd = sum over teachers of MMD^2(h_s, h_i)
    recons = sum over teachers of mean of (rec_i - f_i)^2
    loss = mmd + beta * recons

Tap: the last maps before pooling (block='conv', equal height and width, any channels), or the pooled
embeddings (block='fc'). The authors weigh it 10 beside soft targets over all classes. Batches of 32 or more:
the value depends on the batch size.

Distances are taken in float64: in float32 the matrix product leaves about 1e-7 on them, which the narrowest
kernel (2 * sigma^2 = 2e-6) would notice. Unit vectors are mostly further apart than the
narrow kernels see: with the default widths only sigma >= 0.2 teaches, the others add a constant 2 / N each.

Differences: the conv block is the authors' (no batch norm, no bias), the fc block KamalEngine's. Default
PyTorch initialisation, as in both.

Source: VainF/CommonFeatureLearning, models/cfl.py, loss/loss.py, loss/mmd.py; block='fc':
zju-vipa/KamalEngine, kamal/amalgamation/common_feature.py (CFL_FCBlock).

Use:
    >>> import torch
    >>> from cfl import CFL
    >>> f_s = torch.randn(32, 16, 4, 4, requires_grad=True)
    >>> f_ts = [torch.randn(32, 16, 4, 4), torch.randn(32, 8, 4, 4)]
    >>> CFL(16, [16, 8])(f_s, f_ts).backward()
    >>> f_s.grad.norm() > 0
    tensor(True)
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class CFL(nn.Module):
    """Maximum mean discrepancy in a learned common space, and reconstruction from there.

    Args:
        s_channels: of the student's map (or embedding).
        t_channels: list, of each teacher's.
        h_channels: width of the common space; authors 128 at 224 px, here 32 on CIFAR (fc: D_s / 4).
        sigmas: kernel widths.
        normalized: compare directions, not lengths.
        beta: weight of the reconstruction, 1.
        block: 'conv' or 'fc'.

    Shape:
        f_s: (N, s_channels, H, W), f_ts: list of (N, t_channels[i], H, W); fc: (N, s_channels), (N,
        t_channels[i]). Returns a scalar, with return_terms=True also {'mmd', 'recons'} without beta. No
        gradient reaches f_ts. `common` gives the features in the common space.
        Computed in float32, distances in float64, or all in float64 as the student.

    Raises:
        ValueError: unknown block; no teacher; a map has other channels, batch or size.
    """

    def __init__(
        self,
        s_channels: int,
        t_channels: list[int],
        h_channels: int = 128,
        sigmas: tuple = (0.001, 0.01, 0.05, 0.1, 0.2, 1, 2),
        normalized: bool = True,
        beta: float = 1.0,
        block: str = 'conv',
    ) -> None:
        super().__init__()
        if block not in ('conv', 'fc'):
            raise ValueError(f"CFL: block must be 'conv' or 'fc', got {block!r}")
        if not t_channels:
            raise ValueError('CFL: t_channels must name the channels of one teacher or more, got []')
        h = h_channels
        self.channels, self.conv = [s_channels, *t_channels], block == 'conv'
        self.sigmas, self.normalized, self.beta = tuple(sigmas), normalized, beta
        align, decoder = (_align_conv, _decode_conv) if self.conv else (_align_fc, _decode_fc)
        self.align_s = align(s_channels, h)
        self.align_t = nn.ModuleList(align(c, h) for c in t_channels)
        if self.conv:
            self.extractor = nn.Sequential(_Residual(2 * h, h), _Residual(h, h), _Residual(h, h))
        else:
            self.extractor = nn.Sequential(nn.Linear(h, h), nn.ReLU(), nn.Linear(h, h))
        self.dec_t = nn.ModuleList(decoder(c, h) for c in t_channels)

    def forward(self, f_s: Tensor, f_ts: list[Tensor], return_terms: bool = False):
        h_s, h_ts = self.common(f_s, f_ts)
        with _no_autocast(f_s):
            each = [mmd(h_s, h_t, self.sigmas, self.normalized) for h_t in h_ts]
            decoded = [_run(decode, h_t) for decode, h_t in zip(self.dec_t, h_ts)]
            recons = sum(F.mse_loss(got, _full(f_t.detach(), got)) for got, f_t in zip(decoded, f_ts))
            hidden = 0 * _full(f_s.detach()).sum()  # a ReLU may swallow an inf, which must show
            loss = sum(each) + self.beta * recons + hidden
        return (loss, {'mmd': sum(each), 'recons': recons}) if return_terms else loss

    def common(self, f_s: Tensor, f_ts: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Student's and teachers' features in the common space, h_channels wide."""
        _expect('CFL', 'f_s', f_s, 'N', self.channels[0], *('HW' if self.conv else ''))
        if len(f_ts) != len(self.align_t):
            raise ValueError(
                f'CFL: f_ts must hold {len(self.align_t)} tensors, got {len(f_ts)}: one per teacher'
            )
        for i, (f_t, channels) in enumerate(zip(f_ts, self.channels[1:])):
            _expect('CFL', f'f_ts[{i}]', f_t, len(f_s), channels, *f_s.shape[2:])
        with _no_autocast(f_s):
            h_s = _run(self.extractor, _run(self.align_s, _full(f_s)))
            aligned = [_run(align, _full(f_t.detach(), f_s)) for align, f_t in zip(self.align_t, f_ts)]
            return h_s, [_run(self.extractor, x) for x in aligned]


def mmd(x: Tensor, y: Tensor, sigmas: tuple, normalized: bool = True) -> Tensor:
    """Squared maximum mean discrepancy of two batches, (N, ...) each; diagonals included."""
    like = _full(x)
    # squares of distances as small as sigma^2, 1e-6, are differences of lengths of 1
    x, y = _double(like).flatten(1), _double(_full(y, x)).flatten(1)
    if normalized:
        x, y = _unit(x), _unit(y)
    with _no_autocast(x):
        alike = _kernel(x, x, sigmas) + _kernel(y, y, sigmas) - 2 * _kernel(x, y, sigmas)
    return alike.mean().clamp(min=0).to(like.dtype).to(like.device)


def _kernel(x: Tensor, y: Tensor, sigmas: tuple) -> Tensor:
    floor = 1e-12
    d2 = x.square().sum(dim=1)[:, None] + y.square().sum(dim=1) - 2 * x @ y.T
    if x is y:
        d2 = d2.masked_fill(torch.eye(len(x), dtype=torch.bool, device=x.device), 0.0)
    d2 = d2.clamp(min=floor)
    return sum(torch.exp(-d2 / (2 * sigma**2)) for sigma in sigmas)


def _unit(x: Tensor) -> Tensor:
    """Rows divided by their length; a zero row stays zero and gets no gradient."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / norm.masked_fill(norm <= 1e-12, torch.inf)  # NaN is not: it must show in the loss


class _Residual(nn.Module):
    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=False)
        self.downsample = None if c_in == c_out else nn.Sequential(nn.Conv2d(c_in, c_out, 1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(F.relu(self.conv1(x)))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


def _align_conv(channels: int, h: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(channels, 2 * h, 1, bias=False), nn.ReLU())


def _decode_conv(channels: int, h: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(h, channels, 3, padding=1, bias=False),
        nn.ReLU(),
        nn.Conv2d(channels, channels, 1, bias=False),
    )


def _align_fc(channels: int, h: int) -> nn.Module:
    return nn.Sequential(nn.Linear(channels, h), nn.ReLU())


def _decode_fc(channels: int, h: int) -> nn.Module:
    return nn.Sequential(nn.Linear(h, channels), nn.ReLU(), nn.Linear(channels, channels))


def _double(x: Tensor) -> Tensor:
    """In float64, on the CPU where the device has none (Apple's)."""
    return (x.cpu() if x.device.type == 'mps' else x).double()


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


def feed(ka, s, all_t, batch):
    """The sum over the levels, or the embeddings where the block is fully connected."""
    if not ka[0].conv:
        return ka[0](s.feat, [t.feat for t in all_t], return_terms=True)
    each = [loss(s.fms[k], [t.fms[k] for t in all_t], return_terms=True) for k, loss in zip(batch.layers, ka)]
    terms = {key: sum(term[key] for _, term in each) for key in ('mmd', 'recons')}
    return sum(loss for loss, _ in each), terms


def build(loss, probe, **options):
    conv = options.get('block', 'conv') == 'conv'
    taps = [lambda f, k=k: f.fms[k] for k in probe.layers] if conv else [lambda f: f.feat]
    widths = [[tap(f).shape[1] for f in (probe.s, *probe.all_t)] for tap in taps]
    options.setdefault('h_channels', 32 if conv else max(widths[0][0] // 4, 1))
    return nn.ModuleList(loss(s, t, **options) for s, *t in widths)
