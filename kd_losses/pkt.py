"""PKT, probabilistic knowledge transfer: match who is whose neighbour in the batch.

N. Passalis, A. Tefas, "Learning Deep Representations with Probabilistic Knowledge Transfer", ECCV 2018,
arXiv:1803.10837.

    u_n = f_n / (||f_n|| + eps);  c_ij = (u_i.u_j + 1) / 2;  p_ij = c_ij / sum over k of c_ik
    loss = mean over i and j of p_t[i, j] * log((p_t[i, j] + eps) / (p_s[i, j] + eps))

Tap: the pooled embedding before the classifier; widths may differ, maps are flattened. The mean runs over N^2
entries of size 1/N: the value shrinks with the batch and useful weights are huge (10000 at 128, 30000 at 64).

Differences: the authors' code, diagonal included (the paper leaves it out). Their gradient is NaN as soon as
one student embedding is all zero; here such a row is the zero vector with zero gradient.
Knowledge-Distillation-Zoo uses eps 1e-6.
"""

import torch
from torch import Tensor, nn


class PKT(nn.Module):
    """Divergence between row-normalised cosine similarities of the batch.

    Args:
        eps: added to lengths and inside the logarithm; the authors' 1e-7.

    Shape:
        feat_s: (N, D_s), feat_t: (N, D_t); further axes are flattened. Returns a scalar, 0 for N = 1.
        No gradient reaches feat_t.

    Raises:
        ValueError: an argument has no feature axis; the batch sizes differ.
    """

    def __init__(self, eps: float = 1e-7) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, feat_s: Tensor, feat_t: Tensor) -> Tensor:
        _expect('PKT', 'feat_s', feat_s, 'N', *'D' * (feat_s.dim() - 1 or 1))  # one axis of features or more
        _expect('PKT', 'feat_t', feat_t, len(feat_s), *'D' * (feat_t.dim() - 1 or 1))
        n = len(feat_s)
        with torch.autocast(feat_s.device.type, enabled=False):
            q_s = self._surplus(_full(feat_s))
            q_t = self._surplus(_full(feat_t.detach(), feat_s))
            # p = (1 + q) / N, and the logarithm is that of 1 + (p_t - p_s) / (p_s + eps)
            return ((1 + q_t) * torch.log1p((q_t - q_s) / (q_s + (1 + n * self.eps)))).mean() / n

    def neighbours(self, feat: Tensor) -> Tensor:
        """(N, D) -> (N, N): row i is how likely i picks each sample as its neighbour."""
        return (1 + self._surplus(feat)) / len(feat)

    def _surplus(self, feat: Tensor) -> Tensor:
        """(N, N), N p - 1, from what is missing to 1 in c: the cosines themselves would be 1 to all digits
        where the embeddings share a large mean."""
        feat = feat.flatten(1)
        norm = torch.linalg.vector_norm(feat, dim=1, keepdim=True)
        zero = norm == 0
        u = torch.where(zero, 0.0, feat / torch.where(zero, 1.0, norm + self.eps))
        length = norm / torch.where(zero, 1.0, norm + self.eps)
        short = (1 + length) * torch.where(zero, 1.0, self.eps / (norm + self.eps))  # 1 - length^2
        v = u - u.mean(dim=0)
        half = _exact((short + v.square().sum(dim=1, keepdim=True)) / 4)
        v = _exact(v)
        d = torch.addmm(half + half.T, v, v.T, alpha=-0.5)  # 1 - c, from |u_i - u_j|^2
        mean = d.mean(dim=1, keepdim=True)
        return ((mean - d) / (1 - mean)).to(feat.dtype)


def _expect(who: str, name: str, x: Tensor, *wanted: int | str) -> None:
    """Refuse another shape and say what to do. A letter is an axis of any length but 0, for K (classes) 1."""
    got = tuple(x.shape)
    right = [n > (w == 'K') if isinstance(w, str) else n == w for n, w in zip(got, wanted)]
    if len(got) == len(wanted) and all(right):
        return
    if 0 in got:
        remedy = 'leave out an empty batch'
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


def _exact(x: Tensor) -> Tensor:
    """For products that decide the loss: in float64 where float32 ones are rounded, TF32 for example."""
    return x.double() if x.dtype == torch.float32 and x.device.type != 'mps' and _rounded() else x


def _rounded() -> bool:
    """Whether torch.set_float32_matmul_precision or its newer forms ask for less than float32."""
    if not hasattr(torch.backends.cuda.matmul, 'fp32_precision'):  # before torch 2.9
        return torch.get_float32_matmul_precision() != 'highest'
    modes = torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision
    return 'tf32' in modes or 'bf16' in modes


_rounded._dynamo_marked_constant = True  # torch.compiler.assume_constant_result, without its imports


def _full(x: Tensor, like: Tensor | None = None) -> Tensor:
    """In float32, or float64 if the student (like) is. Inference tensors are copied, to serve backward."""
    x = x.to(torch.float64 if (x if like is None else like).dtype == torch.float64 else torch.float32)
    return x.clone() if not torch.compiler.is_compiling() and x.is_inference() else x
