"""LwM, learning without memorizing: match where each network looks for the true class (Grad-CAM).

P. Dhar, R. V. Singh, K.-C. Peng, Z. Wu, R. Chellappa, "Learning without Memorizing", CVPR 2019,
arXiv:1811.08051; its attention distillation loss.

    G = d (sum over n of out[n, target_n]) / d fm         a[n, c] = mean over h, w of G
    M[n] = ReLU(sum over c of a[n, c] * fm[n, c])         Q[n] = M[n] flattened / its length
    loss = mean over n and positions of |Q_s - Q_t|       (the paper sums over positions: reduction='sum')

Tap: logits and a map they depend on (the paper: the last one), labels. Channels may differ; where the sizes
do, the larger M is average-pooled. The gradient passes through a and fm of the student. Best joined to
another loss.

Differences: Knowledge-Distillation-Zoo multiplies the pooled gradient with the gradient instead of the map,
which is not Grad-CAM and is constantly 0 at the last stage; here the activations are weighed. The mean over
positions is that zoo's. No code of the authors was found.

Source: formula only; AberHu/Knowledge-Distillation-Zoo, kd_losses/lwm.py is not Grad-CAM.

Use:
    >>> import torch
    >>> from lwm import LwM
    >>> fm_s, fm_t = (torch.randn(8, 16, 4, 4, requires_grad=True) for _ in 'st')
    >>> out_s, out_t = (fm.square().mean(dim=(2, 3)) @ torch.randn(16, 10) for fm in (fm_s, fm_t))
    >>> LwM()(out_s, fm_s, out_t, fm_t, torch.arange(8)).backward()
    >>> fm_s.grad.norm() > 0
    tensor(True)
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
        gave the logits; target: (N,) labels. cam_t: (N, H_t, W_t), the teacher's `grad_cam`, if it is known
        already; out_t and fm_t are then not used and may be None. Returns a scalar. No gradient reaches the
        teacher.
        Rows of label -100 are left out. Computed in float32, or in float64 as the student.

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
        _expect('LwM', 'out_s', out_s, 'N', 'C')
        n = len(out_s)
        _, valid = _labels('LwM', target, n, out_s.shape[1])
        cam_s = grad_cam(out_s, fm_s, target, create_graph=True, side='s')
        if cam_t is None:
            if out_t is None or fm_t is None:
                raise ValueError('LwM: out_t and fm_t must be given, got None: or else cam_t')
            _expect('LwM', 'out_t', out_t, n, 'C')
            cam_t = grad_cam(out_t, fm_t, target, side='t')
        else:
            _expect('LwM', 'cam_t', cam_t, n, 'H', 'W')
        size = tuple(map(min, cam_s.shape[1:], cam_t.shape[1:]))
        q_s, q_t = (_unit(_pool(m, size).flatten(1)) for m in (cam_s, _full(cam_t.detach(), cam_s)))
        loss = _mean((q_s - q_t).abs().mean(dim=1), valid)
        return loss if self.reduction == 'mean' else loss * q_s.shape[1]


def grad_cam(out: Tensor, fm: Tensor, target: Tensor, create_graph: bool = False, side: str = 's') -> Tensor:
    """(N, H, W), not normalised; the graph of out survives. side names the network in messages."""
    _expect('LwM', f'out_{side}', out, 'N', 'C')
    _expect('LwM', f'fm_{side}', fm, len(out), 'C', 'H', 'W')
    target, valid = _labels('LwM', target, *out.shape)
    grad = None
    if fm.requires_grad and out.requires_grad and torch.is_grad_enabled():
        chosen = out.gather(1, target[:, None])
        chosen = (chosen if valid is None else torch.where(valid[:, None], chosen, 0.0)).sum()
        with _no_autocast(out):  # the layers after the map would round their gradient
            (grad,) = torch.autograd.grad(
                chosen, fm, create_graph=create_graph, retain_graph=True, allow_unused=True
            )
    if grad is None:
        raise ValueError(
            f'LwM: out_{side} must depend on fm_{side}, and fm_{side} must require grad, got no gradient: a '
            'frozen teacher needs an image that requires grad, or a detached map that does and '
            'the rest of the network on it; an evaluation needs torch.enable_grad()'
        )
    weight = _full(grad, out).mean(dim=(2, 3), keepdim=True)
    cam = (weight * _full(fm, out)).sum(dim=1)
    return cam.relu() + 0 * cam.detach()  # the ReLU would swallow -inf, which must show


def _pool(m: Tensor, size: tuple[int, int]) -> Tensor:
    return m if m.shape[1:] == size else F.adaptive_avg_pool2d(m[:, None], size)[:, 0]


def _no_autocast(x: Tensor) -> torch.autocast:
    """Matrix products and convolutions in the precision of their tensors; there is no autocast on meta."""
    return torch.autocast('cpu' if x.is_meta else x.device.type, enabled=False)


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


def _labels(who: str, target: Tensor, n: int, K: int, name: str = 'target') -> tuple[Tensor, Tensor | None]:
    """n labels of 0..K-1 as int64, and which rows count, None for all: not those of -100, which are 0 then.

    Other labels are refused, but on a GPU, where looking at them would wait, only by the kernels.
    """
    _expect(who, name, target, n)
    if target.is_floating_point():
        raise ValueError(f'{who}: {name} must be ({n},) of integers, got {target.dtype}: {name}.long()')
    target, compiling = target.long(), getattr(torch.compiler, 'is_compiling', bool)()
    if not compiling and target.is_inference():  # what a teacher says under inference_mode: for backward
        target = target.clone()
    if target.device.type == 'cpu' and not compiling:
        (lowest,), (highest,) = (y.tolist() for y in target.aminmax(dim=0, keepdim=True))
        if lowest >= 0 and highest < K:
            return target, None
        for y in target.tolist():
            if y != -100 and not 0 <= y < K:
                raise ValueError(f'{who}: {name} must be in 0..{K - 1}, or -100 to leave a row out, got {y}')
    valid = target != -100
    return torch.where(valid, target, 0), valid


def _mean(rows: Tensor, valid: Tensor | None) -> Tensor:
    """Over the rows (N, ...) that count; 0 if none does."""
    if valid is None:
        return rows.mean(dim=0)
    counts = valid.reshape(-1, *[1] * (rows.dim() - 1))
    return torch.where(counts, rows, 0.0).sum(dim=0) / valid.sum().clamp(min=1)


def _unit(x: Tensor) -> Tensor:
    """Rows divided by their length; a zero row stays zero and gets no gradient."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / norm.masked_fill(norm <= 1e-12, torch.inf)  # NaN is not: it must show in the loss


def _full(x: Tensor, like: Tensor | None = None) -> Tensor:
    """In float32, or float64 if the student (like) is. Inference tensors are copied, to serve backward."""
    x = x.double() if (x if like is None else like).dtype == torch.float64 else x.float()
    compiling = getattr(torch.compiler, 'is_compiling', bool)()  # torch 2.2 cannot tell: False
    return x.clone() if not compiling and x.is_inference() else x


# ------------------------------------------ how the training scripts use it; a copied file may drop this


def feed(kd, s, t, batch):
    return kd(batch.raw.out, batch.raw.fms[-1], None, None, batch.target, batch.from_teacher)


def teacher_map(net_t, t, batch):
    """The teacher's attention, once for all students."""
    with torch.enable_grad():
        fm = t.fms[-1].detach().requires_grad_()
        return grad_cam(net_t.after(len(t.fms) - 1, fm).out, fm, batch.target, side='t')
