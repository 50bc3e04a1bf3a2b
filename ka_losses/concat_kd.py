"""Soft targets over the union of classes: the baseline of every amalgamation.

No paper of its own: G. Hinton, O. Vinyals, J. Dean, "Distilling the Knowledge in a Neural Network", 2015,
arXiv:1503.02531, with the teachers' logits side by side. The mse form is the last stage of layer-wise
amalgamation (AAAI 2019).

    z = concatenation of the teachers' logits, p = softmax(z / T), q = softmax(out_s / T)
    kl:       loss = T^2 * mean over n of sum over k of p * (log p - log q)
    soft_ce:  loss = T^2 * mean over n of sum over k of -p * log q          (the same gradient)
    mse:      loss = mean over n and k of (out_s - z)^2
    parts:    loss = sum over teachers of kl(the student's block of classes, this teacher's logits)

Tap: logits. The student's classes are the teachers' classes in the order of the teachers.

A teacher has never seen the classes of the others and is sure of itself on their images: kl hands that
confusion on. parts never compares teachers: accuracy inside a part is good, the student's choice BETWEEN
parts stays untrained. Report joint and part accuracy separately.

Differences: align='center' is ours: it takes each teacher's mean logit away before they are joined, an offset
that a softmax classifier leaves undetermined. T^2 also at soft_ce, so that both have one gradient.

Source: zju-vipa/KamalEngine, kamal/core/tasks/loss/functional.py (kldiv, soft_cross_entropy).

Use:
    >>> import torch
    >>> from concat_kd import ConcatKD
    >>> out_s, outs_t = torch.randn(8, 7, requires_grad=True), [torch.randn(8, 3), torch.randn(8, 4)]
    >>> ConcatKD()(out_s, outs_t).backward()
    >>> out_s.grad.norm() > 0
    tensor(True)
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ConcatKD(nn.Module):
    """One softmax (or squared error) over the classes of all teachers.

    Args:
        T: temperature, > 0; 1 in every amalgamation code. mse does not use it.
        mode: 'kl', 'soft_ce', 'mse' or 'parts'.
        align: 'none', or 'center': every teacher's logits minus their mean, per image.

    Shape:
        out_s: (N, K_1 + ... + K_m); outs_t: list of (N, K_i). Returns a scalar, with return_terms=True also
        {'kd': the same}. No gradient reaches outs_t.
        Computed in float32, or in float64 as the student.

    Raises:
        ValueError: T is not positive; unknown mode or align; shapes that do not add up.
    """

    def __init__(self, T: float = 1.0, mode: str = 'kl', align: str = 'none') -> None:
        super().__init__()
        if not T > 0:
            raise ValueError(f'ConcatKD: T must be > 0, got {T}')
        if mode not in ('kl', 'soft_ce', 'mse', 'parts'):
            raise ValueError(f"ConcatKD: mode must be 'kl', 'soft_ce', 'mse' or 'parts', got {mode!r}")
        if align not in ('none', 'center'):
            raise ValueError(f"ConcatKD: align must be 'none' or 'center', got {align!r}")
        self.T, self.mode, self.align = T, mode, align

    def forward(self, out_s: Tensor, outs_t: list[Tensor], return_terms: bool = False):
        _expect('ConcatKD', 'out_s', out_s, 'N', 'C' if self.mode == 'mse' else 'K')
        for i, out_t in enumerate(outs_t):
            _expect('ConcatKD', f'outs_t[{i}]', out_t, len(out_s), 'C')
        widths = [out_t.shape[1] for out_t in outs_t]
        _expect('ConcatKD', 'out_s', out_s, len(out_s), sum(widths))  # the classes of all outs_t
        out_s, outs_t = _full(out_s), [_full(out_t.detach(), out_s) for out_t in outs_t]
        if self.align == 'center':
            outs_t = [_centred(out_t) for out_t in outs_t]
        if self.mode == 'mse':
            loss = F.mse_loss(out_s, torch.cat(outs_t, dim=1))
        elif self.mode == 'parts':
            loss = sum(self._divergence(*pair) for pair in zip(out_s.split(widths, dim=1), outs_t))
        else:
            loss = self._divergence(out_s, torch.cat(outs_t, dim=1))
        return (loss, {'kd': loss}) if return_terms else loss

    def _divergence(self, out_s: Tensor, out_t: Tensor) -> Tensor:
        log_q = F.log_softmax(out_s / self.T, dim=1)
        log_p = F.log_softmax(out_t / self.T, dim=1)
        p = log_p.exp()
        inner = -log_q if self.mode == 'soft_ce' else log_p - log_q
        # a class that a teacher excludes (p = 0) adds nothing, whatever its logarithm
        return torch.where(p == 0, 0.0, p * inner).sum(dim=1).mean() * self.T**2


def _centred(out: Tensor) -> Tensor:
    """Minus its mean over the classes that are not excluded by -inf."""
    known = out != -torch.inf
    return out - torch.where(known, out, 0.0).sum(dim=1, keepdim=True) / known.sum(dim=1, keepdim=True)


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


# ------------------------------------------ how the training scripts use it; a copied file may drop this


def feed(ka, s, all_t, batch):
    return ka(s.out, [t.out for t in all_t], return_terms=True)


def feed_each(ka, s, all_t, batch):
    """Every pair of logits, no and yes of one attribute, is a part; several teachers of it have one each."""
    outs_s = [pair for block in batch.blocks for pair in s.out[:, block].split(2, dim=1)]
    outs_t = [pair for t in all_t for pair in t.out.split(2, dim=1)]
    return ka(torch.cat(outs_s, dim=1), outs_t, return_terms=True)


def build_parts(loss, probe, **options):
    if any(t.out.shape[1] < 2 for t in probe.all_t):
        raise ValueError(
            'ConcatKD: a part of one class teaches nothing: give each teacher two or more (--wanted)'
        )
    return loss(mode='parts', **options)


def build_mse(loss, probe, **options):
    return loss(mode='mse', **options)
