"""DIST: match how classes rank within a sample and samples within a class, not the values.

T. Huang, S. You, F. Wang, C. Qian, C. Xu, "Knowledge Distillation from A Stronger Teacher", NeurIPS 2022,
arXiv:2205.10536.

    p = softmax(out / tau) over the classes
    pearson(a, b) = a'.b' / (||a'|| * ||b'|| + 1e-8),  a' = a - mean(a)
    inter = tau^2 * (1 - mean over samples n of pearson(p_s[n, :], p_t[n, :]))
    intra = tau^2 * (1 - mean over classes k of pearson(p_s[:, k], p_t[:, k]))
    loss = beta * inter + gamma * intra

Tap: the logits. A stronger teacher's sharper probabilities need not be met exactly: any positive affine
change of a row or column costs nothing. The authors weigh the loss by 2 beside cross-entropy, without soft
targets.

Differences: the authors' classification code. A constant row or column (uniform logits, a batch of one)
counts as uncorrelated and gets no gradient; in the authors' code its gradient is about 1e6.

Source: hunto/image_classification_sota, lib/models/losses/dist_kd.py (DIST).

Use:
    >>> import torch
    >>> from dist import DIST
    >>> out_s, out_t = torch.randn(8, 10, requires_grad=True), torch.randn(8, 10)
    >>> DIST()(out_s, out_t).backward()
    >>> out_s.grad.norm() > 0
    tensor(True)
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DIST(nn.Module):
    """Inter-class and intra-class Pearson distances between softened probabilities.

    Args:
        beta, gamma: weights of the inter-class and intra-class term; 1 and 1.
        tau: temperature, > 0; 4 on CIFAR, 1 on ImageNet.

    Shape:
        out_s, out_t: (N, K), equal, or (N, K, H, W), every position a sample. Returns a scalar.
        No gradient reaches out_t. `terms` returns (inter, intra), tau^2 included, beta and gamma not. With
        K = 2 the inter term is constant: two numbers always correlate fully, and only intra teaches.
        Computed in float32, or in float64 as the student.

    Raises:
        ValueError: tau is not positive; the shapes differ or are neither (N, K) nor (N, K, H, W).
    """

    def __init__(self, beta: float = 1.0, gamma: float = 1.0, tau: float = 4.0) -> None:
        super().__init__()
        if not tau > 0:
            raise ValueError(f'DIST: tau must be > 0, got {tau}')
        self.beta, self.gamma, self.tau = beta, gamma, tau

    def forward(self, out_s: Tensor, out_t: Tensor) -> Tensor:
        inter, intra = self.terms(out_s, out_t)
        return self.beta * inter + self.gamma * intra

    def terms(self, out_s: Tensor, out_t: Tensor) -> tuple[Tensor, Tensor]:
        _expect('DIST', 'out_s', out_s, 'N', 'K', *'HW' * (out_s.dim() == 4))
        _expect('DIST', 'out_t', out_t, *out_s.shape)
        p_s = F.softmax(_samples(_full(out_s)) / self.tau, dim=1)
        p_t = F.softmax(_samples(_full(out_t.detach(), out_s)) / self.tau, dim=1)
        inter, intra = (1 - _pearson(p_s, p_t, dim).mean() for dim in (1, 0))
        return inter * self.tau**2, intra * self.tau**2


def _samples(out: Tensor) -> Tensor:
    return out if out.dim() == 2 else out.movedim(1, -1).flatten(0, 2)


def _pearson(a: Tensor, b: Tensor, dim: int) -> Tensor:
    length = [torch.linalg.vector_norm(x, dim=dim) for x in (a, b)]
    a, b = a - a.mean(dim, keepdim=True), b - b.mean(dim, keepdim=True)
    norms = [torch.linalg.vector_norm(x, dim=dim) for x in (a, b)]
    # of equal numbers the mean is off by a rounding, and what is left is no direction
    dead = [norm <= 8 * torch.finfo(norm.dtype).eps * of for norm, of in zip(norms, length)]
    product = norms[0] * norms[1]
    seen = 0 * product.detach()  # NaN beside equal numbers must show
    return torch.where(dead[0] | dead[1], seen, (a * b).sum(dim) / (product + 1e-8))


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


def _full(x: Tensor, like: Tensor | None = None) -> Tensor:
    """In float32, or float64 if the student (like) is. Inference tensors are copied, to serve backward."""
    x = x.double() if (x if like is None else like).dtype == torch.float64 else x.float()
    compiling = getattr(torch.compiler, 'is_compiling', bool)()  # torch 2.2 cannot tell: False
    return x.clone() if not compiling and x.is_inference() else x
