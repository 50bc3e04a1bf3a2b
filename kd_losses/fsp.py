"""FSP, flow of solution procedure: match how each sample's features change from one layer to a later one.

J. Yim, D. Joo, J. Bae, J. Kim, "A Gift from Knowledge Distillation: Fast Optimization, Network Minimization
and Transfer Learning", CVPR 2017.

    G(a, b)[n, i, j] = mean over h, w of a[n, i, h, w] b[n, j, h, w]       a: earlier map, b: later map
    loss = mean over n, i, j of (G(fm_s1, fm_s2) - G(fm_t1, fm_t2))^2

Tap: pairs of consecutive maps after their ReLU: (stem, stage 1), (stage 1, stage 2), ... Channels must agree
between student and teacher, sizes may differ. The two maps of one network are pooled to the smaller size.
Two stages: this loss alone initialises the student's maps, then cross-entropy alone trains it.

Differences: mean of squares and average pooling, as Knowledge-Distillation-Zoo and RepDistiller have it; the
paper sums over the matrix and pools by maximum (pool='max'). No code of the authors was found.
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
        if fm_s1.dim() != 4:
            raise ValueError(f'FSP: fm_s1 must be (N, C, H, W), got {tuple(fm_s1.shape)}')
        if fm_s2.dim() != 4 or len(fm_s2) != len(fm_s1):
            raise ValueError(f'FSP: fm_s2 must be ({len(fm_s1)}, C, H, W) as fm_s1, got {tuple(fm_s2.shape)}')
        for name, t, s in (('1', fm_t1, fm_s1), ('2', fm_t2, fm_s2)):
            if t.dim() != 4 or t.shape[:2] != s.shape[:2]:
                raise ValueError(
                    f'FSP: fm_t{name} must be ({s.shape[0]}, {s.shape[1]}, H, W), with batch and channels of '
                    f'fm_s{name}, got {tuple(t.shape)}'
                )
        with torch.autocast(fm_s1.device.type, enabled=False):
            g_s = self.matrix(_full(fm_s1), _full(fm_s2))
            g_t = self.matrix(_full(fm_t1.detach()), _full(fm_t2.detach()))
            return F.mse_loss(g_s, g_t)

    def matrix(self, a: Tensor, b: Tensor) -> Tensor:
        """(N, C_1, H, W) and (N, C_2, H', W') -> (N, C_1, C_2)."""
        size = (min(a.shape[2], b.shape[2]), min(a.shape[3], b.shape[3]))
        a, b = (_pool(x, size, self.pool) for x in (a, b))
        return a.flatten(2) @ b.flatten(2).mT / (size[0] * size[1])


def _pool(x: Tensor, size: tuple[int, int], how: str) -> Tensor:
    if x.shape[2:] == size:
        return x
    if x.shape[2] % size[0] == 0 and x.shape[3] % size[1] == 0:  # the same values, cheaper than adaptive
        window = (x.shape[2] // size[0], x.shape[3] // size[1])
        return F.avg_pool2d(x, window) if how == 'avg' else F.max_pool2d(x, window)
    return F.adaptive_avg_pool2d(x, size) if how == 'avg' else F.adaptive_max_pool2d(x, size)


def _full(x: Tensor) -> Tensor:
    """Half precision to float32; float64 stays."""
    return x if x.dtype == torch.float64 else x.float()


# ------------------------------------------ how the training scripts use it; a copied file may drop this


def feed(kd, s, t, batch):
    """From each stage to the next, the stem included."""
    pairs = zip(kd, s.fms, s.fms[1:], t.fms, t.fms[1:])
    return sum(loss(*maps) for loss, *maps in pairs) / len(kd)
