"""Logits: regress the teacher's class scores.

J. Ba, R. Caruana, "Do Deep Nets Really Need to be Deep?", NeurIPS 2014, arXiv:1312.6184.

    loss = mean over n and k of (out_s[n, k] - out_t[n, k])^2

Tap: the logits, before any softmax. Unlike soft targets the absolute level of the logits counts.

Differences: the paper sums over classes and halves, so its value is K/2 times ours; the mean is the form of
Knowledge-Distillation-Zoo. Going from 10 to 100 classes weakens the pull on each logit ten times.

Source: AberHu/Knowledge-Distillation-Zoo, kd_losses/logits.py.

Use:
    >>> import torch
    >>> from logits import Logits
    >>> out_s, out_t = torch.randn(8, 10, requires_grad=True), torch.randn(8, 10)
    >>> Logits()(out_s, out_t).backward()
    >>> out_s.grad.norm() > 0
    tensor(True)
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Logits(nn.Module):
    """Mean squared error between class scores. No hyperparameters.

    Shape:
        out_s, out_t: (N, K), equal. Returns a scalar. No gradient reaches out_t.
        Computed in float32, or in float64 as the student.

    Raises:
        ValueError: the shapes differ or are not (N, K).
    """

    def forward(self, out_s: Tensor, out_t: Tensor) -> Tensor:
        _expect('Logits', 'out_s', out_s, 'N', 'C')  # one class is legal: nothing is a softmax
        _expect('Logits', 'out_t', out_t, *out_s.shape)
        return F.mse_loss(_full(out_s), _full(out_t.detach(), out_s))


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
