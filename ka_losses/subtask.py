"""Sub-task extraction: keep some of a teacher's classes and unlearn the others.

No paper was found; a part of KamalEngine (2024), the reverse of amalgamation.

    sub = kl(out_s, out_t on the wanted classes)
    adv = kl(out_adv, out_t on the other classes)
    kl(s, t) = T^2 * mean over n of KL(softmax(t / T) || softmax(s / T)); teacher renormalised in each subset
    student:  loss = sub - lambda_adv * adv         (`forward`; step the student only)
    head:     loss = lambda_adv * adv               (`adv_loss`, on the detached feature; step the head only)

The adversarial head is a linear layer on the student's pooled feature: if it cannot tell the other classes,
the feature has no trace of them and cannot be transferred to them.

Tap: logits of student, head and teacher; images of all classes, no labels.

Differences: the objective without KamalEngine's hooks, which it registers anew at every step. -adv is
unbounded below: adv_cap is ours, the largest value that still gives a gradient to the student.

Source: zju-vipa/KamalEngine, kamal/amalgamation/subtask.py (SubTaskAdvTrainer).

Use:
    >>> import torch
    >>> from subtask import SubTask
    >>> out_s, out_adv, out_t = torch.randn(8, 2, requires_grad=True), torch.randn(8, 4), torch.randn(8, 6)
    >>> SubTask([0, 3], 6)(out_s, out_adv, out_t).backward()
    >>> out_s.grad.norm() > 0
    tensor(True)
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SubTask(nn.Module):
    """Keep the wanted classes' soft targets, move away from the others'.

    Args:
        sub_classes: the wanted ones; the head has the others, in ascending order.
        num_classes: of the teacher, K.
        lambda_adv: weight of unlearning, 0.5.
        T: temperature, > 0.
        adv_cap: see above; None: no limit.

    Shape:
        out_s: (N, number wanted); out_adv: (N, K - number wanted); out_t: (N, K). Returns a scalar, with
        return_terms=True also {'sub', 'adv'}. No gradient reaches out_t.
        Computed in float32, or in float64 as the student.

    Raises:
        ValueError: classes outside 0..K-1, twice, or none left; T not positive; shapes that do not meet.
    """

    def __init__(
        self,
        sub_classes: list[int],
        num_classes: int,
        lambda_adv: float = 0.5,
        T: float = 1.0,
        adv_cap: float | None = None,
    ) -> None:
        super().__init__()
        wanted = sorted(set(sub_classes))
        if (
            len(wanted) != len(sub_classes)
            or not 0 < len(wanted) < num_classes
            or wanted[0] < 0
            or wanted[-1] >= num_classes
        ):
            raise ValueError(
                f'SubTask: sub_classes must be distinct, some but not all of 0..{num_classes - 1}, '
                f'got {list(sub_classes)}'
            )
        if not 2 <= len(wanted) <= num_classes - 2:
            raise ValueError(
                f'SubTask: sub_classes must be two or more, and leave two or more of {num_classes}, '
                f'got {list(sub_classes)}: a softmax over one class is constant'
            )
        if not T > 0:
            raise ValueError(f'SubTask: T must be > 0, got {T}')
        self.lambda_adv, self.T, self.adv_cap = lambda_adv, T, adv_cap
        others = [k for k in range(num_classes) if k not in wanted]
        self.register_buffer('sub', torch.tensor(list(sub_classes)), persistent=False)
        self.register_buffer('others', torch.tensor(others), persistent=False)

    def forward(self, out_s: Tensor, out_adv: Tensor, out_t: Tensor, return_terms: bool = False):
        sub, adv = self._kl('out_s', out_s, out_t, self.sub), self._kl('out_adv', out_adv, out_t, self.others)
        away = adv if self.adv_cap is None else adv.clamp(max=self.adv_cap)
        loss = sub - self.lambda_adv * away
        return (loss, {'sub': sub, 'adv': adv}) if return_terms else loss

    def adv_loss(self, out_adv: Tensor, out_t: Tensor) -> Tensor:
        """The head's own loss."""
        return self.lambda_adv * self._kl('out_adv', out_adv, out_t, self.others)

    def _kl(self, name: str, out: Tensor, out_t: Tensor, classes: Tensor) -> Tensor:
        total = len(self.sub) + len(self.others)
        _expect('SubTask', 'out_t', out_t, 'N', total)
        _expect('SubTask', name, out, len(out_t), len(classes))
        log_q = F.log_softmax(_full(out) / self.T, dim=1)
        log_p = F.log_softmax(_full(out_t.detach(), out)[:, classes] / self.T, dim=1)
        p = log_p.exp()
        return torch.where(p == 0, 0.0, p * (log_p - log_q)).sum(dim=1).mean() * self.T**2


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
