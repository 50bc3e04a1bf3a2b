"""DCD, discriminative and consistent distillation: find the own image in the batch, both ways alike.

N. Giakoumoglou, T. Stathaki, "Discriminative and Consistent Representation Distillation", 2024,
arXiv:2407.11802.

    a = embed_s(feat_s), b = embed_t(feat_t), rows divided by their length (both maps are trained)
    Z_ij = min(exp(log_scale), max_scale) * a_i.b_j + bias                     (i student, j teacher)
    r_i = softmax of row i of Z, c_i = softmax of column i of Z
    contrast = - mean over i of log r_i[i]
    consistency = mean over i of KL(c_i || r_i)
    loss = contrast + alpha * consistency

Tap: the pooled embeddings before the classifier; the negatives are the other samples of the batch. The
gradient goes through both sides of the consistency term.

Differences: the authors' code. The bias has no effect, since every term is a softmax of Z; it is kept for the
layout of the parameters. Their published ImageNet script leaves log_scale out of the optimiser, so that it
stays at 1; here it is a parameter as the others (`kd.log_scale.requires_grad_(False)` freezes it). Above
log(max_scale) it has no gradient and only weight decay brings it back.

Source: giakoumoglou/distillers, cifar/distillers/DCD.py (DCDLoss).

Use:
    >>> import torch
    >>> from dcd import DCD
    >>> feat_s, feat_t = torch.randn(8, 64, requires_grad=True), torch.randn(8, 128)
    >>> DCD(64, 128)(feat_s, feat_t).backward()
    >>> feat_s.grad.norm() > 0
    tensor(True)
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DCD(nn.Module):
    """In-batch contrast of student and teacher, and agreement of its two directions.

    Args:
        s_dim, t_dim: widths of the two embeddings.
        feat_dim: common width; 128.
        alpha: weight of the consistency term; 0.5.
        init_log_scale: logarithm of the factor on the cosines at the start; 1.
        max_scale: the largest factor, > 0; 10.

    Shape:
        feat_s: (N, s_dim), feat_t: (N, t_dim); further axes are flattened. Returns a scalar, 0 for N = 1.
        No gradient reaches feat_t. `terms` returns (contrast, consistency) without alpha.
        Computed in float32, also under TF32, or in float64 as the student.

    Raises:
        ValueError: max_scale is not positive; an embedding of another width; the batch sizes differ.
    """

    def __init__(
        self,
        s_dim: int,
        t_dim: int,
        feat_dim: int = 128,
        alpha: float = 0.5,
        init_log_scale: float = 1.0,
        max_scale: float = 10.0,
    ) -> None:
        super().__init__()
        if not max_scale > 0:
            raise ValueError(f'DCD: max_scale must be > 0, got {max_scale}')
        self.s_dim, self.t_dim, self.alpha, self.max_scale = s_dim, t_dim, alpha, max_scale
        self.embed_s, self.embed_t = nn.Linear(s_dim, feat_dim), nn.Linear(t_dim, feat_dim)
        self.log_scale = nn.Parameter(torch.tensor(float(init_log_scale)))
        self.bias = nn.Parameter(torch.tensor(0.0))

    def forward(self, feat_s: Tensor, feat_t: Tensor) -> Tensor:
        contrast, consistency = self.terms(feat_s, feat_t)
        return contrast + self.alpha * consistency

    def terms(self, feat_s: Tensor, feat_t: Tensor) -> tuple[Tensor, Tensor]:
        feat_s, feat_t = (x.flatten(1) if x.dim() > 2 else x for x in (feat_s, feat_t))
        _expect('DCD', 'feat_s', feat_s, 'N', self.s_dim)
        _expect('DCD', 'feat_t', feat_t, len(feat_s), self.t_dim)
        with _no_autocast(feat_s):
            a = _unit(_run(self.embed_s, _full(feat_s)))
            b = _unit(_run(self.embed_t, _full(feat_t.detach(), feat_s)))
            cosine = (_exact(a) @ _exact(b).T).to(a.dtype)
            scale = _full(self.log_scale, a).exp().clamp(max=self.max_scale)
            Z = scale * cosine + _full(self.bias, a)
            log_r, log_c = F.log_softmax(Z, dim=1), F.log_softmax(Z.T, dim=1)
            return -log_r.diagonal().mean(), (log_c.exp() * (log_c - log_r)).sum(dim=1).mean()


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
