"""NST, neuron selectivity transfer: match the distributions of the channels' activation patterns.

Z. Huang, N. Wang, "Like What You Like: Knowledge Distill via Neuron Selectivity Transfer", 2017,
arXiv:1707.01219.

Every channel of a map is a point: its H * W values divided by their length (s_i, i = 1..C_s; t_j, j =
1..C_t). The loss is the squared maximum mean discrepancy (biased estimate) between the two sets of points:

    loss = mean over n of [mean over j, j' of k(t_j, t_j') + mean over i, i' of k(s_i, s_i')
                           - 2 * mean over i, j of k(s_i, t_j)]

    poly      k(x, y) = (x.y + c)^d
    linear    k(x, y) = x.y
    gaussian  k(x, y) = exp(-||x - y||^2 / (2 * sigma^2)), sigma^2 = mean of ||s_i - t_j||^2 over the sample's
              pairs, without gradient

Tap: the last stage's map (Knowledge-Distillation-Zoo) or every stage's (RepDistiller). Channels may differ;
maps of different size are average-pooled to the smaller height and width.

Differences: the authors' code (polynomial only) drops the first sum, which is constant; we keep it, so the
loss is 0 for equal maps. They tap maps before the ReLU and weigh 50. Which pairs define sigma^2 no published
code says; per sample and across networks is our choice.

Cost: the plain form for the default kernel, with unit vectors s and t of shape (N, C, H * W), is

    k = lambda x, y: (x @ y.mT).square().mean(dim=(1, 2))
    loss = (k(t, t) + k(s, s) - 2 * k(s, t)).mean()

Here the Gram matrices are those of channels or of positions, whichever are smaller.

Source: AberHu/Knowledge-Distillation-Zoo, kd_losses/nst.py, and HobbitLong/RepDistiller, distiller_zoo/NST.py
(poly; the authors' code, TuSimple/neuron-selectivity-transfer, is MXNet); linear, gaussian: formula only.

Use:
    >>> import torch
    >>> from nst import NST
    >>> fm_s, fm_t = torch.randn(8, 16, 8, 8, requires_grad=True), torch.randn(8, 32, 8, 8)
    >>> NST()(fm_s, fm_t).backward()
    >>> fm_s.grad.norm() > 0
    tensor(True)
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class NST(nn.Module):
    """Squared MMD between the normalised channels of two maps.

    Args:
        kernel: 'poly', 'linear' or 'gaussian'.
        d, c: power (a positive integer) and offset of the polynomial kernel; 2 and 0 are the authors'.

    Shape:
        fm_s: (N, C_s, H_s, W_s), fm_t: (N, C_t, H_t, W_t). Returns a scalar. No gradient reaches fm_t.
        A channel that is zero everywhere counts as the zero vector and gets no gradient.
        Computed in float32, also under TF32 (the gaussian kernel in float64), or in float64 as the student.

    Raises:
        ValueError: unknown kernel; d is not a positive integer; a map is not 4-D; the batch sizes differ.
    """

    def __init__(self, kernel: str = 'poly', d: int = 2, c: float = 0.0) -> None:
        super().__init__()
        if kernel not in _KERNELS:
            raise ValueError(f'NST: kernel must be one of {sorted(_KERNELS)}, got {kernel!r}')
        if d != int(d) or d < 1:
            raise ValueError(f'NST: d must be a positive integer, got {d}')
        self.kernel, self.d, self.c = kernel, int(d), c

    def forward(self, fm_s: Tensor, fm_t: Tensor) -> Tensor:
        _expect('NST', 'fm_s', fm_s, 'N', 'C', 'H', 'W')
        _expect('NST', 'fm_t', fm_t, len(fm_s), 'C', 'H', 'W')
        like = _full(fm_s)
        fm_s, fm_t = _same_size(like, _full(fm_t.detach(), fm_s))
        if self.kernel == 'gaussian':  # distances of channels that are almost alike
            fm_s, fm_t = _double(fm_s), _double(fm_t)
        s, t = _unit(fm_s.flatten(2)), _unit(fm_t.flatten(2))  # (N, C, M)
        with _no_autocast(s):
            loss = _KERNELS[self.kernel](_exact(s), _exact(t), self.d, self.c).mean()
            return loss.to(like.dtype).to(like.device)


def _poly(s: Tensor, t: Tensor, d: int, c: float) -> Tensor:
    c_s, c_t, m = s.shape[1], t.shape[1], s.shape[2]
    if d == 2 and c == 0 and m * (c_s + c_t) < c_s**2 + c_s * c_t + c_t**2:
        # sum over i, j of (s_i.t_j)^2 is the inner product of S^T S and T^T T, so the three sums are one norm
        return (s.mT @ s / c_s - t.mT @ t / c_t).square().sum(dim=(1, 2))
    return _mmd(lambda x, y: (x @ y.mT + c).pow(d), s, t)


def _linear(s: Tensor, t: Tensor, d: int, c: float) -> Tensor:
    return (s.mean(dim=1) - t.mean(dim=1)).square().sum(dim=1)


def _gaussian(s: Tensor, t: Tensor, d: int, c: float) -> Tensor:
    def distance(x, y):
        far = x.square().sum(2)[:, :, None] + y.square().sum(2)[:, None, :] - 2 * x @ y.mT
        return far.clamp(min=0)  # a rounding below 0 over a tiny sigma2 would overflow

    sigma2 = distance(s.detach(), t).mean(dim=(1, 2), keepdim=True).clamp(min=1e-12)
    return _mmd(lambda x, y: torch.exp(-distance(x, y) / (2 * sigma2)), s, t)


_KERNELS = {'poly': _poly, 'linear': _linear, 'gaussian': _gaussian}


def _mmd(k, s: Tensor, t: Tensor) -> Tensor:
    return k(t, t).mean(dim=(1, 2)) + k(s, s).mean(dim=(1, 2)) - 2 * k(s, t).mean(dim=(1, 2))


def _same_size(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Average-pool two maps to the smaller of their heights and of their widths."""
    size = (min(a.shape[2], b.shape[2]), min(a.shape[3], b.shape[3]))
    return tuple(x if x.shape[2:] == size else F.adaptive_avg_pool2d(x, size) for x in (a, b))


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


def _unit(x: Tensor) -> Tensor:
    """Rows divided by their length; a zero row stays zero and gets no gradient."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / norm.masked_fill(norm <= 1e-12, torch.inf)  # NaN is not: it must show in the loss


def _full(x: Tensor, like: Tensor | None = None) -> Tensor:
    """In float32, or float64 if the student (like) is. Inference tensors are copied, to serve backward."""
    x = x.double() if (x if like is None else like).dtype == torch.float64 else x.float()
    compiling = getattr(torch.compiler, 'is_compiling', bool)()  # torch 2.2 cannot tell: False
    return x.clone() if not compiling and x.is_inference() else x
