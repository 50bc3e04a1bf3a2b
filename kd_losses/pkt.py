"""PKT, probabilistic knowledge transfer: match who is whose neighbour in the batch.

N. Passalis, A. Tefas, "Learning Deep Representations with Probabilistic Knowledge Transfer", ECCV 2018,
arXiv:1803.10837.

    u_n = f_n / (||f_n|| + eps)
    c_ij = (u_i.u_j + 1) / 2
    p_ij = c_ij / sum over k of c_ik
    loss = mean over i and j of p_t[i, j] * log((p_t[i, j] + eps) / (p_s[i, j] + eps))

Tap: the pooled embedding before the classifier; widths may differ, maps are flattened. The mean runs over N^2
entries of size 1/N: the value shrinks with the batch and useful weights are huge (10000 at 128, 30000 at 64).

Differences: the authors' code, diagonal included (the paper leaves it out). Their gradient is NaN as soon as
one student embedding is all zero; here such a row is the zero vector with zero gradient.
Knowledge-Distillation-Zoo uses eps 1e-6. Value and gradient come from differences to 1 of the cosines, so
they keep their digits where all embeddings share a large mean. It cannot be differentiated twice.

Source: passalis/probabilistic_kt, nn/pkt.py (cosine_similarity_loss).

Use:
    >>> import torch
    >>> from pkt import PKT
    >>> feat_s, feat_t = torch.randn(8, 64, requires_grad=True), torch.randn(8, 128)
    >>> PKT()(feat_s, feat_t).backward()
    >>> feat_s.grad.norm() > 0
    tensor(True)
"""

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class PKT(nn.Module):
    """Divergence between row-normalised cosine similarities of the batch.

    Args:
        eps: added to lengths and inside the logarithm; the authors' 1e-7.

    Shape:
        feat_s: (N, D_s), feat_t: (N, D_t); further axes are flattened. Returns a scalar, 0 for N = 1.
        No gradient reaches feat_t.
        Computed in float32, also under TF32, or in float64 as the student.

    Raises:
        ValueError: eps is not positive; an argument has no feature axis; the batch sizes differ.
    """

    def __init__(self, eps: float = 1e-7) -> None:
        super().__init__()
        if not eps > 0:
            raise ValueError(f'PKT: eps must be > 0, got {eps}')
        self.eps = eps

    def forward(self, feat_s: Tensor, feat_t: Tensor) -> Tensor:
        _expect('PKT', 'feat_s', feat_s, 'N', *'D' * (feat_s.dim() - 1 or 1))  # one axis of features or more
        _expect('PKT', 'feat_t', feat_t, len(feat_s), *'D' * (feat_t.dim() - 1 or 1))
        feat_s = _full(feat_s).flatten(1)
        x = _exact(feat_s.detach())
        with _no_autocast(feat_s):
            loss, grad = _divergence(x, _full(feat_t.detach(), x).flatten(1), self.eps)
        return _Known.apply(feat_s, loss.to(feat_s.dtype), grad.to(feat_s.dtype))

    def neighbours(self, feat: Tensor) -> Tensor:
        """(N, D) -> (N, N): row i is how likely i picks each sample as its neighbour."""
        u, _, longer = _rows(_exact(feat.flatten(1)), self.eps)
        return (1 + _surplus(u, longer, self.eps)[0]) / len(feat)


def _rows(feat: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    norm = torch.linalg.vector_norm(feat, dim=1, keepdim=True)
    longer = norm + eps
    return feat / longer, norm, longer


def _surplus(u: Tensor, longer: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """N p - 1, (N, N), and 4 times the mean of c, (N, 1).

    Embeddings with a large common mean have cosines near 1, of which float32 keeps no difference; so this
    starts from 4 (1 - c), which is small then: with v = u - mean, short = 1 - |u|^2 and h = short + |v|^2 it
    is h_i + h_j - 2 v_i.v_j, its row mean h_i + mean(h), and N p - 1 their difference / 4 mean of c.
    """
    v, short = u - u.mean(dim=0), eps / longer
    h = torch.addcmul(v.square().sum(dim=1, keepdim=True), short, 2 - short)
    mean = h.mean()
    c = (4 - mean) - h
    # p is no negative number, and a rounding below 0 would have no logarithm
    return (torch.addmm(mean - h.T, v, v.T, alpha=2) / c).clamp(min=-1), c


def _divergence(feat_s: Tensor, feat_t: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The loss and its gradient. With p = (1 + q) / N, plain autograd would subtract numbers near 1."""
    n = len(feat_s)
    (u, norm, longer), (u_t, _, longer_t) = _rows(feat_s, eps), _rows(feat_t, eps)
    (q_s, c), (q_t, _) = _surplus(u, longer, eps), _surplus(u_t, longer_t, eps)
    # log(a / b) = 2 atanh((a - b) / (a + b)), exact for a near b too
    gap, base = q_t - q_s, q_s + (1 + n * eps)
    half_log = torch.atanh(gap / torch.add(gap, base, alpha=2))
    # gap has mean 0: half of it taken off leaves the part that matters where both are alike
    loss = torch.addcmul(half_log, half_log, q_t).sub(gap / 2).mean() * (2 / n)
    # the slope for q_s, less its mean with the weights 1 + q_s (gap has mean 0 in a row), for c, for u
    slope = (n * eps - gap) / base
    slope = torch.add(slope, slope.mean(dim=1, keepdim=True) - 1, alpha=n * eps) / (c * (n**3 / 2))
    grad = (slope + slope.T) @ u
    # through u = feat / (norm + eps); a zero row has none
    norm = norm.masked_fill(norm == 0, torch.inf)
    return loss, grad / (norm + eps) - u * ((u * grad).sum(dim=1, keepdim=True) / norm)


class _Known(torch.autograd.Function):
    """A loss whose gradient for x is known."""

    @staticmethod
    def forward(x: Tensor, loss: Tensor, grad: Tensor) -> Tensor:
        return loss.clone()

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(inputs[2])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out: Tensor):
        return grad_out * ctx.saved_tensors[0], None, None


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
