"""FSP, flow of solution procedure: match how each sample's features change from one layer to a later one.

J. Yim, D. Joo, J. Bae, J. Kim, "A Gift from Knowledge Distillation: Fast Optimization, Network Minimization
and Transfer Learning", CVPR 2017.

    G(a, b)[n, i, j] = mean over h, w of a[n, i, h, w] * b[n, j, h, w]     a: earlier map, b: later map
    loss = mean over n, i, j of (G(fm_s1, fm_s2) - G(fm_t1, fm_t2))^2

Tap: pairs of consecutive maps after their ReLU: (stem, stage 1), (stage 1, stage 2), ... Channels must agree
between student and teacher, sizes may differ. The two maps of one network are pooled to the smaller size. Two
phases: the first trains with this loss alone and leaves the classifier untouched; the second trains with
cross-entropy alone and a new optimiser.

Differences: mean of squares and average pooling, as Knowledge-Distillation-Zoo and RepDistiller have it; the
paper sums over the matrix and pools by maximum (pool='max'). No code of the authors was found.

Source: AberHu/Knowledge-Distillation-Zoo, kd_losses/fsp.py; pool='max': yoshitomo-matsubara/torchdistill,
mid_level.py (FSPLoss).

Use:
    >>> import torch
    >>> from fsp import FSP
    >>> fm_s1, fm_s2 = torch.randn(8, 16, 8, 8, requires_grad=True), torch.randn(8, 32, 4, 4)
    >>> fm_t1, fm_t2 = torch.randn(8, 16, 8, 8), torch.randn(8, 32, 4, 4)
    >>> FSP()(fm_s1, fm_s2, fm_t1, fm_t2).backward()
    >>> fm_s1.grad.norm() > 0
    tensor(True)
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FSP(nn.Module):
    """Mean squared difference of FSP matrices, for one pair of layers.

    Args:
        pool: 'avg' or 'max', how the larger of a network's two maps gets the smaller one's size.

    Shape:
        fm_s1, fm_t1: (N, C_1, H, W), fm_s2, fm_t2: (N, C_2, H', W'); any sizes. Returns a scalar. No gradient
        reaches fm_t1 and fm_t2.
        Computed in float32, also under TF32, or in float64 as the student.

    Raises:
        ValueError: pool is neither; a map is not 4-D; batch sizes differ, or the teacher's channels from the
            student's.
    """

    def __init__(self, pool: str = 'avg') -> None:
        super().__init__()
        if pool not in ('avg', 'max'):
            raise ValueError(f'FSP: pool must be "avg" or "max", got {pool!r}')
        self.pool = pool

    def forward(self, fm_s1: Tensor, fm_s2: Tensor, fm_t1: Tensor, fm_t2: Tensor) -> Tensor:
        _expect('FSP', 'fm_s1', fm_s1, 'N', 'C', 'H', 'W')
        _expect('FSP', 'fm_s2', fm_s2, len(fm_s1), 'C', 'H', 'W')
        _expect('FSP', 'fm_t1', fm_t1, *fm_s1.shape[:2], 'H', 'W')
        _expect('FSP', 'fm_t2', fm_t2, *fm_s2.shape[:2], 'H', 'W')
        with _no_autocast(fm_s1):
            g_s = self.matrix(_full(fm_s1), _full(fm_s2, fm_s1))
            g_t = self.matrix(_full(fm_t1.detach(), fm_s1), _full(fm_t2.detach(), fm_s1))
            return F.mse_loss(g_s, g_t)

    def matrix(self, a: Tensor, b: Tensor) -> Tensor:
        """(N, C_1, H, W) and (N, C_2, H', W') -> (N, C_1, C_2)."""
        size = (min(a.shape[2], b.shape[2]), min(a.shape[3], b.shape[3]))
        a, b = (_pool(x, size, self.pool) for x in (a, b))
        return (_exact(a.flatten(2)) @ _exact(b.flatten(2)).mT).to(a.dtype) / (size[0] * size[1])


def _pool(x: Tensor, size: tuple[int, int], how: str) -> Tensor:
    if x.shape[2:] == size:
        return x
    if x.shape[2] % size[0] == 0 and x.shape[3] % size[1] == 0:  # the same values, cheaper than adaptive
        window = (x.shape[2] // size[0], x.shape[3] // size[1])
        return F.avg_pool2d(x, window) if how == 'avg' else F.max_pool2d(x, window)
    return F.adaptive_avg_pool2d(x, size) if how == 'avg' else F.adaptive_max_pool2d(x, size)


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
    """From each stage to the next, the stem included."""
    pairs = zip(kd, s.fms, s.fms[1:], t.fms, t.fms[1:])
    return sum(loss(*maps) for loss, *maps in pairs) / len(kd)
