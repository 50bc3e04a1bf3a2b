"""SemCKD, semantic calibration: every student layer learns from all teacher layers, by attention.

D. Chen, J.-P. Mei, Y. Zhang, C. Wang, Z. Wang, Y. Feng, C. Chen, "Cross-Layer Distillation with Semantic
Calibration", AAAI 2021, arXiv:2012.03236.

    G(f) = F * F^T, F = map flattened per sample                                       (N, N)
    q_i = query_i(G(fm_s of layer i)), k_j = key_j(G(fm_t of layer j))              rows of length 1
    w[n, i, j] = softmax over teacher layers j of q_i[n].k_j[n] / soft
    m[n, i, j] = mean over c, h, w of (regressor_ij(fm_s[i]) - fm_t[j])^2, the larger map average-pooled first
    loss = mean over n, i of sum over j of w[n, i, j] * m[n, i, j]

Tap: lists of stage maps after their ReLU, without the stem; numbers of layers, channels and sizes may differ.
The attention networks act on rows of N x N matrices, so every batch must have exactly batch_size samples: the
trainer leaves out an incomplete last batch. The regressors cost more than a small student.

Differences: the authors' code with the later `soft` (1 is the original). A zero attention vector is 0 with
zero gradient, NaN in their code; sizes are compared and pooled by height and width. Their recipe for
CIFAR-100 has soft targets beside it (weight 1, T = 4).

Source: DefangChen/SemCKD, distiller_zoo/SemCKD.py (SemCKDLoss) and models/util.py (SelfA); `soft` from
DefangChen/SimKD.

Use:
    >>> import torch
    >>> from semckd import SemCKD
    >>> fms_s = [torch.randn(8, c, 4, 4, requires_grad=True) for c in (8, 16)]
    >>> fms_t = [torch.randn(8, c, 4, 4) for c in (16, 32)]
    >>> SemCKD([8, 16], [16, 32], batch_size=8)(fms_s, fms_t).backward()
    >>> fms_s[0].grad.norm() > 0
    tensor(True)
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SemCKD(nn.Module):
    """Attention-weighted squared errors over all pairs of layers.

    Args:
        s_channels, t_channels: lists, channels of the layers of the two networks.
        batch_size: samples in every batch (per process).
        factor: the attention width is batch_size // factor; 4.
        soft: divides the scores, > 0; 1.

    Shape:
        fms_s: list of S maps (batch_size, C, H, W), fms_t: list of T maps. Returns a scalar. No gradient
        reaches fms_t. `terms` returns (w, m), each (N, S, T).
        Computed in float32, also under TF32, or in float64 as the student.

    Raises:
        ValueError: batch_size < factor; soft is not positive; a list has another length, a map other
            channels, a batch another size.
    """

    def __init__(
        self, s_channels: list, t_channels: list, batch_size: int, factor: int = 4, soft: float = 1.0
    ) -> None:
        super().__init__()
        d = batch_size // factor
        if d < 1 or not soft > 0:
            raise ValueError(
                f'SemCKD: batch_size must be at least factor, and soft > 0, '
                f'got {batch_size}, {factor} and {soft}: lower factor'
            )
        self.s_channels, self.t_channels = list(s_channels), list(t_channels)
        self.batch_size, self.soft = batch_size, soft
        self.query = nn.ModuleList(_Attention(batch_size, d) for _ in s_channels)
        self.key = nn.ModuleList(_Attention(batch_size, d) for _ in t_channels)
        self.regressor = nn.ModuleList(
            nn.ModuleList(_regressor(s, t) for t in t_channels) for s in s_channels
        )

    def forward(self, fms_s: list[Tensor], fms_t: list[Tensor]) -> Tensor:
        w, m = self.terms(fms_s, fms_t)
        return (w * m).sum(dim=2).mean()

    def terms(self, fms_s: list[Tensor], fms_t: list[Tensor]) -> tuple[Tensor, Tensor]:
        for name, maps, channels in (('fms_s', fms_s, self.s_channels), ('fms_t', fms_t, self.t_channels)):
            if len(maps) != len(channels):
                raise ValueError(
                    f'SemCKD: {name} must hold {len(channels)} maps, got {len(maps)}: a list, one per layer'
                )
            for fm, c in zip(maps, channels):
                _expect('SemCKD', name, fm, self.batch_size, c, 'H', 'W')
        with _no_autocast(fms_s[0]):
            like = fms_s[0]
            fms_s, fms_t = [_full(x, like) for x in fms_s], [_full(x.detach(), like) for x in fms_t]
            q = torch.stack([_run(net, _gram(x)) for net, x in zip(self.query, fms_s)], dim=1)  # (N, S, d)
            k = torch.stack([_run(net, _gram(x)) for net, x in zip(self.key, fms_t)], dim=1)  # (N, T, d)
            w = F.softmax((_exact(q) @ _exact(k).mT).to(q.dtype) / self.soft, dim=2)
            m = [
                torch.stack([_error(s, t, net) for t, net in zip(fms_t, nets)], dim=1)
                for s, nets in zip(fms_s, self.regressor)
            ]
            return w, torch.stack(m, dim=1)


class _Attention(nn.Module):
    """Rows of a Gram matrix to vectors of length 1."""

    def __init__(self, batch_size: int, d: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(batch_size, 2 * d), nn.Linear(2 * d, d)

    def forward(self, gram: Tensor) -> Tensor:
        return _unit(self.fc2(F.relu(self.fc1(gram))))


def _regressor(c_s: int, c_t: int) -> nn.Sequential:
    wide = 2 * c_t
    return nn.Sequential(
        *(nn.Conv2d(c_s, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.ReLU()),
        *(nn.Conv2d(wide, wide, 3, padding=1, bias=False), nn.BatchNorm2d(wide), nn.ReLU()),
        nn.Conv2d(wide, c_t, 1, bias=False),
    )


def _error(fm_s: Tensor, fm_t: Tensor, regressor: nn.Module) -> Tensor:
    """(N,) mean squared differences at the smaller of the two sizes."""
    size = tuple(map(min, fm_s.shape[2:], fm_t.shape[2:]))
    fm_s, fm_t = (fm if fm.shape[2:] == size else F.adaptive_avg_pool2d(fm, size) for fm in (fm_s, fm_t))
    return (_run(regressor, fm_s) - fm_t).square().mean(dim=(1, 2, 3))


def _gram(fm: Tensor) -> Tensor:
    f = _exact(fm.flatten(1))
    return (f @ f.T).to(fm.dtype)


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


def _unit(x: Tensor) -> Tensor:
    """Rows divided by their length; a zero row stays zero and gets no gradient."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / norm.masked_fill(norm <= 1e-12, torch.inf)  # NaN is not: it must show in the loss


def _full(x: Tensor, like: Tensor | None = None) -> Tensor:
    """In float32, or float64 if the student (like) is. Inference tensors are copied, to serve backward."""
    x = x.double() if (x if like is None else like).dtype == torch.float64 else x.float()
    compiling = getattr(torch.compiler, 'is_compiling', bool)()  # torch 2.2 cannot tell: False
    return x.clone() if not compiling and x.is_inference() else x


# ------------------------------------------ how the training scripts use it; a copied file may drop this


def build(loss, probe, **options):
    channels = ([x.shape[1] for x in f.fms[1:]] for f in (probe.s, probe.t))
    return loss(*channels, probe.batch_size, **options)
