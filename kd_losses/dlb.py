"""DLB, distillation from the last mini-batch: stay consistent with what was said one step ago.

Y. Shen, L. Xu, Y. Yang, Y. Li, Y. Guo, "Self-Distillation from the Last Mini-Batch for Consistency
Regularization", CVPR 2022, arXiv:2203.16172.

    out: logits of this batch, first view;  out_prev_then: those of the last batch, one step ago, first view
    out_prev_now: what the network says now of the last batch's second view
    loss = mean over both batches of cross-entropy (out and out_prev_now)
           + alpha * T^2 * mean over n of KL(softmax(out_prev_then / T) || softmax(out_prev_now / T))

Tap: two augmented views of every image, logits, labels; two forward passes per step. `remember` keeps the
last batch, also across epochs and in the state_dict. At the very first step the loss is cross-entropy. No
teacher. Contains its cross-entropy.

Differences: the authors' code, which replays the whole last batch where the paper overlaps batches by half.
The code does not state alpha.

Source: Meta-knowledge-Lab/DLB, dlb.py (train_one_epoch).

Use:
    >>> import torch
    >>> from dlb import DLB
    >>> kd, target = DLB(), torch.arange(8)
    >>> out, now, then = (torch.randn(8, 10, requires_grad=True) for _ in range(3))
    >>> kd(out, target, now, then, target).backward()
    >>> now.grad.norm() > 0
    tensor(True)
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DLB(nn.Module):
    """Cross-entropy on two batches and soft targets from the network's state one step ago.

    Args:
        T: temperature, > 0; 3.
        alpha: weight of the soft targets; 1.

    Shape:
        out: (N, K), target: (N,) labels; out_prev_now, out_prev_then: (N', K) and target_prev: (N',), all or
        none. Returns a scalar. No gradient reaches out_prev_then. `terms` returns (cross-entropy, KD),
        unweighted.
        Rows of label -100 are left out. Computed in float32, or in float64 as the student.

    Raises:
        ValueError: T is not positive; shapes do not fit; only some of the previous batch is given.
    """

    def __init__(self, T: float = 3.0, alpha: float = 1.0) -> None:
        super().__init__()
        if not T > 0:
            raise ValueError(f'DLB: T must be > 0, got {T}')
        self.T, self.alpha = T, alpha
        self.last = None  # (images of the second view, labels, logits) of the last batch

    def forward(
        self,
        out: Tensor,
        target: Tensor,
        out_prev_now: Tensor | None = None,
        out_prev_then: Tensor | None = None,
        target_prev: Tensor | None = None,
    ) -> Tensor:
        ce, kd = self.terms(out, target, out_prev_now, out_prev_then, target_prev)
        return ce + self.alpha * kd

    def terms(self, out, target, out_prev_now=None, out_prev_then=None, target_prev=None):
        _expect('DLB', 'out', out, 'N', 'K')
        y, valid = _labels('DLB', target, *out.shape)
        out = _full(out)
        given = [x is not None for x in (out_prev_now, out_prev_then, target_prev)]
        if not any(given):
            return _ce(out, y, valid), out.new_zeros(())
        if not all(given):
            raise ValueError(
                f'DLB: out_prev_now, out_prev_then and target_prev must all be given, or none, got '
                f'{sum(given)} of them: leave them out at the very first step'
            )
        _expect('DLB', 'out_prev_now', out_prev_now, 'N', out.shape[1])
        _expect('DLB', 'out_prev_then', out_prev_then, *out_prev_now.shape)
        y_prev, valid_prev = _labels('DLB', target_prev, *out_prev_now.shape, 'target_prev')
        both = None
        if valid is not None or valid_prev is not None:
            each = ((valid_prev, y_prev), (valid, y))
            both = torch.cat([torch.ones_like(of, dtype=torch.bool) if v is None else v for v, of in each])
        now, then = _full(out_prev_now, out), _full(out_prev_then.detach(), out)
        ce = _ce(torch.cat([now, out]), torch.cat([y_prev, y]), both)
        log_p, log_q = F.log_softmax(now / self.T, dim=1), F.log_softmax(then / self.T, dim=1)
        kd = _per_sample(_kl(log_q, log_p, valid_prev is None), valid_prev)
        return ce, kd * self.T**2

    def remember(self, img: Tensor, target: Tensor, out: Tensor) -> None:
        """Keep this batch for the next step: its second view, labels, and logits of the first view."""
        # copies: a trainer may use the batch's memory again, for the next one
        self.last = (img.detach().clone(), target.clone(), _full(out.detach()).clone())

    def get_extra_state(self):
        return self.last

    def set_extra_state(self, state) -> None:
        self.last = state


def _kl(log_p_t: Tensor, log_p_s: Tensor, on_host: bool = False) -> Tensor:
    """p_t (log p_t - log p_s), and 0 where p_t is 0 whatever the logarithms are.

    on_host: p_t may be looked at, as labels on the CPU were: the mask, a third of the time, only if needed.
    """
    p_t = log_p_t.exp()
    kl = p_t * (log_p_t - log_p_s)
    if on_host and p_t.amin().view(1).tolist()[0] > 0:  # not with NaN
        return kl
    return torch.where(p_t == 0, 0.0, kl)


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


def _ce(out: Tensor, target: Tensor, valid: Tensor | None) -> Tensor:
    """Cross-entropy, the mean over the rows that count."""
    if valid is None:
        return F.cross_entropy(out, target)
    return _mean(F.cross_entropy(out, target, reduction='none'), valid)


def _per_sample(x: Tensor, valid: Tensor | None, axis: int = 0) -> Tensor:
    """The sum over all axes but that of the samples, and the mean over the samples that count."""
    if valid is None:
        return x.sum() / x.shape[axis]
    return _mean(x.movedim(axis, 0).flatten(1).sum(dim=1), valid)


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


# ------------------------------------------ how the training scripts use it; a copied file may drop this


def feed(kd, s, t, batch):
    """The last batch's second view now, against what was said of its first view then."""
    past = ()
    if kd.last is not None:
        img, target, then = (x.to(batch.img.device) for x in kd.last)  # a checkpoint is read on the CPU
        past = (batch.student(img).out, then, target)
    loss = kd(s.out, batch.target, *past)
    if kd.training:
        kd.remember(batch.views['second'], batch.target, s.out)
    return loss
