"""PLD, Plackett-Luce distillation: rank the classes as label first, then as the teacher does.

E. Bassam, D. Zhu, K. Bian, "PLD: A Choice-Theoretic List-Wise Knowledge Distillation", NeurIPS 2025,
arXiv:2506.12542.

    order = the label, then the other classes by descending teacher logit
    s_r = out_s of the r-th class of the order, q_r = softmax(out_t / tau) of it
    loss = mean over n of sum over r of q_r * (log of the sum over j >= r of exp(s_j) - s_r)

Tap: the logits, and the labels. The first step is the label's cross-entropy, weighed by the teacher's
probability of it, so the loss replaces cross-entropy.

Differences: the paper's listing. Where the teacher is badly wrong, the label's step has hardly any weight and
nothing stands for it: add cross-entropy if that matters. q is not renormalised.

Cost: one sort; the sums over the rest of the order are one cumulative log-sum-exp.

Source: formula only, the listing in the paper's appendix C; no repository was found.

Use:
    >>> import torch
    >>> from pld import PLD
    >>> out_s, out_t = torch.randn(8, 10, requires_grad=True), torch.randn(8, 10)
    >>> PLD()(out_s, out_t, torch.arange(8)).backward()
    >>> out_s.grad.norm() > 0
    tensor(True)
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PLD(nn.Module):
    """Negative log-likelihood of the teacher's ranking, each step weighed by the teacher's probability.

    Args:
        tau: temperature of the teacher's probabilities, > 0; 1 on ImageNet, 4 on CIFAR-100.

    Shape:
        out_s, out_t: (N, K), equal, K >= 2; target: (N,) labels. Returns a scalar. No gradient reaches out_t.
        A teacher logit of -inf is probability 0; the student's must be finite. `order(out_t, target)` returns
        (N, K) classes. Rows of label -100 are left out. Computed in float32, or in float64 as the student.

    Raises:
        ValueError: tau is not positive; the shapes differ or are not (N, K); target is not (N,) of labels.
    """

    def __init__(self, tau: float = 1.0) -> None:
        super().__init__()
        if not tau > 0:
            raise ValueError(f'PLD: tau must be > 0, got {tau}')
        self.tau = tau

    def forward(self, out_s: Tensor, out_t: Tensor, target: Tensor) -> Tensor:
        _expect('PLD', 'out_s', out_s, 'N', 'K')
        _expect('PLD', 'out_t', out_t, *out_s.shape)
        target, valid = _labels('PLD', target, *out_s.shape)
        out_s, out_t = _full(out_s), _full(out_t.detach(), out_s)
        order = self.order(out_t, target)
        s, q = out_s.gather(1, order), F.softmax(out_t / self.tau, dim=1).gather(1, order)
        rest = s.flip(1).logcumsumexp(dim=1).flip(1)
        return _mean((q * (rest - s)).sum(dim=1), valid)

    def order(self, out_t: Tensor, target: Tensor) -> Tensor:
        """The label, then the other classes by descending logit; ties by number."""
        classes = out_t.argsort(dim=1, descending=True, stable=True)
        before = (classes == target[:, None]).cumsum(dim=1) == 0  # the classes above the label
        shifted = torch.cat([target[:, None], classes[:, :-1]], dim=1)
        moved = torch.cat([torch.ones_like(before[:, :1]), before[:, :-1]], dim=1)
        return torch.where(moved, shifted, classes)


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


def _full(x: Tensor, like: Tensor | None = None) -> Tensor:
    """In float32, or float64 if the student (like) is. Inference tensors are copied, to serve backward."""
    x = x.double() if (x if like is None else like).dtype == torch.float64 else x.float()
    compiling = getattr(torch.compiler, 'is_compiling', bool)()  # torch 2.2 cannot tell: False
    return x.clone() if not compiling and x.is_inference() else x
