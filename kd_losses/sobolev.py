"""Sobolev training: match how the logit of the true class reacts to every pixel.

W. M. Czarnecki, S. Osindero, M. Jaderberg, G. Swirszcz, R. Pascanu, "Sobolev Training for Neural Networks",
NIPS 2017, arXiv:1706.04859; S. Srinivas, F. Fleuret, "Knowledge Transfer with Jacobian Matching", ICML 2018,
arXiv:1803.00443.

    J[n] = d out[n, target_n] / d img[n]             j[n] = J[n] flattened / its length
    loss = mean over n and pixels of (j_s - j_t)^2

Tap: logits, labels, and the images themselves, on which `img.requires_grad_()` was called before both forward
passes. Any two architectures. Best joined to another loss. Costs a second backward pass through the student.

Differences: the classification form of Knowledge-Distillation-Zoo, which joins the two papers; the teacher's
gradient is taken without a graph of its own (same value, half the memory). In training mode batch norm
couples the samples, so J is the gradient of the sum of the chosen logits, as in that zoo. A zero gradient
stays zero.

Source: AberHu/Knowledge-Distillation-Zoo, kd_losses/sobolev.py; no code of the authors was found.

Use:
    >>> import torch
    >>> from sobolev import Sobolev
    >>> img, w = torch.randn(8, 48, requires_grad=True), torch.randn(48, 10, requires_grad=True)
    >>> out_s, out_t = (img @ w).tanh(), (img @ torch.randn(48, 10)).tanh()
    >>> Sobolev()(out_s, out_t, img, torch.arange(8)).backward()
    >>> w.grad.norm() > 0
    tensor(True)
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Sobolev(nn.Module):
    """Mean squared difference of normalised input gradients of the target logit.

    Shape:
        out_s, out_t: (N, K), computed from img in the graph that is still alive; img: (N, C, H, W), requires
        grad; target: (N,) labels. jac_t: (N, C, H, W), the teacher's `input_gradient`, if it is known
        already; out_t is then not used and may be None. Returns a scalar. No gradient reaches the teacher.
        Rows of label -100 are left out. Computed in float32, or in float64 as the student.

    Raises:
        ValueError: shapes do not fit; img does not require grad, or the logits do not depend on it.
    """

    def forward(
        self, out_s: Tensor, out_t: Tensor | None, img: Tensor, target: Tensor, jac_t: Tensor | None = None
    ) -> Tensor:
        _expect('Sobolev', 'out_s', out_s, 'N', 'C')
        _expect('Sobolev', 'img', img, len(out_s), *'D' * (img.dim() - 1 or 1))
        classes = out_s.shape[1]
        if jac_t is not None:
            _expect('Sobolev', 'jac_t', jac_t, *img.shape)
        elif out_t is None:
            raise ValueError('Sobolev: out_t must be given, got None: or else jac_t')
        else:
            _expect('Sobolev', 'out_t', out_t, len(out_s), 'C')
            classes = min(classes, out_t.shape[1])
        target, valid = _labels('Sobolev', target, len(out_s), classes)
        if jac_t is None:
            jac_t = _gradient(out_t, img, target, valid)
        jac_s = _gradient(out_s, img, target, valid, create_graph=True)
        j_s, j_t = (_unit(_full(j, out_s).flatten(1)) for j in (jac_s, jac_t.detach()))
        if valid is None:
            return F.mse_loss(j_s, j_t)
        return _mean((j_s - j_t).square().mean(dim=1), valid)


def input_gradient(out: Tensor, img: Tensor, target: Tensor, create_graph: bool = False) -> Tensor:
    """d (sum over n of out[n, target_n]) / d img, of img's shape; the graph of out survives."""
    return _gradient(out, img, *_labels('Sobolev', target, *out.shape), create_graph)


def _gradient(
    out: Tensor, img: Tensor, target: Tensor, valid: Tensor | None, create_graph: bool = False
) -> Tensor:
    grad = None
    if img.requires_grad and out.requires_grad and torch.is_grad_enabled():
        chosen = out.gather(1, target[:, None])
        chosen = (chosen if valid is None else torch.where(valid[:, None], chosen, 0.0)).sum()
        with _no_autocast(out):  # the network's layers would round their gradient
            (grad,) = torch.autograd.grad(
                chosen, img, create_graph=create_graph, retain_graph=True, allow_unused=True
            )
    if grad is None:
        raise ValueError(
            'Sobolev: the logits must depend on img, got no gradient: call img.requires_grad_() '
            'before both forward passes and run the teacher with gradients enabled; so must be an evaluation'
        )
    return grad


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
    return kd(batch.raw.out, None, batch.img, batch.target, batch.from_teacher)


def teacher_gradient(net_t, t, batch):
    """Of the teacher's logits, with respect to the images: once for all students."""
    with torch.enable_grad():
        img = batch.img.detach().requires_grad_()
        return input_gradient(batch.teacher(img).out, img, batch.target)
