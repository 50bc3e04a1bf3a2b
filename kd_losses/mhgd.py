"""MHGD, multi-head graph distillation: imitate the attention between samples that a teacher's maps show.

S. Lee, B. C. Song, "Graph-based Knowledge Distillation by Multi-head Attention Network", BMVC 2019,
arXiv:1907.02226.

    v_l = first right singular vector of the map of stage l as (H W, C), per sample; the student's: of its
        four leading ones the nearest to the teacher's up to sign, with that sign
    heads: G_h = query_h(v_l) key_h(v_(l-1))', an N x N matrix; query, key: linear map and batch norm
    first, on the teacher alone: predict v_l as a head-wise mixture, by softmax(G), of the batch norm and ReLU
        of a linear map of v_(l-1), heads dropped at random; mean of 1 - <prediction, v_l>
    P = softmax over rows of tanh(G), heads frozen
    loss = sum over stages, heads and rows of KL(P_s || P_t)

Tap: the maps at the ends of all stages; channels must agree, sizes may differ. `attention_loss` trains the
heads, for 40 epochs; afterwards the authors clip this loss's gradient by that of cross-entropy (`clipped`).

Differences: from the authors' TensorFlow code, read, not run: there is no vector to check against. The
direction of KL and the sum are theirs. Singular vectors come from X'X with a gradient that stays finite for
equal singular values.
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

    Raises:
        ValueError: fewer than two stages; lists, channels or batches do not fit.
    """

    def __init__(self, dims: list, num_heads: int = 8, drop: float = 0.5) -> None:
        super().__init__()
        if len(dims) < 2:
            raise ValueError(f'MHGD: dims must name at least two stages, got {dims}')
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
        with torch.autocast(fms_s[0].device.type, enabled=False):
            v_t = [self._teacher_vector(fm) for fm in fms_t]
            v_s = [_aligned(_full(fm), v) for fm, v in zip(fms_s, v_t)]
            loss = 0.0
            for level in range(len(self.query)):
                log_p = F.log_softmax(self._graph(level, v_s, frozen=True).tanh(), dim=2)
                log_q = F.log_softmax(self._graph(level, v_t, frozen=True).tanh(), dim=2)
                loss = loss + (log_p.exp() * (log_p - log_q.detach())).sum()
        for m, mode in zip(self.modules(), modes):
            m.training = mode
        return loss

    def attention_loss(self, fms_t: list[Tensor], generator: torch.Generator | None = None) -> Tensor:
        """How badly the heads predict each stage's vector from the stage before; trains the heads."""
        self._check('fms_t', fms_t)
        with torch.autocast(fms_t[0].device.type, enabled=False):
            v, loss = [self._teacher_vector(fm) for fm in fms_t], 0.0
            for level in range(len(self.query)):
                mix = F.softmax(self._graph(level, v), dim=2)  # (heads, N, N)
                if self.training and self.drop > 0:
                    kept = (
                        torch.rand(self.num_heads, 1, 1, device=mix.device, generator=generator) >= self.drop
                    )
                    mix = mix * kept / (1 - self.drop)
                mixed = mix @ self.value[level](v[level]).relu()  # (heads, N, width)
                guess = self.estimate[level](mixed.transpose(0, 1).flatten(1))
                loss = loss + (1 - (_unit(guess) * v[level + 1]).sum(dim=1)).mean()
            return loss

    pretrain_loss = attention_loss

    def _graph(self, level: int, v: list[Tensor], frozen: bool = False) -> Tensor:
        """(heads, N, N): who in stage `level` explains whom in the next."""
        q, k = self.query[level], self.key[level]
        if frozen:
            call = torch.func.functional_call
            q, k = (
                lambda x, m=m: call(m, {n: p.detach() for n, p in m.named_parameters()}, (x,)) for m in (q, k)
            )
        q, k = (x.unflatten(1, (self.num_heads, -1)).transpose(0, 1) for x in (q(v[level + 1]), k(v[level])))
        return q @ k.mT

    @torch.no_grad()
    def _teacher_vector(self, fm: Tensor) -> Tensor:
        """(N, C), its largest entry positive: the sign of a singular vector is arbitrary."""
        v = _leading(_full(fm).flatten(2).mT)[1][:, :, 0]
        return v * torch.where(v.gather(1, v.abs().argmax(dim=1, keepdim=True)) < 0, -1.0, 1.0)

    def _check(self, name: str, fms: list[Tensor], n: int | None = None) -> None:
        got = [tuple(x.shape) for x in fms]
        n = got[0][0] if got and n is None else n
        if [s[:2] for s in got] != [(n, c) for c in self.dims] or any(len(s) != 4 for s in got):
            raise ValueError(f'MHGD: {name} must be maps of {n} samples and channels {self.dims}, got {got}')


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
    v = _RightVectors.apply(x, min(4, *x.shape[1:]))
    with torch.no_grad():
        cosine = (v.mT @ v_t[:, :, None])[:, :, 0]
        best = cosine.abs().argmax(dim=1, keepdim=True)
        sign = torch.where(cosine.gather(1, best) < 0, -1.0, 1.0)
    return v.gather(2, best[:, None].expand(-1, v.shape[1], -1))[:, :, 0] * sign


def _leading(x: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (N, C) and vectors (N, C, C) of X'X, largest first; in float64, squaring costs digits."""
    squares, vectors = torch.linalg.eigh((x.mT @ x).double())
    return squares.flip(1), vectors.flip(2).to(x.dtype)


class _RightVectors(torch.autograd.Function):
    """The r leading right singular vectors, from X'X, with a gradient that survives equal values."""

    @staticmethod
    def forward(ctx, x: Tensor, r: int) -> Tensor:
        squares, vectors = _leading(x)
        ctx.save_for_backward(x, squares, vectors)
        ctx.r = r
        return vectors[:, :, :r].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, squares, vectors = ctx.saved_tensors
        gap = squares[:, None, : ctx.r] - squares[:, :, None]  # (N, C, r)
        alive = gap.abs() > 1e-10 * squares[:, :1, None].clamp(min=1e-30)
        vectors = vectors.double()
        b = torch.where(alive, (vectors.mT @ grad.double()) / torch.where(alive, gap, 1.0), 0.0)
        k = vectors @ b @ vectors[:, :, : ctx.r].mT
        return x @ (k + k.mT).to(x.dtype), None


def _unit(x: Tensor) -> Tensor:
    """Rows divided by their length; a zero row stays zero and gets no gradient."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    alive = norm > 1e-12
    return torch.where(alive, x / torch.where(alive, norm, 1.0), 0.0)


def _full(x: Tensor) -> Tensor:
    """Half precision to float32; float64 stays."""
    return x if x.dtype == torch.float64 else x.float()


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
