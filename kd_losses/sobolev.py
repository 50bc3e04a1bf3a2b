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
couples the samples, so J is the gradient of the sum of the chosen logits, as there. A zero gradient stays
zero.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Sobolev(nn.Module):
    """Mean squared difference of normalised input gradients of the target logit.

    Shape:
        out_s, out_t: (N, K), computed from img in the graph that is still alive; img: (N, C, H, W), requires
        grad; target: (N,) int64. jac_t: (N, C, H, W), the teacher's `input_gradient`, if it is known already;
        out_t is then not used and may be None. Returns a scalar. No gradient reaches the teacher.

    Raises:
        ValueError: shapes do not fit; img does not require grad, or the logits do not depend on it.
    """

    def forward(
        self, out_s: Tensor, out_t: Tensor | None, img: Tensor, target: Tensor, jac_t: Tensor | None = None
    ) -> Tensor:
        if out_s.dim() != 2 or img.dim() < 2 or len(img) != len(out_s):
            shapes = f'{tuple(out_s.shape)} and {tuple(img.shape)}'
            raise ValueError(f'Sobolev: out_s and img must be (N, K) and (N, C, H, W), got {shapes}')
        if target.shape != out_s.shape[:1] or target.is_floating_point():
            raise ValueError(
                f'Sobolev: target must be ({len(out_s)},) of integers, '
                f'got {tuple(target.shape)} of {target.dtype}'
            )
        if jac_t is None:
            if out_t is None or out_t.dim() != 2 or len(out_t) != len(out_s):
                shape = None if out_t is None else tuple(out_t.shape)
                raise ValueError(f'Sobolev: out_t must be ({len(out_s)}, K) as out_s, got {shape}')
            jac_t = input_gradient(out_t, img, target)
        elif jac_t.shape != img.shape:
            raise ValueError(f'Sobolev: jac_t must be {tuple(img.shape)} as img, got {tuple(jac_t.shape)}')
        jac_s = input_gradient(out_s, img, target, create_graph=True)
        return F.mse_loss(_unit(_full(jac_s).flatten(1)), _unit(_full(jac_t.detach()).flatten(1)))


def input_gradient(out: Tensor, img: Tensor, target: Tensor, create_graph: bool = False) -> Tensor:
    """d (sum over n of out[n, target_n]) / d img, of img's shape; the graph of out survives."""
    grad = None
    if img.requires_grad and out.requires_grad:
        chosen = out.gather(1, target[:, None]).sum()
        (grad,) = torch.autograd.grad(
            chosen, img, create_graph=create_graph, retain_graph=True, allow_unused=True
        )
    if grad is None:
        raise ValueError(
            'Sobolev: the logits must depend on img: call img.requires_grad_() before both forward passes '
            'and run the teacher with gradients enabled'
        )
    return grad


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
    return kd(batch.raw.out, None, batch.img, batch.target, batch.from_teacher)


def teacher_gradient(net_t, t, batch):
    """Of the teacher's logits, with respect to the images: once for all students."""
    with torch.enable_grad():
        img = batch.img.detach().requires_grad_()
        return input_gradient(batch.teacher(img).out, img, batch.target)
