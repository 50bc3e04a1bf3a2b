"""DDGSD, data-distortion guided self-distillation: two distorted views of an image should be read alike.

T.-B. Xu, C.-L. Liu, "Data-Distortion Guided Self-Distillation for Deep Neural Networks", AAAI 2019.

    a, b: two random augmentations of the same images, through one network
    KD(a from b) = T^2 * mean over n of KL(softmax(out_b / T) || softmax(out_a / T))     no gradient to out_b
    MMD = ||mean over n of feat_a - mean over n of feat_b||^2
    loss = CE(out_a) + CE(out_b) + lam * (KD(a from b) + KD(b from a)) + mu * MMD

Tap: logits and pooled embeddings of two views, one forward pass each. No teacher. Contains its cross-entropy.

Differences: from the formula; no code of the authors was found. T, lam and mu are those of an unofficial
port, that the targets carry no gradient is from memory of the paper. The ports average the divergence over
classes, leave out T^2, or use logits in the MMD.

Source: formula only; T, lam and mu from youngerous/ddgsd-pytorch (unofficial), src/trainer.py.

Use:
    >>> import torch
    >>> from ddgsd import DDGSD
    >>> out_a, out_b = (torch.randn(8, 10, requires_grad=True) for _ in 'ab')
    >>> feat_a, feat_b = torch.randn(8, 64), torch.randn(8, 64)
    >>> DDGSD()(out_a, out_b, feat_a, feat_b, torch.arange(8)).backward()
    >>> out_a.grad.norm() > 0
    tensor(True)
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DDGSD(nn.Module):
    """Cross-entropy of both views, mutual soft targets, and a linear-kernel MMD of the embeddings.

    Args:
        T: temperature, > 0; 3.
        lam: weight of the mutual soft targets; 1.
        mu: weight of the MMD; 5e-4.

    Shape:
        out_a, out_b: (N, K), feat_a, feat_b: (N, D), target: (N,) labels. Returns a scalar. `terms` returns
        (cross-entropy, KD, MMD), unweighted.
        Rows of label -100 are left out. Computed in float32, or in float64 as the student.

    Raises:
        ValueError: T is not positive; shapes differ.
    """

    def __init__(self, T: float = 3.0, lam: float = 1.0, mu: float = 5e-4) -> None:
        super().__init__()
        if not T > 0:
            raise ValueError(f'DDGSD: T must be > 0, got {T}')
        self.T, self.lam, self.mu = T, lam, mu

    def forward(self, out_a: Tensor, out_b: Tensor, feat_a: Tensor, feat_b: Tensor, target: Tensor) -> Tensor:
        ce, kd, mmd = self.terms(out_a, out_b, feat_a, feat_b, target)
        return ce + self.lam * kd + self.mu * mmd

    def terms(self, out_a, out_b, feat_a, feat_b, target) -> tuple[Tensor, Tensor, Tensor]:
        _expect('DDGSD', 'out_a', out_a, 'N', 'K')
        _expect('DDGSD', 'out_b', out_b, *out_a.shape)
        _expect('DDGSD', 'feat_a', feat_a, len(out_a), 'D')
        _expect('DDGSD', 'feat_b', feat_b, *feat_a.shape)
        target, valid = _labels('DDGSD', target, *out_a.shape)
        out_a, out_b, feat_a, feat_b = (_full(x, out_a) for x in (out_a, out_b, feat_a, feat_b))
        ce = sum(_ce(out, target, valid) for out in (out_a, out_b))
        log_a, log_b = (F.log_softmax(out / self.T, dim=1) for out in (out_a, out_b))
        kl = _kl(log_b.detach(), log_a, valid is None) + _kl(log_a.detach(), log_b, valid is None)
        mmd = _mean(feat_a - feat_b, valid).square().sum()
        return ce, _per_sample(kl, valid) * self.T**2, mmd


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
    other = batch.student(batch.views['second'])
    return kd(s.out, other.out, s.feat, other.feat, batch.target)
