"""LwM, learning without memorizing: match where each network looks for the true class (Grad-CAM).

P. Dhar, R. V. Singh, K.-C. Peng, Z. Wu, R. Chellappa, "Learning without Memorizing", CVPR 2019,
arXiv:1811.08051; its attention distillation loss.

    G = d (sum over n of out[n, target_n]) / d fm         a[n, c] = mean over h, w of G
    M[n] = ReLU(sum over c of a[n, c] fm[n, c])           Q[n] = M[n] flattened / its length
    loss = mean over n and positions of |Q_s - Q_t|       (the paper sums over positions: reduction='sum')

Tap: logits and a map they depend on (the paper: the last one), labels. Channels may differ; where the sizes
do, the larger M is average-pooled. The gradient passes through a and fm of the student. Best joined to
another loss.

Differences: Knowledge-Distillation-Zoo multiplies the pooled gradient with the gradient instead of the map,
which is not Grad-CAM and is constantly 0 at the last stage; here the activations are weighed. The mean over
positions is the zoo's. No code of the authors was found.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LwM(nn.Module):
    """Mean absolute difference of normalised class activation maps of the target class.

    Args:
        reduction: 'mean' over samples and positions, or 'sum' over positions and mean over samples.

    Shape:
        out_s, out_t: (N, K); fm_s: (N, C_s, H_s, W_s), fm_t: (N, C_t, H_t, W_t), nodes of the graphs that
        gave the logits; target: (N,) int64. cam_t: (N, H_t, W_t), the teacher's `grad_cam`, if it is known
        already; out_t and fm_t are then not used and may be None. Returns a scalar. No gradient reaches the
        teacher.

    Raises:
        ValueError: reduction is neither; shapes do not fit; a map does not require grad or its logits do not
            depend on it.
    """

    def __init__(self, reduction: str = 'mean') -> None:
        super().__init__()
        if reduction not in ('mean', 'sum'):
            raise ValueError(f'LwM: reduction must be "mean" or "sum", got {reduction!r}')
        self.reduction = reduction

    def forward(
        self,
        out_s: Tensor,
        fm_s: Tensor,
        out_t: Tensor | None,
        fm_t: Tensor | None,
        target: Tensor,
        cam_t: Tensor | None = None,
    ) -> Tensor:
        if out_s.dim() != 2:
            raise ValueError(f'LwM: out_s must be (N, K), got {tuple(out_s.shape)}')
        n = len(out_s)
        if target.shape != (n,) or target.is_floating_point():
            raise ValueError(
                f'LwM: target must be ({n},) of integers as out_s {tuple(out_s.shape)} says, '
                f'got {tuple(target.shape)} of {target.dtype}'
            )
        cam_s = grad_cam(out_s, fm_s, target, create_graph=True, side='s')
        if cam_t is None:
            if out_t is None or fm_t is None or len(out_t) != n:
                shape = None if out_t is None else tuple(out_t.shape)
                raise ValueError(f'LwM: out_t must be ({n}, K) as out_s, got {shape}')
            cam_t = grad_cam(out_t, fm_t, target, side='t')
        elif cam_t.dim() != 3 or len(cam_t) != n:
            raise ValueError(f'LwM: cam_t must be ({n}, H, W), got {tuple(cam_t.shape)}')
        size = tuple(map(min, cam_s.shape[1:], cam_t.shape[1:]))
        q_s, q_t = (_unit(_pool(m, size).flatten(1)) for m in (cam_s, _full(cam_t.detach())))
        loss = F.l1_loss(q_s, q_t)
        return loss if self.reduction == 'mean' else loss * q_s.shape[1]


def grad_cam(out: Tensor, fm: Tensor, target: Tensor, create_graph: bool = False, side: str = 's') -> Tensor:
    """(N, H, W), not normalised; the graph of out survives. side names the network in messages."""
    if out.dim() != 2:
        raise ValueError(f'LwM: out_{side} must be (N, K), got {tuple(out.shape)}')
    if fm.dim() != 4 or len(fm) != len(out):
        raise ValueError(f'LwM: fm_{side} must be ({len(out)}, C, H, W), got {tuple(fm.shape)}')
    grad = None
    if fm.requires_grad and out.requires_grad:
        chosen = out.gather(1, target[:, None]).sum()
        (grad,) = torch.autograd.grad(
            chosen, fm, create_graph=create_graph, retain_graph=True, allow_unused=True
        )
    if grad is None:
        raise ValueError(
            f'LwM: out_{side} must depend on fm_{side}, and fm_{side} must require grad: a frozen teacher '
            'needs an image that requires grad, or a detached map that does and the rest of the network on it'
        )
    weight = _full(grad).mean(dim=(2, 3), keepdim=True)
    return (weight * _full(fm)).sum(dim=1).relu()


def _pool(m: Tensor, size: tuple[int, int]) -> Tensor:
    return m if m.shape[1:] == size else F.adaptive_avg_pool2d(m[:, None], size)[:, 0]


def _unit(x: Tensor) -> Tensor:
    """Rows divided by their length; a zero row stays zero and gets no gradient."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    alive = norm > 1e-12
    return torch.where(alive, x / torch.where(alive, norm, 1.0), 0.0)


def _full(x: Tensor) -> Tensor:
    """Half precision to float32; float64 stays."""
    return x if x.dtype == torch.float64 else x.float()


# ------------------------------------------ how the training scripts use it; a copied file may drop this


def feed(kd, s, t, batch):
    return kd(batch.raw.out, batch.raw.fms[-1], None, None, batch.target, batch.from_teacher)


def teacher_map(net_t, t, batch):
    """The teacher's attention, once for all students."""
    with torch.enable_grad():
        fm = t.fms[-1].detach().requires_grad_()
        return grad_cam(net_t.after(len(t.fms) - 1, fm).out, fm, batch.target, side='t')
