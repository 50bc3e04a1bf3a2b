"""Sub-task extraction: keep some of a teacher's classes and unlearn the others.

No paper was found; a part of KamalEngine (2024), the reverse of amalgamation.

    sub = kl(out_s, out_t on the wanted classes);  adv = kl(out_adv, out_t on the other classes)
    kl(s, t) = T^2 mean over n of KL(softmax(t / T) || softmax(s / T)); teacher renormalised in each subset
    student:  loss = sub - lambda_adv adv           (`forward`; step the student only)
    head:     loss = lambda_adv adv                 (`adv_loss`, on the detached feature; step the head only)

The adversarial head is a linear layer on the student's pooled feature: if it cannot tell the other classes,
the feature has no trace of them and cannot be transferred to them.

Tap: logits of student, head and teacher; images of all classes, no labels.

Differences: the objective without KamalEngine's hooks, which it registers anew at every step. -adv is
unbounded below: adv_cap is ours, the largest value that still gives a gradient to the student.
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
        if out_t.dim() != 2 or out_t.shape[1] != total:
            raise ValueError(f'SubTask: out_t must be (N, {total}), got {tuple(out_t.shape)}')
        if out.shape != (len(out_t), len(classes)):
            raise ValueError(f'SubTask: {name} must be {(len(out_t), len(classes))}, got {tuple(out.shape)}')
        log_q = F.log_softmax(_full(out) / self.T, dim=1)
        log_p = F.log_softmax(_full(out_t.detach())[:, classes] / self.T, dim=1)
        p = log_p.exp()
        return torch.where(p > 0, p * (log_p - log_q), 0.0).sum(dim=1).mean() * self.T**2


def _full(x: Tensor) -> Tensor:
    """Half precision to float32; float64 stays."""
    return x if x.dtype == torch.float64 else x.float()
