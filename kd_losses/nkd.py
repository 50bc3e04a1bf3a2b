"""NKD, normalised distillation: the target class by its confidence, the others by their distribution.

Z. Yang, A. Zeng, Z. Li, T. Zhang, C. Yuan, Y. Li, "From Knowledge Distillation to Self-Knowledge
Distillation: A Unified Approach with Normalized Loss and Customized Soft Labels", ICCV 2023,
arXiv:2303.13005.

    y = target
    q = softmax(out_t), p = softmax(out_s) at temperature 1
    target term      mean over n of -q_y * log p_y
    non-target term  q', p' = softmax of out_t / T, out_s / T over the K - 1 classes other than y
                     gamma * T^2 * mean over n of - sum over k of q'_k * log p'_k
    loss = target term + non-target term

Tap: the logits, and the labels; added to cross-entropy. Both terms are cross-entropies, so the loss is not 0
when student and teacher agree.

Differences: none from the authors' code (cls_KD), written with log-softmax.

Source: yzd-v/cls_KD, mmcls/models/dis_losses/nkd.py (NKDLoss).

Use:
    >>> import torch
    >>> from nkd import NKD
    >>> out_s, out_t = torch.randn(8, 10, requires_grad=True), torch.randn(8, 10)
    >>> NKD()(out_s, out_t, torch.arange(8)).backward()
    >>> out_s.grad.norm() > 0
    tensor(True)
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class NKD(nn.Module):
    """Cross-entropies of the target class and of the renormalised other classes.

    Args:
        gamma: weight of the non-target term; 1.5 on ImageNet, 3.5 on CIFAR-100.
        T: its temperature, > 0; 1 on ImageNet, 3 on CIFAR-100.

    Shape:
        out_s, out_t: (N, K), equal, K >= 2 (with K = 2 the second term is 0); target: (N,) labels, or (N, K)
        probabilities of which the largest counts. Returns a scalar. No gradient reaches out_t.
        `terms` returns (target term, non-target term), gamma T^2 included.
        Rows of label -100 are left out. Computed in float32, or in float64 as the student.

    Raises:
        ValueError: T is not positive; shapes differ; K < 2; target is neither.
    """

    def __init__(self, gamma: float = 1.5, T: float = 1.0) -> None:
        super().__init__()
        if not T > 0:
            raise ValueError(f'NKD: T must be > 0, got {T}')
        self.gamma, self.T = gamma, T

    def forward(self, out_s: Tensor, out_t: Tensor, target: Tensor) -> Tensor:
        target_term, other_term = self.terms(out_s, out_t, target)
        return target_term + other_term

    def terms(self, out_s: Tensor, out_t: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        _expect('NKD', 'out_s', out_s, 'N', 'K')
        _expect('NKD', 'out_t', out_t, *out_s.shape)
        if target.dim() == 2:
            _expect('NKD', 'target', target, *out_s.shape)
            target = target.argmax(dim=1)
        target, valid = _labels('NKD', target, *out_s.shape)
        out_s, out_t = _full(out_s), _full(out_t.detach(), out_s)
        ce, ce_t = (F.cross_entropy(out, target, reduction='none') for out in (out_s, out_t))
        s, t = ((out / self.T).scatter(1, target[:, None], -torch.inf) for out in (out_s, out_t))
        nothing = (t == -torch.inf).all(dim=1, keepdim=True)  # the teacher masks every other class
        q, log_p = F.softmax(t.masked_fill(nothing, 0.0), dim=1), F.log_softmax(s, dim=1)
        q = q.masked_fill(nothing, 0.0)
        others = torch.where(q == 0, 0.0, q * log_p).sum(dim=1)  # 0 at y, where log p' is -inf
        return _mean(torch.exp(-ce_t) * ce, valid), -self.gamma * self.T**2 * _mean(others, valid)


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
