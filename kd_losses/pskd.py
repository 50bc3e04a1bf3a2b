"""PS-KD, progressive self-knowledge distillation: labels softened by what the network said an epoch ago.

K. Kim, B. Ji, D. Yoon, S. Hwang, "Self-Knowledge Distillation with Progressive Refinement of Targets", ICCV
2021, arXiv:2006.12000.

    alpha = alpha_T * (epoch + 1) / total_epochs                     epoch from 0; at most alpha_T
    s = (1 - alpha) * onehot(target) + alpha * softmax(out of this image, one epoch ago)
    loss = - mean over n of sum over k of s * log softmax(out)     instead of cross-entropy
    then softmax(out) is remembered for the next epoch

Tap: logits, labels, the images' positions in the training set, the epoch. No teacher. The memory is a buffer,
so a resumed run goes on exactly.

Differences: the authors' loss; an image never seen yet counts as its one-hot label (they keep a row of
zeros).

Source: lgcnsai/PS-KD-Pytorch, loss/pskd_loss.py and main.py (train).

Use:
    >>> import torch
    >>> from pskd import PSKD
    >>> out, index = torch.randn(8, 10, requires_grad=True), torch.arange(8)
    >>> PSKD(50, 10)(out, torch.arange(8), index, epoch=0).backward()
    >>> out.grad.norm() > 0
    tensor(True)
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PSKD(nn.Module):
    """Cross-entropy with labels refined by a memory of past predictions.

    Args:
        num_samples: size of the training set.
        num_classes: K.
        alpha_T: trust in the past at the end of training, in [0, 1]; 0.8.
        total_epochs: length of the run; 300.

    Shape:
        out: (N, K), target: (N,) labels, index: (N,) int64 positions, epoch: from 0. Returns a scalar. In
        training mode with gradients the predictions are remembered.
        Rows of label -100 are left out. Computed in float32, or in float64 as the student.

    Raises:
        ValueError: alpha_T or total_epochs is not legal; shapes do not fit.
    """

    def __init__(
        self, num_samples: int, num_classes: int, alpha_T: float = 0.8, total_epochs: int = 300
    ) -> None:
        super().__init__()
        if not 0 <= alpha_T <= 1 or total_epochs < 1:
            raise ValueError(
                f'PSKD: alpha_T must be in [0, 1] and total_epochs >= 1, got {alpha_T} and {total_epochs}'
            )
        if num_classes < 2:
            raise ValueError(
                f'PSKD: num_classes must be at least 2, got {num_classes}: '
                'a sigmoid network has two classes, torch.cat([torch.zeros_like(z), z], 1)'
            )
        self.alpha_T, self.total_epochs = alpha_T, total_epochs
        self.register_buffer('memory', torch.zeros(num_samples, num_classes))

    def forward(self, out: Tensor, target: Tensor, index: Tensor, epoch: int) -> Tensor:
        _expect('PSKD', 'out', out, 'N', self.memory.shape[1])
        index = _positions_in('PSKD', index, len(out), len(self.memory))
        known, valid = _labels('PSKD', target, *out.shape)
        past = _full(self.memory[index], out)
        unseen = past.sum(dim=1, keepdim=True) == 0
        past_or_label = torch.where(unseen, _is(known, out.shape[1]).to(past.dtype), past)
        alpha = self.alpha_T * min(max((epoch + 1) / self.total_epochs, 0.0), 1.0)
        loss = _refined(out, past_or_label, known, valid, alpha)
        if self.training and torch.is_grad_enabled():
            with torch.no_grad():
                now = _full(out).softmax(dim=1)
                now = now if valid is None else torch.where(valid[:, None], now, past)
                self.memory.index_copy_(0, index, now.to(self.memory.dtype))
        return loss


def pskd_loss(out: Tensor, prev_prob: Tensor, target: Tensor, alpha: float) -> Tensor:
    """Cross-entropy of out (N, K) with (1 - alpha) onehot(target) + alpha prev_prob (N, K)."""
    _expect('PSKD', 'out', out, 'N', 'K')
    _expect('PSKD', 'prev_prob', prev_prob, *out.shape)
    target, valid = _labels('PSKD', target, *out.shape)
    return _refined(out, prev_prob, target, valid, alpha)


def _refined(out: Tensor, prev_prob: Tensor, target: Tensor, valid: Tensor | None, alpha: float) -> Tensor:
    out, past = _full(out), _full(prev_prob.detach(), out)
    goal = (1 - alpha) * _is(target, out.shape[1]).to(out.dtype) + alpha * past
    return -_per_sample(goal * F.log_softmax(out, dim=1), valid)


def _positions_in(who: str, index: Tensor, n: int, size: int) -> Tensor:
    """n positions in the training set as int64. Only on the CPU are they looked at, a GPU would wait."""
    _expect(who, 'index', index, n)
    seen = index.device.type == 'cpu' and not getattr(torch.compiler, 'is_compiling', bool)()
    wrong = [i for i in index.tolist() if not 0 <= i < size] if seen else []
    if wrong or index.is_floating_point():
        got = index.dtype if index.is_floating_point() else wrong[0]
        raise ValueError(
            f'{who}: index must be integers in 0..{size - 1}, positions in the training set, got {got}: '
            "number the samples from 0 (those of a Subset have the whole set's numbers)"
        )
    return index.long()


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


def _is(target: Tensor, K: int) -> Tensor:
    """(N,) -> (N, K), True at the label."""
    return torch.zeros(len(target), K, dtype=torch.bool, device=target.device).scatter_(
        1, target[:, None], True
    )


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
    return kd(s.out, batch.target, batch.index, batch.epoch)


def build(loss, probe, **options):
    return loss(len(probe.train_set), probe.num_classes, **{'total_epochs': probe.epochs, **options})
