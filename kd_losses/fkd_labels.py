"""SoftCE and SoftKL, stored soft labels: the teacher looks at every crop once, students learn from disk.

Z. Shen, E. Xing, "A Fast Knowledge Distillation Framework for Visual Recognition", ECCV 2022,
arXiv:2112.01528 (FKD); L. Xiao, Y. He, "Are Large-scale Soft Labels Necessary for Large-scale Dataset
Distillation?", NeurIPS 2024, arXiv:2410.15919.

    p = softmax(out_t / temp_t) of a crop;  stored, and what a reader makes of it:
    hard         the class of the largest p                one-hot
    smoothing    that class and its p                      p there, (1 - p) / (K - 1) at the others
    smoothk      the k largest and their p                 those, (1 - their sum) / (K - k) at the others
    renormk      the same                                  those divided by their sum, 0 at the others
    logits       all K, in half precision                  the logits
    SoftCE: loss = - mean over n of sum over k of probs_k * log softmax(out_s / T)_k
    SoftKL: loss = mean over n of KL(softmax(out_t / T) || softmax(out_s / T)), without T^2

Tap: logits of the student, and what `recover` gives. Instead of cross-entropy with labels.

Differences: classes are stored as integers (as half-precision numbers in FKD, wrong above 2048); of rounded
values the rest (1 - sum) may be negative by a thousandth: 0 then. FKD writes the name of renormk5 that its
reader does not know.

Source: szq0214/FKD, FKD/FKD_SLG/generate_soft_label.py and FKD/utils_FKD.py; VILA-Lab/SRe2L,
SRe2L/relabel/utils_fkd.py.

Use:
    >>> import torch
    >>> from fkd_labels import SoftCE, quantise, recover
    >>> out_s, out_t = torch.randn(8, 10, requires_grad=True), torch.randn(8, 10)
    >>> index, value = quantise(out_t.softmax(dim=1), 'smooth5')
    >>> SoftCE()(out_s, recover(index, value, 'smooth5', 10)).backward()
    >>> out_s.grad.norm() > 0
    tensor(True)
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SoftCE(nn.Module):
    """Cross-entropy with probabilities as labels.

    Args:
        T: temperature of the student, > 0; 1. The teacher's is in the probabilities already.

    Shape:
        out_s: (N, K) logits, out_t: (N, K) probabilities. Returns a scalar. No gradient reaches out_t.
        Computed in float32, or in float64 as the student.

    Raises:
        ValueError: T is not positive; shapes are wrong; out_t is negative somewhere (not looked at on a GPU).
    """

    def __init__(self, T: float = 1.0) -> None:
        super().__init__()
        if not T > 0:
            raise ValueError(f'SoftCE: T must be > 0, got {T}')
        self.T = T

    def forward(self, out_s: Tensor, out_t: Tensor) -> Tensor:
        _expect('SoftCE', 'out_s', out_s, 'N', 'K')
        _expect('SoftCE', 'out_t', out_t, *out_s.shape)
        if out_t.device.type == 'cpu' and not getattr(torch.compiler, 'is_compiling', bool)():
            try:
                (lowest,) = out_t.detach().flatten().amin(dim=0, keepdim=True).tolist()
            except RuntimeError:  # under vmap, or of a fake tensor, there is nothing to look at
                lowest = 0.0
            if lowest < -0.01:  # stored halves are rounded, so not 0
                raise ValueError(f'SoftCE: out_t must be probabilities, got {lowest:g}: out_t.softmax(dim=1)')
        p, log_q = _full(out_t.detach(), out_s), F.log_softmax(_full(out_s) / self.T, dim=1)
        return -torch.where(p == 0, 0.0, p * log_q).sum(dim=1).mean()


class SoftKL(nn.Module):
    """Divergence from stored logits.

    Args:
        T: temperature, > 0; 20.
        scale: multiply by T^2; False.

    Shape:
        out_s, out_t: (N, K) logits. Returns a scalar. No gradient reaches out_t.
        Computed in float32, or in float64 as the student.

    Raises:
        ValueError: T is not positive; shapes are wrong.
    """

    def __init__(self, T: float = 20.0, scale: bool = False) -> None:
        super().__init__()
        if not T > 0:
            raise ValueError(f'SoftKL: T must be > 0, got {T}')
        self.T, self.scale = T, scale

    def forward(self, out_s: Tensor, out_t: Tensor) -> Tensor:
        _expect('SoftKL', 'out_s', out_s, 'N', 'K')
        _expect('SoftKL', 'out_t', out_t, *out_s.shape)
        log_p = F.log_softmax(_full(out_t.detach(), out_s) / self.T, dim=1)
        log_q = F.log_softmax(_full(out_s) / self.T, dim=1)
        return _kl(log_p, log_q).sum(dim=1).mean() * (self.T**2 if self.scale else 1)


def kept(kind: str, K: int) -> tuple[str, int]:
    """('smooth', 5) of 'smooth5'; refuses what is no kind, and more classes than there are."""
    if kind in ('hard', 'smoothing', 'logits'):
        return kind, {'hard': 1, 'smoothing': 1, 'logits': K}[kind]
    for name in ('smooth', 'renorm'):
        number = kind.removeprefix(name)
        if kind.startswith(name) and number.isdecimal() and int(number):
            if int(number) > K:
                remedy = f'take {name}{K - 1} or logits'
                raise ValueError(f'soft labels: kind {kind} needs {number} classes, got {K}: {remedy}')
            return name, int(number)
    raise ValueError(
        f'soft labels: kind must be hard, smoothing, smooth5, renorm5 (any number) or logits, got {kind!r}'
    )


def quantise(probs: Tensor, kind: str) -> tuple[Tensor | None, Tensor | None]:
    """(N, K) probabilities (logits for 'logits') -> classes (N, k) and values (N, k), None where not stored.

    Logits are shifted by their largest, so that half precision can hold them.
    """
    _expect('quantise', 'probs', probs, 'N', 'K')
    name, k = kept(kind, probs.shape[1])
    if name == 'logits':
        return None, probs - probs.amax(dim=1, keepdim=True)
    value, index = probs.topk(k, dim=1)
    return index, None if name == 'hard' else value


def recover(index: Tensor | None, value: Tensor | None, kind: str, n_classes: int) -> Tensor:
    """(N, n_classes) probabilities (logits for 'logits') of what quantise gave, in float32 or wider."""
    name, k = kept(kind, n_classes)
    if name == 'logits':
        return _full(value)
    if name == 'hard':
        value = torch.ones_like(index, dtype=torch.float32)
    value, index = _full(value), index.long()
    total = value.sum(dim=1, keepdim=True)
    if name == 'renorm':
        value, rest = value / total.clamp(min=1e-12), torch.zeros_like(total)
    elif name == 'hard' or k == n_classes:
        rest = torch.zeros_like(total)
    else:
        rest = (1 - total).clamp(min=0) / (n_classes - k)
    return rest.expand(-1, n_classes).contiguous().scatter_(1, index, value)


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


def _full(x: Tensor, like: Tensor | None = None) -> Tensor:
    """In float32, or float64 if the student (like) is. Inference tensors are copied, to serve backward."""
    x = x.double() if (x if like is None else like).dtype == torch.float64 else x.float()
    compiling = getattr(torch.compiler, 'is_compiling', bool)()  # torch 2.2 cannot tell: False
    return x.clone() if not compiling and x.is_inference() else x


# ------------------------------------------ how the training scripts use it; a copied file may drop this


def feed(kd, s, t, batch):
    """t.out: logits of a teacher, or logarithms of stored probabilities."""
    return kd(s.out, _full(t.out.detach(), s.out).softmax(dim=1))


def feed_strong(kd, s, t, batch):
    """Noisy student: the teacher's answer to the plain crop is the label of a distorted view."""
    return kd(batch.student(batch.views['strong']).out, _full(t.out.detach(), s.out).softmax(dim=1))
