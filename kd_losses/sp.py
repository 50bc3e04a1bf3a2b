"""SP, similarity preserving: samples that excite the teacher alike shall excite the student alike.

F. Tung, G. Mori, "Similarity-Preserving Knowledge Distillation", ICCV 2019, arXiv:1907.09682.

    X = map flattened to (N, M)
    G = X * X^T
    g_i = G_i / ||G_i||_2 row by row
    loss = mean over i and j of (g_s[i, j] - g_t[i, j])^2

Tap: the map at the end of each stage (Knowledge-Distillation-Zoo and this collection's trainer) or of the
last stage (RepDistiller). Channels and sizes may differ freely: only the N x N similarities meet.

Differences: none in the formula from RepDistiller, whose comment says that the author verified it. A sample
whose features are all zero gets zero gradient; in RepDistiller it gets gradients of 1e10.

Source: HobbitLong/RepDistiller, distiller_zoo/SP.py, verified by the paper's author as its comment says.

Use:
    >>> import torch
    >>> from sp import SP
    >>> fm_s, fm_t = torch.randn(8, 16, 8, 8, requires_grad=True), torch.randn(8, 32, 8, 8)
    >>> SP()(fm_s, fm_t).backward()
    >>> fm_s.grad.norm() > 0
    tensor(True)
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SP(nn.Module):
    """Mean squared difference of row-normalised batch similarities. No hyperparameters.

    Shape:
        fm_s: (N, ...), fm_t: (N, ...), only N must agree. Returns a scalar, 0 for N = 1.
        No gradient reaches fm_t.
        Computed in float32, also under TF32, or in float64 as the student.

    Raises:
        ValueError: an argument has no feature axis; the batch sizes differ.
    """

    def forward(self, fm_s: Tensor, fm_t: Tensor) -> Tensor:
        _expect('SP', 'fm_s', fm_s, 'N', *'D' * (fm_s.dim() - 1 or 1))  # one axis of features or more
        _expect('SP', 'fm_t', fm_t, len(fm_s), *'D' * (fm_t.dim() - 1 or 1))
        with _no_autocast(fm_s):
            return F.mse_loss(_similarity(_full(fm_s)), _similarity(_full(fm_t.detach(), fm_s)))


def _similarity(fm: Tensor) -> Tensor:
    return _unit(_Gram.apply(fm.flatten(1)))


class _Gram(torch.autograd.Function):
    """X X^T, with the one matrix product its gradient needs: (G + G^T) X. Autograd would run two."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        y = _exact(x)
        return (y @ y.T).to(x.dtype)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return (_exact(grad + grad.T) @ _exact(x)).to(x.dtype)


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


def _unit(x: Tensor) -> Tensor:
    """Rows divided by their length; a zero row stays zero and gets no gradient."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / norm.masked_fill(norm <= 1e-12, torch.inf)  # NaN is not: it must show in the loss


def _full(x: Tensor, like: Tensor | None = None) -> Tensor:
    """In float32, or float64 if the student (like) is. Inference tensors are copied, to serve backward."""
    x = x.double() if (x if like is None else like).dtype == torch.float64 else x.float()
    compiling = getattr(torch.compiler, 'is_compiling', bool)()  # torch 2.2 cannot tell: False
    return x.clone() if not compiling and x.is_inference() else x
