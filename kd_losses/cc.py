"""CC, correlation congruence: match a kernel matrix of the batch's embeddings.

B. Peng, X. Jin, J. Liu, S. Zhou, Y. Wu, Y. Liu, D. Li, Z. Zhang, "Correlation Congruence for Knowledge
Distillation", ICCV 2019, arXiv:1904.01802.

    f = feat / ||feat||_2 row by row
    S = f * f^T
    rbf_taylor  K = sum over p = 0..P_order of exp(-2 * gamma) * (2 * gamma)^p / p! * S^p   (elementwise)
    rbf         K_ij = exp(-gamma * ||f_i - f_j||^2), what the series tends to
    bilinear    K = S
    mmd         K_ij = |m_i - m_j|, m = mean of the un-normalised embedding
    loss = mean over i and j of (K_s[i, j] - K_t[i, j])^2

Tap: the pooled embedding before the classifier; widths may differ. The paper adds the soft-target loss
(`cc+st` in train_kd.py) and samples batches with several images per class.

Differences: no authors' code is public; the default is the paper's Gaussian kernel as
Knowledge-Distillation-Zoo expands it. RepDistiller's CC multiplies differences of consecutive samples,
another loss. The mmd kernel is a reconstruction.

Source: AberHu/Knowledge-Distillation-Zoo, kd_losses/cc.py; no code of the authors is public. kernel='mmd':
formula only.

Use:
    >>> import torch
    >>> from cc import CC
    >>> feat_s, feat_t = torch.randn(8, 64, requires_grad=True), torch.randn(8, 128)
    >>> CC()(feat_s, feat_t).backward()
    >>> feat_s.grad.norm() > 0
    tensor(True)
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class CC(nn.Module):
    """Mean squared difference of two batch kernel matrices.

    Args:
        gamma: width of the Gaussian kernel, 0.4.
        P_order: order of its Taylor series, 2.
        kernel: 'rbf_taylor', 'rbf', 'bilinear' or 'mmd'.

    Shape:
        feat_s: (N, D_s), feat_t: (N, D_t); further axes are flattened. Returns a scalar.
        No gradient reaches feat_t. An all-zero embedding is similar to nothing and gets no gradient.
        Computed in float32, also under TF32, or in float64 as the student.

    Raises:
        ValueError: unknown kernel; P_order is not an integer >= 0; an argument has no feature axis; the batch
            sizes differ.
    """

    def __init__(self, gamma: float = 0.4, P_order: int = 2, kernel: str = 'rbf_taylor') -> None:
        super().__init__()
        if kernel not in _KERNELS:
            raise ValueError(f'CC: kernel must be one of {sorted(_KERNELS)}, got {kernel!r}')
        if P_order != int(P_order) or P_order < 0:
            raise ValueError(f'CC: P_order must be an integer >= 0, got {P_order}')
        self.gamma, self.P_order, self.kernel = gamma, int(P_order), kernel

    def forward(self, feat_s: Tensor, feat_t: Tensor) -> Tensor:
        _expect('CC', 'feat_s', feat_s, 'N', *'D' * (feat_s.dim() - 1 or 1))  # one axis of features or more
        _expect('CC', 'feat_t', feat_t, len(feat_s), *'D' * (feat_t.dim() - 1 or 1))
        matrix = _KERNELS[self.kernel]
        with _no_autocast(feat_s):
            k_s = matrix(_full(feat_s).flatten(1), self.gamma, self.P_order)
            k_t = matrix(_full(feat_t.detach(), feat_s).flatten(1), self.gamma, self.P_order)
            return F.mse_loss(k_s, k_t)


def _bilinear(feat: Tensor, gamma: float, order: int) -> Tensor:
    f = _exact(_unit(feat))
    return (f @ f.T).to(feat.dtype)


def _rbf_taylor(feat: Tensor, gamma: float, order: int) -> Tensor:
    s = _bilinear(feat, gamma, order)
    factors = [math.exp(-2 * gamma) * (2 * gamma) ** p / math.factorial(p) for p in range(order + 1)]
    series = 0 * s + factors.pop()  # of s also for order 0
    for factor in reversed(factors):  # Horner: a + s (b + s (c + ...))
        series = s * series + factor
    return series


def _rbf(feat: Tensor, gamma: float, order: int) -> Tensor:
    return torch.exp(-2 * gamma * (1 - _bilinear(feat, gamma, order)))


def _mmd(feat: Tensor, gamma: float, order: int) -> Tensor:
    m = feat.mean(dim=1)
    return (m[:, None] - m[None, :]).abs()


_KERNELS = {'rbf_taylor': _rbf_taylor, 'rbf': _rbf, 'bilinear': _bilinear, 'mmd': _mmd}


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
