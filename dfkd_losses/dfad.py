"""DFAD, data-free adversarial distillation: a generator looks for images on which the student is wrong.

G. Fang, J. Song, C. Shen, X. Wang, D. Chen, M. Song, "Data-Free Adversarial Distillation", 2019,
arXiv:1912.11006.

    loss = mean over n, k of |out_s - out_t|                                the student's
    generator_loss = - loss, or - log(loss + 1) with log=True

Tap: the raw logits of student and teacher on the generated batch. Five updates of the student, each on fresh
images, then one of the generator.

Differences: in generator_loss NOTHING is detached, its gradient reaches the images through both networks.
log=True stands in the authors' script as a comment; it keeps the generator's gradient small while the student
is far off.

Source: VainF/Data-Free-Adversarial-Distillation, DFAD_cifar.py.

Use:
    >>> import torch
    >>> from dfad import DFAD
    >>> out_s, out_t = torch.randn(8, 10, requires_grad=True), torch.randn(8, 10)
    >>> DFAD()(out_s, out_t).backward()
    >>> out_s.grad.norm() > 0
    tensor(True)
"""

import torch
from torch import Tensor, nn


class DFAD(nn.Module):
    """The mean absolute difference of logits: small for the student, large for the generator.

    Args:
        log: the generator's loss is -log(1 + difference), False.

    Shape:
        out_s, out_t: (N, K), equal. Returns a scalar. forward: no gradient reaches out_t; generator_loss:
        gradients reach both. Computed in float32, or in float64 as the student.

    Raises:
        ValueError: the shapes differ or are not (N, K).
    """

    def __init__(self, log: bool = False) -> None:
        super().__init__()
        self.log = log

    def forward(self, out_s: Tensor, out_t: Tensor) -> Tensor:
        return self._difference(out_s, out_t.detach())

    def generator_loss(self, out_s: Tensor, out_t: Tensor) -> Tensor:
        difference = self._difference(out_s, out_t)
        return -difference.log1p() if self.log else -difference

    def _difference(self, out_s: Tensor, out_t: Tensor) -> Tensor:
        _expect('DFAD', 'out_s', out_s, 'N', 'K')
        _expect('DFAD', 'out_t', out_t, *out_s.shape)
        return (_full(out_s) - _full(out_t, out_s)).abs().mean()


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


# ------------------------------------------ how the training scripts use it; a copied file may drop this


def feed(kd, made):
    return {'adv': kd.generator_loss(made.s.out, made.t.out)}


def student(kd, s, t, T):
    return kd(s.out, t.out)
