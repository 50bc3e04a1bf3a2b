"""MHGD, multi-head graph distillation: imitate the attention between samples that a teacher's maps show.

S. Lee, B. C. Song, "Graph-based Knowledge Distillation by Multi-head Attention Network", BMVC 2019,
arXiv:1907.02226.

    v_l = first right singular vector of the map of stage l as (H * W, C), per sample; the student's: of its
        four leading ones the nearest to the teacher's up to sign, with that sign
    heads: G_h = query_h(v_l) * key_h(v_(l-1))', an N x N matrix; query, key: linear map and batch norm
    first, on the teacher alone: predict v_l as a head-wise mixture, by softmax(G), of the batch norm and ReLU
        of a linear map of v_(l-1), heads dropped at random; mean of 1 - <prediction, v_l>
    P = softmax over rows of tanh(G), heads frozen
    loss = sum over stages, heads and rows of KL(P_s || P_t)

Tap: the maps at the ends of all stages; channels must agree, sizes may differ. `attention_loss` trains the
heads, for 40 epochs; afterwards the authors clip this loss's gradient by that of cross-entropy (`clipped`).

Differences: from the authors' TensorFlow code, read, not run: there is no vector to check against. The
direction of KL and the sum are those of that code. Singular vectors come from X' * X with a gradient that
stays finite for equal singular values.

Source: sseung0703/KD_methods_with_TF, nets/Relation.py (MHGD) and nets/SVP.py (TensorFlow 1), read, not run.

Use:
    >>> import torch
    >>> from mhgd import MHGD
    >>> fms_s = [torch.randn(8, c, 4, 4, requires_grad=True) for c in (16, 16)]
    >>> fms_t = [torch.randn(8, c, 4, 4) for c in (16, 16)]
    >>> MHGD([16, 16])(fms_s, fms_t).backward()
    >>> fms_s[0].grad.norm() > 0
    tensor(True)
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class MHGD(nn.Module):
    """KL divergence between the attention graphs of student and teacher.

    Args:
        dims: list of the stages' channels, shallow to deep, at least two.
        num_heads: 8.
        drop: share of heads dropped while the attention is trained; 0.5.

    Shape:
        fms_s, fms_t: lists of maps (N, dims[l], H, W), any sizes. Returns a scalar. No gradient reaches fms_t
        or the heads. `attention_loss(fms_t)` returns the scalar that trains the heads; generator: where to
        draw from.
        Computed in float32, also under TF32, or in float64 as the student.

    Raises:
        ValueError: fewer than two stages; no head; drop out of [0, 1); lists, channels or batches do not fit.
    """

    def __init__(self, dims: list, num_heads: int = 8, drop: float = 0.5) -> None:
        super().__init__()
        if len(dims) < 2:
            raise ValueError(f'MHGD: dims must name at least two stages, got {dims}')
        if num_heads < 1 or not 0 <= drop < 1:
            raise ValueError(f'MHGD: num_heads must be >= 1 and drop in [0, 1), got {num_heads} and {drop}')
        self.dims, self.num_heads, self.drop = list(dims), num_heads, drop
        self.query, self.key, self.value, self.estimate = (nn.ModuleList() for _ in range(4))
        for back, front in zip(dims, dims[1:]):
            width = (back + front) // 2
            self.query.append(_unit_layer(front, width * num_heads))
            self.key.append(_unit_layer(back, width * num_heads))
            self.value.append(_unit_layer(back, width))
            self.estimate.append(nn.Linear(width * num_heads, front))

    def forward(self, fms_s: list[Tensor], fms_t: list[Tensor]) -> Tensor:
        self._check('fms_s', fms_s)
        self._check('fms_t', fms_t, len(fms_s[0]))
        modes = [m.training for m in self.modules()]
        self.eval()  # the heads are frozen, their batch norms too
        with _no_autocast(fms_s[0]):
            v_t = [self._teacher_vector(fm, fms_s[0]) for fm in fms_t]
            v_s = [_aligned(_full(fm, fms_s[0]), v) for fm, v in zip(fms_s, v_t)]
            loss = 0.0
            for level in range(len(self.query)):
                # float64: the gradient is a sum of numbers that almost cancel
                log_p, log_q = (
                    F.log_softmax(_double(self._graph(level, v, frozen=True)).tanh(), dim=2)
                    for v in (v_s, v_t)
                )
                loss = loss + (log_p.exp() * (log_p - log_q.detach())).sum()
        for m, mode in zip(self.modules(), modes):
            m.training = mode
        return loss.to(v_s[0].dtype).to(v_s[0].device)

    def attention_loss(self, fms_t: list[Tensor], generator: torch.Generator | None = None) -> Tensor:
        """How badly the heads predict each stage's vector from the stage before; trains the heads."""
        self._check('fms_t', fms_t)
        with _no_autocast(fms_t[0]):
            like = next(self.parameters())
            v, loss = [self._teacher_vector(fm, like) for fm in fms_t], 0.0
            for level in range(len(self.query)):
                mix = F.softmax(self._graph(level, v), dim=2)  # (heads, N, N)
                if self.training and self.drop > 0:
                    kept = (
                        torch.rand(self.num_heads, 1, 1, device=mix.device, generator=generator) >= self.drop
                    )
                    mix = mix * kept / (1 - self.drop)
                mixed = mix @ _run(self.value[level], v[level]).relu()  # (heads, N, width)
                guess = _run(self.estimate[level], mixed.transpose(0, 1).flatten(1))
                loss = loss + (1 - (_unit(guess) * v[level + 1]).sum(dim=1)).mean()
            return loss

    pretrain_loss = attention_loss

    def _graph(self, level: int, v: list[Tensor], frozen: bool = False) -> Tensor:
        """(heads, N, N): who in stage `level` explains whom in the next."""
        q, k = self.query[level], self.key[level]
        if frozen:
            call = torch.func.functional_call
            held = [
                {n: _full(x.detach(), v[0]) for n, x in (*m.named_parameters(), *m.named_buffers())}
                for m in (q, k)
            ]
            q, k = call(q, held[0], (v[level + 1],)), call(k, held[1], (v[level],))
        else:
            q, k = _run(q, v[level + 1]), _run(k, v[level])
        q, k = (_exact(x).unflatten(1, (self.num_heads, -1)).transpose(0, 1) for x in (q, k))
        return (q @ k.mT).to(v[0].dtype)

    @torch.no_grad()
    def _teacher_vector(self, fm: Tensor, like: Tensor) -> Tensor:
        """(N, C), its largest entry positive: the sign of a singular vector is arbitrary."""
        v = _leading(_full(fm, like).flatten(2).mT)[1][:, :, 0]
        return v * torch.where(v.gather(1, v.abs().argmax(dim=1, keepdim=True)) < 0, -1.0, 1.0)

    def _check(self, name: str, fms: list[Tensor], n: int | None = None) -> None:
        if len(fms) != len(self.dims):
            raise ValueError(
                f'MHGD: {name} must hold {len(self.dims)} maps, got {len(fms)}: a list, one per stage'
            )
        for fm, channels in zip(fms, self.dims):
            _expect('MHGD', name, fm, len(fms[0]) if n is None else n, channels, 'H', 'W')


def clipped(grad_kd: list[Tensor | None], grad_ce: list[Tensor | None], epoch: int) -> list[Tensor | None]:
    """The authors' clip, per parameter: the distillation gradient is at most as long as that of cross-entropy
    times sigmoid(epoch), epoch counted from the end of the attention training."""
    share, result = 1 / (1 + math.exp(-epoch)), []
    for kd, ce in zip(grad_kd, grad_ce):
        if kd is not None and ce is not None:
            limit = share * torch.linalg.vector_norm(ce)
            kd = kd * (limit / torch.linalg.vector_norm(kd).clamp(min=1e-12)).clamp(max=1)
        result.append(kd)
    return result


def _unit_layer(d_in: int, d_out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(d_in, d_out), nn.BatchNorm1d(d_out))


def _aligned(fm: Tensor, v_t: Tensor) -> Tensor:
    """(N, C): of the map's four leading right singular vectors the one nearest to v_t, with its sign."""
    x = fm.flatten(2).mT
    v = _RightVectors.apply(x, min(4, *x.shape[1:]))[0]
    with torch.no_grad():
        cosine = (_exact(v).mT @ _exact(v_t)[:, :, None])[:, :, 0]
        best = cosine.abs().argmax(dim=1, keepdim=True)
        sign = torch.where(cosine.gather(1, best) < 0, -1.0, 1.0)
    return v.gather(2, best[:, None].expand(-1, v.shape[1], -1))[:, :, 0] * sign


def _leading(x: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (N, C) and vectors (N, C, C) of X'X, largest first; in float64, squaring costs digits."""
    y = _exact(x)
    gram = _double(y.mT @ y)
    squares, vectors = torch.linalg.eigh(gram.nan_to_num(0.0, 0.0, 0.0))  # it would raise
    hidden = 0 * gram.sum(dim=(1, 2), keepdim=True)  # NaN for NaN and inf, which must show in the loss
    return squares.flip(1), (vectors.flip(2) + hidden).to(x.dtype).to(x.device)


class _RightVectors(torch.autograd.Function):
    """The r leading right singular vectors, from X'X, with a gradient that survives equal values."""

    @staticmethod
    def forward(x: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
        squares, vectors = _leading(x)
        return vectors[:, :, :r].clone(), squares, vectors

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        (x, ctx.r), (_, squares, vectors) = inputs, output
        ctx.mark_non_differentiable(squares, vectors)
        ctx.save_for_backward(x, squares, vectors)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor, *_):
        x, squares, vectors = ctx.saved_tensors
        gap = squares[:, None, : ctx.r] - squares[:, :, None]  # (N, C, r)
        alive = gap.abs() > 1e-10 * squares[:, :1, None].clamp(min=1e-30)
        vectors = _double(vectors)
        b = torch.where(alive, (vectors.mT @ _double(grad)) / torch.where(alive, gap, 1.0), 0.0)
        k = vectors @ b @ vectors[:, :, : ctx.r].mT
        y = _exact(x)
        return (y @ (k + k.mT).to(y)).to(x.dtype), None


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
    return loss([x.shape[1] for x in probe.t.fms[1:]], **options)


def pretrain(kd, t, batch):
    return kd.attention_loss(t.fms[1:], batch.generator)


def update(opt, loss_ce, loss_kd, epoch):
    """The distillation gradient of a parameter is never longer than that of cross-entropy."""
    params = [p for group in opt.param_groups for p in group['params'] if p.requires_grad]
    ce = torch.autograd.grad(loss_ce, params, retain_graph=True, allow_unused=True)
    kd = clipped(torch.autograd.grad(loss_kd, params, allow_unused=True), ce, epoch)
    for p, a, b in zip(params, ce, kd):
        p.grad = b if a is None else a if b is None else a + b
    opt.step()
