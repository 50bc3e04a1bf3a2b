"""IRG, instance relationship graph: match logits, distances in the batch, and their change between layers.

Y. Liu, J. Cao, B. Li, C. Yuan, W. Hu, Y. Li, Y. Duan, "Knowledge Distillation via Instance Relationship
Graph", CVPR 2019.

    vertex          V = mean over n, k of (out_s - out_t)^2
    edge            A_ij = ||x_i - x_j||^2 / max of them;  mean over i, j of (A_s - A_t)^2
                    E = mean of the edge terms of feat, fm1 and fm2
    transformation  b_n = ||fm1_n - fm2_n||^2 / max over n, fm1 pooled to fm2's size, fm2's channels averaged
                    in groups to fm1's count;  F = mean over n of (b_s - b_t)^2
    loss = w_irg_vert * V + w_irg_edge * E + w_irg_tran * F

Tap: [map of the last but one stage, map of the last stage, pooled embedding, logits] of each network.
Channels, sizes and widths may differ between the networks, the class count may not.

Differences: the three terms are Knowledge-Distillation-Zoo's; the authors' Caffe files have edge and
transformation losses on pooled features with other factors. Gradients flow through the maxima (the authors'
do not). A batch of one leaves only the vertex term; in Knowledge-Distillation-Zoo its loss is NaN.

Source: AberHu/Knowledge-Distillation-Zoo, kd_losses/irg.py; the authors' code, yufanLIU/IRG, is Caffe.

Use:
    >>> import torch
    >>> from irg import IRG
    >>> shapes = (8, 16, 8, 8), (8, 32, 4, 4), (8, 32), (8, 10)
    >>> irg_s, irg_t = [torch.randn(s, requires_grad=True) for s in shapes], [torch.randn(s) for s in shapes]
    >>> IRG()(irg_s, irg_t).backward()
    >>> irg_s[0].grad.norm() > 0
    tensor(True)
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class IRG(nn.Module):
    """Squared errors of logits, of relative distances in the batch and of relative changes between two
    layers.

    Args:
        w_irg_vert, w_irg_edge, w_irg_tran: weights of the three terms; 0.1, 5 and 5.

    Shape:
        irg_s, irg_t: lists [fm1 (N, C1, H1, W1), fm2 (N, C2, H2, W2), feat (N, D), out (N, K)], fm1 the
        earlier map. Returns a scalar. No gradient reaches irg_t. `terms` returns the three terms, unweighted.
        Computed in float32, also under TF32, or in float64 as the student.

    Raises:
        ValueError: a list has not four tensors of one batch; out differs in shape; within a network C2 is not
            a multiple of C1 or fm1 is smaller than fm2.
    """

    def __init__(self, w_irg_vert: float = 0.1, w_irg_edge: float = 5.0, w_irg_tran: float = 5.0) -> None:
        super().__init__()
        self.w_irg_vert, self.w_irg_edge, self.w_irg_tran = w_irg_vert, w_irg_edge, w_irg_tran

    def forward(self, irg_s: list[Tensor], irg_t: list[Tensor]) -> Tensor:
        vertex, edge, transformation = self.terms(irg_s, irg_t)
        return self.w_irg_vert * vertex + self.w_irg_edge * edge + self.w_irg_tran * transformation

    def terms(self, irg_s: list[Tensor], irg_t: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        for name, graph in (('irg_s', irg_s), ('irg_t', irg_t)):
            _check(name, graph, len(irg_s[0]) if irg_s else 0)
        _expect('IRG', 'out in irg_t', irg_t[3], *irg_s[3].shape)
        s, t = [_full(x, irg_s[0]) for x in irg_s], [_full(x.detach(), irg_s[0]) for x in irg_t]
        with _no_autocast(s[0]):
            edge = sum(F.mse_loss(_edges(s[i]), _edges(t[i])) for i in range(3)) / 3
            transformation = F.mse_loss(_changes(s[0], s[1]), _changes(t[0], t[1]))
            return F.mse_loss(s[3], t[3]), edge, transformation


def _check(name: str, graph: list[Tensor], n: int) -> None:
    wanted = {'fm1': (n, 'C1', 'H1', 'W1'), 'fm2': (n, 'C2', 'H2', 'W2'), 'feat': (n, 'D'), 'out': (n, 'C')}
    if len(graph) != 4:
        raise ValueError(
            f'IRG: {name} must hold {", ".join(wanted)}, got {len(graph)}: one map or vector each'
        )
    for (part, shape), x in zip(wanted.items(), graph):
        _expect('IRG', f'{part} in {name}', x, *shape)
    fm1, fm2 = graph[:2]
    if fm2.shape[1] % fm1.shape[1] or fm1.shape[2] < fm2.shape[2] or fm1.shape[3] < fm2.shape[3]:
        raise ValueError(
            f'IRG: in {name}, C2 must be a multiple of C1 and fm1 at least as large as fm2, '
            f'got {tuple(fm1.shape)} and {tuple(fm2.shape)}: tap consecutive stages'
        )


def _edges(x: Tensor) -> Tensor:
    """(N, N) squared distances over the largest of them."""
    x = x.flatten(1)
    x = x - x.mean(dim=0)  # |a|^2 + |b|^2 - 2ab loses fewer digits around the centre
    square = x.square().sum(dim=1)
    a = (square[:, None] + square[None, :] - 2 * _Gram.apply(x)).clamp(min=1e-12)
    a = a.masked_fill(torch.eye(len(x), dtype=torch.bool, device=x.device), 0.0)
    return a / a.amax().clamp(min=1e-12)


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


def _changes(fm1: Tensor, fm2: Tensor) -> Tensor:
    """(N,) squared distances between two layers over the largest of them."""
    if fm1.shape[2:] != fm2.shape[2:]:
        fm1 = F.adaptive_avg_pool2d(fm1, fm2.shape[2:])
    fm2 = fm2.unflatten(1, (fm1.shape[1], -1)).mean(dim=2)
    b = (fm1 - fm2).square().flatten(1).sum(dim=1).clamp(min=1e-12)
    return b / b.amax()


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


# ------------------------------------------ how the training scripts use it; a copied file may drop this


def feed(kd, s, t, batch):
    return kd(*([f.fms[-2], f.fms[-1], f.feat, f.out] for f in (s, t)))
