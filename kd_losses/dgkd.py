"""DGKD, densely guided distillation: learn from the teacher and all assistants, some left out at random.

W. Son, J. Na, J. Choi, W. Hwang, "Densely Guided Knowledge Distillation using Multiple Teacher Assistants",
ICCV 2021, arXiv:2009.08825.

    KL_j = T^2 * mean over n of KL(softmax(outs_t[j] / T) || softmax(out_s / T))
    loss = (1 - lam) * CE(out_s) + lam * sum over the kept teachers j of KL_j
    in training, `drop` of the M teachers are left out of each step, at random, never all

Tap: logits of the student and of several frozen networks, and labels. Contains its cross-entropy. The recipe:
train the teacher; each assistant, larger before smaller, from the teacher and all assistants before it; the
student from all.

Differences: the authors average KL over N * K numbers (K times smaller) and weigh by lam = 1, so without
cross-entropy; here it is the mean over samples and lam = 0.6.

Source: formula only; wonchulSon/DGKD, train.py (TrainManager.train) divides by the number of classes besides.

Use:
    >>> import torch
    >>> from dgkd import DGKD
    >>> out_s = torch.randn(8, 10, requires_grad=True)
    >>> outs_t = [torch.randn(8, 10) for _ in range(3)]  # the teacher, then its assistants
    >>> DGKD()(out_s, outs_t, torch.arange(8)).backward()
    >>> out_s.grad.norm() > 0
    tensor(True)
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DGKD(nn.Module):
    """Cross-entropy and the summed soft targets of several teachers.

    Args:
        T: temperature, > 0; 5.
        lam: weight of the teachers, in [0, 1]; 0.6.
        drop: teachers left out of a training step; 1.

    Shape:
        out_s: (N, K); outs_t: list of M tensors (N, K), or stacked (M, N, K); target: (N,) labels; keep: (M,)
        of 0 and 1, which teachers count, otherwise drawn in training mode (from generator) and all in eval
        mode. Returns a scalar. No gradient reaches outs_t.
        Rows of label -100 are left out. Computed in float32, or in float64 as the student.

    Raises:
        ValueError: an argument is not legal; shapes do not fit.
    """

    def __init__(self, T: float = 5.0, lam: float = 0.6, drop: int = 1) -> None:
        super().__init__()
        if not T > 0 or not 0 <= lam <= 1 or drop < 0:
            raise ValueError(f'DGKD: T > 0, lam in [0, 1] and drop >= 0 are needed, got {T}, {lam}, {drop}')
        self.T, self.lam, self.drop = T, lam, drop

    def forward(
        self,
        out_s: Tensor,
        outs_t: list[Tensor],
        target: Tensor,
        keep: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        _expect('DGKD', 'out_s', out_s, 'N', 'K')
        if not len(outs_t):
            raise ValueError('DGKD: outs_t must hold one tensor or more, got 0: one per teacher')
        for i, z in enumerate(outs_t):
            _expect('DGKD', f'outs_t[{i}]', z, *out_s.shape)
        target, valid = _labels('DGKD', target, *out_s.shape)
        if keep is None:
            keep = self._draw(len(outs_t), out_s.device, generator)
        else:
            _expect('DGKD', 'keep', keep, len(outs_t))
        out_s, outs_t = _full(out_s), torch.stack([_full(z.detach(), out_s) for z in outs_t])
        log_p, log_q = F.log_softmax(out_s / self.T, dim=1), F.log_softmax(outs_t / self.T, dim=2)
        kl = _mean(_kl(log_q, log_p, valid is None).sum(dim=2).T, valid) * self.T**2
        return (1 - self.lam) * _ce(out_s, target, valid) + self.lam * (keep.to(kl.dtype) * kl).sum()

    def _draw(self, count: int, device, generator: torch.Generator | None) -> Tensor:
        dropped = min(self.drop, count - 1) if self.training else 0
        rank = torch.rand(count, device=device, **_by(generator)).argsort().argsort()
        return rank >= dropped


def _kl(log_p_t: Tensor, log_p_s: Tensor, on_host: bool = False) -> Tensor:
    """p_t (log p_t - log p_s), and 0 where p_t is 0 whatever the logarithms are.

    on_host: p_t may be looked at, as labels on the CPU were: the mask, a third of the time, only if needed.
    """
    p_t = log_p_t.exp()
    kl = p_t * (log_p_t - log_p_s)
    if on_host and p_t.amin().view(1).tolist()[0] > 0:  # not with NaN
        return kl
    return torch.where(p_t == 0, 0.0, kl)


def _by(generator: torch.Generator | None) -> dict:
    """Left out where there is none: torch.compile cannot pass None for a batch of another size."""
    return {} if generator is None else {'generator': generator}


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
    return kd(s.out, [f.out for f in batch.all_t], batch.target, generator=batch.generator)
