"""KDSVD: match how the leading channel patterns of consecutive stages relate to each other.

S. H. Lee, D. H. Kim, B. C. Song, "Self-supervised Knowledge Distillation using Singular Value Decomposition",
ECCV 2018, arXiv:1807.06819.

    per sample and stage, X = map as (H * W, C)
    v_j = its j-th right singular vector (C numbers), j = 1..k
    teacher: v_j with its entry of largest size made positive, times w_j = sigma_j / ||sigma_1..k||
    student: of its k + 3 leading vectors the one nearest to v_j up to sign, with that sign, times w_j: a_j
    R[c, c', j] = exp(-(a_j[c] of stage l - a_j[c'] of stage l - 1)^2 / 8), for the teacher with v_j
    loss = sum over l = 2..L of mean over n of sum over c, c', j of (R_s - R_t)^2

Tap: the maps of all stages, after their ReLU. Channels must agree at each stage, sizes may differ.

Differences: RepDistiller's formula with a sign rule, without which the value depends on the SVD routine's
signs. The plain form, with X = fm.flatten(2).mT, is

    v = torch.linalg.svd(X, full_matrices=False).Vh[:, :k + 3]
    s = torch.linalg.svdvals(X)[:, :k]
    w = s / s.norm(dim=1, keepdim=True)
    then signs, the choice of the nearest, R and the loss as above

Here the vectors come from X^T * X (a C x C matrix) with their own gradient, finite for equal and vanishing
singular values, where the plain form's is NaN. The authors clip this loss's gradient by that of
cross-entropy; we do not.

Source: HobbitLong/RepDistiller, distiller_zoo/KDSVD.py, with the sign rule; the authors' code,
sseung0703/SSKD_SVD, is TensorFlow.

Use:
    >>> import torch
    >>> from kdsvd import KDSVD
    >>> fms_s = [torch.randn(8, c, 4, 4, requires_grad=True) for c in (8, 16)]
    >>> fms_t = [torch.randn(8, c, 4, 4) for c in (8, 16)]
    >>> KDSVD()(fms_s, fms_t).backward()
    >>> fms_s[0].grad.norm() > 0
    tensor(True)
"""

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class KDSVD(nn.Module):
    """Squared difference of radial-basis relations between singular vectors of consecutive stages.

    Args:
        k: singular vectors per stage; 1.

    Shape:
        fms_s, fms_t: lists of L >= 2 maps, shallow to deep, (N, C_l, H, W) and (N, C_l, H', W') at stage l.
        Returns a scalar. No gradient reaches fms_t. `terms` returns the L - 1 summands.
        Computed in float32, also under TF32, or in float64 as the student.

    Raises:
        ValueError: k < 1 or more vectors than a stage of the teacher has; fewer than two stages; unequal
            lengths, batches or channels.
    """

    def __init__(self, k: int = 1) -> None:
        super().__init__()
        if k < 1:
            raise ValueError(f'KDSVD: k must be at least 1, got {k}')
        self.k = k

    def forward(self, fms_s: list[Tensor], fms_t: list[Tensor]) -> Tensor:
        return sum(self.terms(fms_s, fms_t))

    def terms(self, fms_s: list[Tensor], fms_t: list[Tensor]) -> list[Tensor]:
        self._check(fms_s, fms_t)
        with _no_autocast(fms_s[0]):
            pairs = [
                self._vectors(_full(s, fms_s[0]), _full(t.detach(), fms_s[0])) for s, t in zip(fms_s, fms_t)
            ]
            # less 1, which cancels in the difference: of vectors almost alike it would take all digits
            relations = [
                [torch.expm1(-((deep[i][:, :, None] - shallow[i][:, None]).square()) / 8) for i in (0, 1)]
                for shallow, deep in zip(pairs, pairs[1:])
            ]
            return [(r_s - r_t).square().sum(dim=(1, 2, 3)).mean() for r_s, r_t in relations]

    def _vectors(self, fm_s: Tensor, fm_t: Tensor) -> tuple[Tensor, Tensor]:
        """The k weighted vectors of student and teacher, (N, C, k) each, the student's aligned."""
        x_s, x_t = fm_s.flatten(2).mT, fm_t.flatten(2).mT
        with torch.no_grad():
            values, v_t = _leading(x_t, self.k)
            largest = v_t.abs().argmax(dim=1, keepdim=True)
            v_t = v_t * torch.where(v_t.gather(1, largest) < 0, -1.0, 1.0)
            norm = torch.linalg.vector_norm(values, dim=1, keepdim=True)
            weight = torch.where(norm > 1e-12, values / norm.clamp(min=1e-12), float(self.k == 1))[:, None]
        a = _RightVectors.apply(x_s, min(self.k + 3, *x_s.shape[1:]))[0]
        with torch.no_grad():
            match = _exact(a).mT @ _exact(v_t)  # (N, candidates, k)
            chosen = match.abs().argmax(dim=1, keepdim=True)
            sign = torch.where(match.gather(1, chosen) < 0, -1.0, 1.0)
        a = a.gather(2, chosen.expand(-1, a.shape[1], -1)) * sign
        return a * weight, v_t * weight

    def _check(self, fms_s: list[Tensor], fms_t: list[Tensor]) -> None:
        shapes = [tuple(x.shape) for x in fms_s], [tuple(x.shape) for x in fms_t]
        if len(fms_s) < 2 or len(fms_s) != len(fms_t):
            raise ValueError(
                f'KDSVD: fms_s and fms_t must be lists of at least two maps each, got {shapes}: one per stage'
            )
        for s, t in zip(fms_s, fms_t):
            _expect('KDSVD', 'fms_s', s, len(fms_s[0]), 'C', 'H', 'W')
            _expect('KDSVD', 'fms_t', t, *s.shape[:2], 'H', 'W')
            if self.k > min(t.shape[1], t.shape[2] * t.shape[3]):
                raise ValueError(
                    f'KDSVD: a stage of the teacher must have k = {self.k} vectors, got {shapes}: lower k'
                )


def _leading(x: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """The r largest singular values (N, r) of x (N, M, C) and their right singular vectors (N, C, r)."""
    squares, vectors = _eigen(x)
    values = squares[:, :r].clamp(min=0).sqrt().to(x.dtype)
    return values.to(x.device), vectors[:, :, :r].to(x.dtype).to(x.device)


def _eigen(x: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (N, C) and vectors (N, C, C) of X^T X, largest first, in float64: squaring costs digits."""
    x = _exact(x)
    gram = _double(x.mT @ x)
    squares, vectors = torch.linalg.eigh(gram.nan_to_num(0.0, 0.0, 0.0))  # it would raise
    hidden = 0 * gram.sum(dim=(1, 2), keepdim=True)  # NaN for NaN and inf, which must show in the loss
    return squares.flip(1), vectors.flip(2) + hidden


class _RightVectors(torch.autograd.Function):
    """The r leading right singular vectors, from X^T X, with a gradient that survives equal values."""

    @staticmethod
    def forward(x: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
        squares, vectors = _eigen(x)
        return vectors[:, :, :r].to(x.dtype, copy=True).to(x.device), squares, vectors

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        (x, ctx.r), (_, squares, vectors) = inputs, output
        ctx.mark_non_differentiable(squares, vectors)
        ctx.save_for_backward(x, squares, vectors)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor, *_):
        x, squares, vectors = ctx.saved_tensors
        lead = squares[:, None, : ctx.r]
        gap = lead - squares[:, :, None]  # (N, C, r): lam_i - lam_j
        alive = gap.abs() > 1e-10 * squares[:, :1, None].clamp(min=1e-30)
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


def _full(x: Tensor, like: Tensor | None = None) -> Tensor:
    """In float32, or float64 if the student (like) is. Inference tensors are copied, to serve backward."""
    x = x.double() if (x if like is None else like).dtype == torch.float64 else x.float()
    compiling = getattr(torch.compiler, 'is_compiling', bool)()  # torch 2.2 cannot tell: False
    return x.clone() if not compiling and x.is_inference() else x
