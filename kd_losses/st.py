"""ST, soft targets: match the teacher's temperature-softened class probabilities.

G. Hinton, O. Vinyals, J. Dean, "Distilling the Knowledge in a Neural Network", NIPS 2014 Deep Learning
Workshop, arXiv:1503.02531.

    p = softmax(out / T) over the classes
    loss = T^2 * mean over n of sum over k of p_t * (log p_t - log p_s)      (KL from teacher to student)

Tap: the logits. T^2 keeps the size of the gradient when T changes. This is the "KD" of "method + KD".

Differences: none from Knowledge-Distillation-Zoo, RepDistiller, mdistiller. A teacher logit of -inf (a masked
class) is a legal zero probability and contributes 0.

Source: AberHu/Knowledge-Distillation-Zoo, kd_losses/st.py (SoftTarget), and HobbitLong/RepDistiller,
distiller_zoo/KD.py (DistillKL), which agree.

Use:
    >>> import torch
    >>> from st import SoftTarget
    >>> out_s, out_t = torch.randn(8, 10, requires_grad=True), torch.randn(8, 10)
    >>> SoftTarget()(out_s, out_t).backward()
    >>> out_s.grad.norm() > 0
    tensor(True)
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SoftTarget(nn.Module):
    """KL divergence of softened probabilities, times T squared.

    Args:
        T: temperature, > 0; 4 is usual on CIFAR, 1 on ImageNet.

    Shape:
        out_s, out_t: (N, K), equal. Returns a scalar. No gradient reaches out_t.
        Computed in float32, or in float64 as the student.

    Raises:
        ValueError: T is not positive; the shapes differ or are not (N, K).
    """

    def __init__(self, T: float = 4.0) -> None:
        super().__init__()
        if not T > 0:
            raise ValueError(f'SoftTarget: T must be > 0, got {T}')
        self.T = T

    def forward(self, out_s: Tensor, out_t: Tensor) -> Tensor:
        _expect('SoftTarget', 'out_s', out_s, 'N', 'K')
        _expect('SoftTarget', 'out_t', out_t, *out_s.shape)
        z_s, z_t = _full(out_s) / self.T, _full(out_t.detach(), out_s) / self.T
        log_p_s, log_p_t, p_t = F.log_softmax(z_s, dim=1), F.log_softmax(z_t, dim=1), F.softmax(z_t, dim=1)
        # where p_t is 0 the term is 0, although log p_t is -inf there
        kl = torch.where(p_t == 0, 0.0, p_t * (log_p_t - log_p_s))
        return kl.sum() * (self.T**2 / len(kl))


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
