"""RSD, redundancy suppression: student dimensions correlate with the teacher's own and with no other.

Zhang, Liu, Ran, Ma, "Cross-Architecture Distillation Made Simple with Redundancy Suppression",
ICCV 2025, arXiv:2507.21844.

    x = projector(feat_s): linear to expansion * s_dim, batch norm, GELU, linear to t_dim
    xn, tn = x and feat_t, each column minus its mean over the batch, divided by (its deviation + 1e-5)
    C = tn^T * xn / N                                            (row: teacher dimension, column: student)
    loss = sum over d of (C_dd - 1)^2 + kappa * sum over d != e of C_de^2

Tap: the embeddings before the classifier, of any two architectures; projector=False compares the logits. The
projector is trained with the student and dropped afterwards. Larger batches are better: of N samples a
correlation of 0 looks like 1/sqrt(N).

Differences: the authors' code, which is Barlow Twins' loss between teacher and student with 1/N and the 1e-5
outside the root. A column that is constant over the batch (deviation 1e-6 or less, or a rounding of its mean)
gives them gradients of 1e5; here it counts as 0, without gradient. In full, the cost of which is (t_dim)^2 N:

    C = tn.T @ xn / len(tn)
    loss = (C.diagonal() - 1).square().sum() + kappa * (C - C.diagonal().diag()).square().sum()

Cost: for N < t_dim the sum of all C^2 is made from two (N, N) products, which is the same number.

Source: spacewanderx/RSD, distillers/rsd.py (rsd_loss, RSD).

Use:
    >>> import torch
    >>> from rsd import RSD
    >>> feat_s, feat_t = torch.randn(8, 64, requires_grad=True), torch.randn(8, 128)
    >>> RSD(64, 128)(feat_s, feat_t).backward()
    >>> feat_s.grad.norm() > 0
    tensor(True)
"""

import torch
from torch import Tensor, nn


class RSD(nn.Module):
    """Cross-correlation of projected student and teacher embeddings towards the identity.

    Args:
        s_dim, t_dim: widths of the two embeddings.
        kappa: weight of the entries off the diagonal; 0.01.
        expansion: the projector's inner width is expansion * s_dim; 2.
        projector: False compares feat_s itself, s_dim = t_dim.

    Shape:
        feat_s: (N, s_dim), feat_t: (N, t_dim), N >= 2; further axes are flattened. Returns a scalar. No
        gradient reaches feat_t. Without a projector N = 1 is legal: t_dim, without gradient.
        Computed in float32, also under TF32, or in float64 as the student.

    Raises:
        ValueError: expansion < 1; widths differ without a projector; an embedding of another width; the batch
            sizes differ; one sample with a projector.
    """

    def __init__(
        self, s_dim: int, t_dim: int, kappa: float = 0.01, expansion: int = 2, projector: bool = True
    ) -> None:
        super().__init__()
        if expansion < 1:
            raise ValueError(f'RSD: expansion must be >= 1, got {expansion}')
        if not projector and s_dim != t_dim:
            raise ValueError(f'RSD: widths must be equal without a projector, got {s_dim} and {t_dim}')
        self.s_dim, self.t_dim, self.kappa, self.projector = s_dim, t_dim, kappa, None
        if projector:
            mid = expansion * s_dim
            self.projector = nn.Sequential(
                *(nn.Linear(s_dim, mid, bias=False), nn.BatchNorm1d(mid), nn.GELU()),
                nn.Linear(mid, t_dim, bias=False),
            )
            for layer in self.projector[::3]:
                nn.init.trunc_normal_(layer.weight, std=0.02)

    def forward(self, feat_s: Tensor, feat_t: Tensor) -> Tensor:
        feat_s, feat_t = (x.flatten(1) if x.dim() > 2 else x for x in (feat_s, feat_t))
        _expect('RSD', 'feat_s', feat_s, 'N', self.s_dim)
        _expect('RSD', 'feat_t', feat_t, len(feat_s), self.t_dim)
        if self.projector is not None and len(feat_s) < 2:
            raise ValueError(
                f'RSD: feat_s must be of two samples or more for its batch norm, got {tuple(feat_s.shape)}: '
                'leave a last batch of one out (drop_last=True)'
            )
        with _no_autocast(feat_s):
            x, t = _full(feat_s), _full(feat_t.detach(), feat_s)
            x = x if self.projector is None else _run(self.projector, x)
            x, t = _standard_columns(x), _standard_columns(t)
            n, wide = t.shape
            diagonal = (t * x).mean(dim=0)
            x, t = _exact(x), _exact(t)
            whole = (t @ t.T) * (x @ x.T) if n < wide else (t.T @ x).square()
            whole = (whole.sum() / n**2).to(diagonal.dtype)
            return (diagonal - 1).square().sum() + self.kappa * (whole - diagonal.square().sum())


def _standard_columns(x: Tensor) -> Tensor:
    """Mean 0 and deviation 1 (with N) over the batch; constant columns to 0, without gradient."""
    mean = x.mean(dim=0)
    centred = x - mean
    deviation = torch.linalg.vector_norm(centred, dim=0) / len(x) ** 0.5
    # of equal numbers the mean is off by a rounding. NaN is not dead: it must show in the loss
    dead = deviation <= (8 * torch.finfo(x.dtype).eps * mean.abs()).clamp(min=1e-6)
    return torch.where(dead, 0.0, centred / (torch.where(dead, 1.0, deviation) + 1e-5))


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


def _full(x: Tensor, like: Tensor | None = None) -> Tensor:
    """In float32, or float64 if the student (like) is. Inference tensors are copied, to serve backward."""
    x = x.double() if (x if like is None else like).dtype == torch.float64 else x.float()
    compiling = getattr(torch.compiler, 'is_compiling', bool)()  # torch 2.2 cannot tell: False
    return x.clone() if not compiling and x.is_inference() else x
