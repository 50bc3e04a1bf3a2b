"""RKD, relational knowledge distillation: match distances and angles between the samples of a batch.

W. Park, D. Kim, Y. Lu, M. Cho, "Relational Knowledge Distillation", CVPR 2019, arXiv:1904.05068.

    h(d) = d^2 / 2 where |d| < 1, else |d| - 1/2                                           (Huber)
    distance:  psi_ij = ||f_i - f_j|| / mean over i != j of ||f_i - f_j||
               L_D = mean over i, j of h(psi_s[i, j] - psi_t[i, j])
    angle:     e_ij = (f_j - f_i) / ||f_j - f_i||
               A_ijk = e_ij.e_ik                 (angle at sample i)
               L_A = mean over i, j, k of h(A_s[i, j, k] - A_t[i, j, k])
    loss = w_dist * L_D + w_angle * L_A

Tap: the pooled embedding before the classifier, not normalised; widths may differ. Invariant to scaling,
rotating and shifting either network's embeddings. Weak where a batch holds few samples per class.

Differences: value and gradient are those of the authors' code. Two equal samples give gradients of 1e9 in
their angle term; here a difference shorter than 1e-12, or than a rounding (4 eps) of the samples, is the zero
vector with zero gradient. A batch of one has no pair: the loss is 0 instead of NaN.

Cost: the plain form of the angle term is

    e = F.normalize(f[None] - f[:, None], dim=2)            (N, N, D)
    A = e @ e.mT                                            (N, N, N), of student and teacher
    L_A = F.smooth_l1_loss(A_s, A_t)

Here it is evaluated a few i at a time, together with its gradient, so that neither e nor A is ever stored. It
cannot be differentiated twice.

Source: lenscloth/RKD, metric/loss.py (RkdDistance, RKdAngle).

Use:
    >>> import torch
    >>> from rkd import RKD
    >>> feat_s, feat_t = torch.randn(8, 64, requires_grad=True), torch.randn(8, 128)
    >>> RKD()(feat_s, feat_t).backward()
    >>> feat_s.grad.norm() > 0
    tensor(True)
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class RKD(nn.Module):
    """Huber loss between pairwise distances and between triplet angles.

    Args:
        w_dist, w_angle: weights of the two terms; 25 and 50 on CIFAR. A weight of 0 skips its term.

    Shape:
        feat_s: (N, D_s), feat_t: (N, D_t); further axes are flattened. Returns a scalar, 0 for N = 1.
        No gradient reaches feat_t. `distance` and `angle` take the same arguments and give one term,
        unweighted.
        Computed in float32, also under TF32, or in float64 as the student.

    Raises:
        ValueError: an argument has no feature axis; the batch sizes differ.
    """

    def __init__(self, w_dist: float = 25.0, w_angle: float = 50.0) -> None:
        super().__init__()
        self.w_dist, self.w_angle = w_dist, w_angle

    def forward(self, feat_s: Tensor, feat_t: Tensor) -> Tensor:
        feat_s, feat_t = _prepare(feat_s, feat_t)
        loss = feat_s.new_zeros(())
        if self.w_dist != 0:
            loss = loss + self.w_dist * self.distance(feat_s, feat_t)
        if self.w_angle != 0:
            loss = loss + self.w_angle * self.angle(feat_s, feat_t)
        return loss

    def distance(self, feat_s: Tensor, feat_t: Tensor) -> Tensor:
        feat_s, feat_t = _prepare(feat_s, feat_t)
        with _no_autocast(feat_s):
            return F.smooth_l1_loss(_relative_distances(feat_s), _relative_distances(feat_t)).to(feat_s.dtype)

    def angle(self, feat_s: Tensor, feat_t: Tensor) -> Tensor:
        feat_s, feat_t = _prepare(feat_s, feat_t)
        with _no_autocast(feat_s):
            return _AngleLoss.apply(_few_coordinates(feat_s), _few_coordinates(feat_t))[0].to(feat_s.dtype)


def _prepare(feat_s: Tensor, feat_t: Tensor) -> tuple[Tensor, Tensor]:
    _expect('RKD', 'feat_s', feat_s, 'N', *'D' * (feat_s.dim() - 1 or 1))  # one axis of features or more
    _expect('RKD', 'feat_t', feat_t, len(feat_s), *'D' * (feat_t.dim() - 1 or 1))
    return _full(feat_s).flatten(1), _full(feat_t.detach(), feat_s).flatten(1)


def _relative_distances(f: Tensor) -> Tensor:
    """(N, N) distances over their mean off the diagonal; duplicates count as 1e-6, without gradient."""
    n = len(f)
    f = _exact(f - f.mean(dim=0))  # |a|^2 + |b|^2 - 2ab loses fewer digits around the centre
    square = f.square().sum(dim=1)
    d = torch.addmm(square[:, None] + square[None, :], f, f.T, alpha=-2).clamp(min=1e-12).sqrt()
    d = d.masked_fill(torch.eye(n, dtype=torch.bool, device=f.device), 0.0)
    return d / (d.sum() / max(n * (n - 1), 1)).clamp(min=1e-6)


def _few_coordinates(f: Tensor) -> Tensor:
    """Angles only need inner products of differences: wide features fit exactly into N coordinates."""
    f = _exact(f - f.mean(dim=0))
    if f.shape[1] <= max(len(f), 64):  # few anyway, and equal rows stay equal
        return f
    with torch.no_grad():
        rows = f.T.cpu() if f.device.type == 'mps' else f.T  # not every torch has it on Apple's GPU
        basis = torch.linalg.qr(rows).Q.to(f.device)  # (D, N), spans the rows of f
    return f @ basis


class _AngleLoss(torch.autograd.Function):
    """mean h(A_s - A_t) and its gradient in one pass over chunks of vertices that stay in cache."""

    @staticmethod
    def forward(f_s: Tensor, f_t: Tensor) -> tuple[Tensor, Tensor]:
        n = len(f_s)
        budget = 2**24 if f_s.is_cuda else 2**18  # numbers of an (chunk, N, N) block
        chunk = max(1, budget // n**2)
        loss, grad = f_s.new_zeros(()), torch.zeros_like(f_s)
        for i in range(0, n, chunk):
            e_s, inverse_s = _directions(f_s, i, chunk)
            e_t, _ = _directions(f_t, i, chunk)
            d = torch.baddbmm(e_s @ e_s.mT, e_t, e_t.mT, alpha=-1)  # A_s - A_t, (chunk, N, N)
            slope = d.clamp(-1, 1)  # h'(d), and h(d) = h' (d - h'/2)
            loss += (slope * (d - slope / 2)).sum()
            # d is symmetric in j and k, hence 2; then back through the normalisation e = v / ||v||
            g = 2 * slope @ e_s
            g = (g - e_s * (e_s * g).sum(dim=2, keepdim=True)) * inverse_s
            grad += g.sum(dim=0)
            grad[i : i + chunk] -= g.sum(dim=1)
        return loss / n**3, grad / n**3

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(output[1])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out: Tensor, _):
        return grad_out * ctx.saved_tensors[0], None


def _directions(f: Tensor, start: int, count: int) -> tuple[Tensor, Tensor]:
    """Unit vectors from `count` vertices to every sample, and one over their lengths (0 for duplicates)."""
    v = f[None] - f[start : start + count, None]
    norm = torch.linalg.vector_norm(v, dim=2, keepdim=True)
    # _few_coordinates may leave a rounding between equal rows: no direction either
    noise = 4 * torch.finfo(f.dtype).eps * torch.linalg.vector_norm(f, dim=1, keepdim=True)
    inverse = torch.where(norm <= noise.clamp(min=1e-12), 0.0, 1 / norm.clamp(min=1e-12))
    return v * inverse, inverse


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
