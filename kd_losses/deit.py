"""DeiT: a distillation head beside the classifier learns from the teacher, the classifier from the labels.

H. Touvron, M. Cord, M. Douze, F. Massa, A. Sablayrolles, H. Jegou, "Training data-efficient image
transformers & distillation through attention", ICML 2021, arXiv:2012.12877.

    base = mean over n of the cross-entropy of out_s and the label
    hard:  dist = mean over n of the cross-entropy of out_dist and argmax(out_t)
    soft:  dist = tau^2 / (N * K) * sum over n and k of p * log(p / q)
           p = softmax(out_t / tau), q = softmax(out_dist / tau)
    loss = (1 - alpha) * base + alpha * dist

Tap: the student's two logits, of the head on its class token and of the head on its distillation token; the
teacher's logits of the same, augmented image; the labels. In use the student answers with the mean of its two
logits. A student with one head gives its logits twice. The loss contains the cross-entropy.

Differences: the authors divide the soft term by N * K, timm by N as the textbook does ('batchmean'), which is
K times as much; alpha and tau were tuned with the authors' mean, so it is the default ('numel'). The authors'
command line has the teacher switched off unless it is told otherwise; the published models are mode 'hard'
with alpha 0.5. timm weighs both hard terms by 1. In use both codes average logits, the paper probabilities
(from memory, unverified).

Source: facebookresearch/deit, losses.py (DistillationLoss).

Use:
    >>> import torch
    >>> from deit import DeiT
    >>> out_s, out_dist = torch.randn(8, 10), torch.randn(8, 10, requires_grad=True)
    >>> DeiT()(out_s, out_dist, torch.randn(8, 10), torch.arange(8)).backward()
    >>> out_dist.grad.norm() > 0
    tensor(True)
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DeiT(nn.Module):
    """Cross-entropy of the class head, and the teacher's label or probabilities for the distillation head.

    Args:
        mode: 'hard', the teacher's label; 'soft', its probabilities.
        alpha: weight of the distillation head, 1 - alpha that of the class head; 0.5.
        tau: temperature of 'soft', > 0; 1.
        reduction: of 'soft': 'numel' divides by N * K, 'batchmean' by N.

    Shape:
        out_s, out_dist, out_t: (N, K), equal; target: (N,) labels, or (N, K) probabilities (of mixup, say).
        Returns a scalar. No gradient reaches out_t. `terms` returns (base, dist) without alpha.
        Rows of label -100 are left out of base; dist needs no label and keeps them.
        Computed in float32, or in float64 as the student.

    Raises:
        ValueError: mode or reduction is another word; tau is not positive; shapes differ; K < 2.
    """

    def __init__(
        self, mode: str = 'hard', alpha: float = 0.5, tau: float = 1.0, reduction: str = 'numel'
    ) -> None:
        super().__init__()
        if mode not in ('hard', 'soft'):
            raise ValueError(f"DeiT: mode must be 'hard' or 'soft', got {mode!r}")
        if reduction not in ('numel', 'batchmean'):
            raise ValueError(f"DeiT: reduction must be 'numel' or 'batchmean', got {reduction!r}")
        if not tau > 0:
            raise ValueError(f'DeiT: tau must be > 0, got {tau}')
        self.mode, self.alpha, self.tau, self.reduction = mode, alpha, tau, reduction

    def forward(self, out_s: Tensor, out_dist: Tensor, out_t: Tensor, target: Tensor) -> Tensor:
        base, dist = self.terms(out_s, out_dist, out_t, target)
        return (1 - self.alpha) * base + self.alpha * dist

    def terms(self, out_s: Tensor, out_dist: Tensor, out_t: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        _expect('DeiT', 'out_s', out_s, 'N', 'K')
        _expect('DeiT', 'out_dist', out_dist, *out_s.shape)
        _expect('DeiT', 'out_t', out_t, *out_s.shape)
        log_p_s = F.log_softmax(_full(out_s), dim=1)
        out_dist, out_t = _full(out_dist, out_s), _full(out_t.detach(), out_s)
        if target.dim() == 2:
            _expect('DeiT', 'target', target, *out_s.shape)
            base = -(_full(target, out_s) * log_p_s).sum(dim=1).mean()
        else:
            target, valid = _labels('DeiT', target, *out_s.shape)
            base = -_mean(log_p_s.gather(1, target[:, None]).squeeze(1), valid)

        log_p_t, log_q = (F.log_softmax(z / self.tau, dim=1) for z in (out_t, out_dist))
        if self.mode == 'soft':
            kl = _kl(log_p_t, log_q).sum(dim=1).mean() * self.tau**2
            return base, kl / out_s.shape[1] if self.reduction == 'numel' else kl
        right = F.log_softmax(out_dist, dim=1).gather(1, out_t.argmax(dim=1, keepdim=True)).squeeze(1)
        broken = log_p_t.isnan().any(dim=1)  # argmax would hide it
        return base, -torch.where(broken, torch.nan, right).mean()


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
    heads = s.extra if isinstance(s.extra, list | tuple) else ()
    # without a distillation head one gives them twice; students of other methods have other things there
    heads = [x for x in heads if isinstance(x, Tensor) and x.shape == s.out.shape]
    return kd(*(heads if len(heads) == 2 else (s.out, s.out)), t.out, batch.target)
