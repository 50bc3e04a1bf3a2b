"""SortKD: the label takes the teacher's largest logit, what stood above it moves down by one rank.

S. E. Limantoro, "Parameter-Free Logit Distillation via Sorting Mechanism", IEEE Signal Processing Letters,
2025, arXiv:2508.16544.

    v = the teacher's logits of a sample in descending order
    order = the label, then the other classes by descending teacher logit
    sorted[order_r] = v_r
    loss = T^2 * mean over n of KL(softmax(sorted / T) || softmax(out_s / T))

Tap: the logits, and the labels. `sort_logits` is all that the method adds: where the teacher is right nothing
changes; where it is wrong the same logits are dealt out anew, so their entropy stays. It goes before any loss
of logits (DKD, LSKD, CTKD).

Differences: the authors' code, which lifts the label's logit by 1e9 to sort it to the front and so cannot be
used in half precision. Here nothing is added and the logits are sorted once. The repository has the KD and
DKD forms only. Equal logits are exchanged for equal ones, so ties do not matter.

Source: StephenEkaputra/SortKD, mdistiller/distillers/KD.py (sort, kd_loss).

Use:
    >>> import torch
    >>> from sortkd import SortKD
    >>> out_s, out_t = torch.randn(8, 10, requires_grad=True), torch.randn(8, 10)
    >>> SortKD()(out_s, out_t, torch.arange(8)).backward()
    >>> out_s.grad.norm() > 0
    tensor(True)
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def sort_logits(out_t: Tensor, target: Tensor) -> Tensor:
    """The teacher's logits (N, K), dealt out anew so that the label (N,) has the largest; -100: unchanged.

    Of out_t's precision, without gradient. A label at -inf takes the maximum as any other does.
    """
    _expect('sort_logits', 'out_t', out_t, 'N', 'K')
    target, valid = _labels('sort_logits', target, *out_t.shape)
    out_t = out_t.detach()
    values, classes = out_t.sort(dim=1, descending=True, stable=True)
    rank = torch.arange(out_t.shape[1], device=out_t.device)
    label = torch.where(classes == target[:, None], rank, 0).sum(dim=1, keepdim=True)
    # by rank: classes above the label take the next smaller logit, the label takes the largest
    dealt = torch.where(rank < label, values.roll(-1, dims=1), values)
    dealt = torch.where(rank == label, values[:, :1], dealt)
    result = torch.zeros_like(out_t).scatter(1, classes, dealt)
    return result if valid is None else torch.where(valid[:, None], result, out_t)


class SortKD(nn.Module):
    """Soft targets from sorted teacher logits.

    Args:
        T: temperature, > 0; 4 on CIFAR-100 (cross-entropy 0.1, weight 0.9), 1 on ImageNet (0.5 and 0.5).

    Shape:
        out_s, out_t: (N, K), equal, K >= 2; target: (N,) labels. Returns a scalar. No gradient reaches out_t.
        A teacher logit of -inf is probability 0. Rows of label -100 are left out.
        Computed in float32, or in float64 as the student.

    Raises:
        ValueError: T is not positive; the shapes differ or are not (N, K); target is not (N,) of labels.
    """

    def __init__(self, T: float = 4.0) -> None:
        super().__init__()
        if not T > 0:
            raise ValueError(f'SortKD: T must be > 0, got {T}')
        self.T = T

    def forward(self, out_s: Tensor, out_t: Tensor, target: Tensor) -> Tensor:
        _expect('SortKD', 'out_s', out_s, 'N', 'K')
        _expect('SortKD', 'out_t', out_t, *out_s.shape)
        _, valid = _labels('SortKD', target, *out_s.shape)
        out_t = sort_logits(_full(out_t.detach(), out_s), target)
        log_p_s = F.log_softmax(_full(out_s) / self.T, dim=1)
        log_p_t = F.log_softmax(out_t / self.T, dim=1)
        p_t = log_p_t.exp()
        # where p_t is 0 the term is 0, although log p_t is -inf there
        kl = torch.where(p_t == 0, 0.0, p_t * (log_p_t - log_p_s))
        return _mean(kl.sum(dim=1), valid) * self.T**2


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
