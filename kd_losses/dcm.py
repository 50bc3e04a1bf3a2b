"""DCM, dense cross-layer mutual distillation: every classifier of one network teaches every one of the other.

A. Yao, D. Sun, "Knowledge Transfer via Dense Cross-layer Mutual-distillation", ECCV 2020, arXiv:2008.07816.

    each network has L classifiers: auxiliary ones after earlier stages, the final one last
    q = (softmax(z) + eps) / (1 + K * eps)
    KL(a, b) = mean over n of sum over k of q_a * (log q_a - log q_b), no gradient to a
    loss = sum over all 2 * L classifiers of cross-entropy
           + sum over ordered pairs (a, b) of classifiers of different networks of KL(a, b)

Tap: the logits of all classifiers of two networks trained together on the same batch. Contains its
cross-entropy. The auxiliary classifiers are dropped after training.

Differences: none in the loss. The auxiliary classifiers (`DCMStudent`) are plain copies of what follows; the
authors halve the blocks of the first one's last stage and double the width of the last one's.

Source: sundw2014/DCM, wrn/main.py and wrn/KL_divergence.py.

Use:
    >>> import torch
    >>> from dcm import DCM
    >>> outs_1, outs_2 = ([torch.randn(8, 10, requires_grad=True) for _ in range(3)] for _ in range(2))
    >>> DCM()(outs_1, outs_2, torch.arange(8)).backward()
    >>> outs_2[0].grad.norm() > 0
    tensor(True)
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DCM(nn.Module):
    """Cross-entropy of all classifiers and mutual KL divergence across two networks, all weights 1.

    Args:
        eps: smoothing of the probabilities, >= 0; 1e-8.

    Shape:
        outs_1, outs_2: lists of L tensors (N, K), or stacked (L, N, K); target: (N,) labels. Returns a
        scalar. `terms` returns (cross-entropies, divergences).
        Rows of label -100 are left out. Computed in float32, or in float64 as the student.

    Raises:
        ValueError: eps is negative; the shapes differ.
    """

    def __init__(self, eps: float = 1e-8) -> None:
        super().__init__()
        if eps < 0:
            raise ValueError(f'DCM: eps must be >= 0, got {eps}')
        self.eps = eps

    def forward(self, outs_1: list[Tensor], outs_2: list[Tensor], target: Tensor) -> Tensor:
        hard, soft = self.terms(outs_1, outs_2, target)
        return hard + soft

    def terms(self, outs_1: list[Tensor], outs_2: list[Tensor], target: Tensor) -> tuple[Tensor, Tensor]:
        if len(outs_1) != len(outs_2) or not len(outs_1):
            raise ValueError(
                'DCM: outs_1 and outs_2 must hold equally many tensors, '
                f'got {len(outs_1)} and {len(outs_2)}: '
                'one per classifier of each network'
            )
        for name, outs in (('outs_1', outs_1), ('outs_2', outs_2)):
            for i, z in enumerate(outs):
                first = name == 'outs_1' and i == 0
                _expect('DCM', f'{name}[{i}]', z, *(('N', 'K') if first else outs_1[0].shape))
        target, valid = _labels('DCM', target, *outs_1[0].shape)
        outs = torch.stack([_full(z, outs_1[0]) for z in (*outs_1, *outs_2)])
        return _ce_sum(outs, target, valid), self._pairs(*self._smooth(outs), valid)

    def _smooth(self, outs: Tensor) -> tuple[Tensor, Tensor]:
        """Logits -> smoothed probabilities without gradient, and their logarithms."""
        if self.eps == 0:
            log_q = F.log_softmax(outs, dim=2)
            dead = (outs == -torch.inf).all(dim=0)  # ruled out by all: 0 times the logarithm, made finite
            return log_q.detach().exp(), log_q.masked_fill(dead, 0.0)
        q = (outs.softmax(dim=2) + self.eps) / (1 + outs.shape[2] * self.eps)
        return q.detach(), q.log()

    def _pairs(self, q: Tensor, log_q: Tensor, valid: Tensor | None) -> Tensor:
        """Over all (a, b) and (b, a), of (2 L, N, K), network 1 first.

        KL(a, b) summed over L classifiers a and b is L sum of a log a - (sum of a) (sum of log b).
        """
        L = len(q) // 2
        (a, b), (log_a, log_b) = (x.unflatten(0, (2, L)).sum(dim=1) for x in (q, log_q))
        entropy = L * _per_sample(q * log_q.detach(), valid, 1)
        return entropy - _per_sample(a * log_b + b * log_a, valid)


class DCMStudent(nn.Module):
    """A network with an auxiliary classifier after every stage but the last; in use without them.

    An auxiliary classifier is a fresh copy of everything that follows in the network. (The authors double the
    width of the last one.)

    Args:
        nets: fresh networks of one architecture, one per stage; the first is the network that is kept.
            `net(x, True)` gives (out, feat, fms, pres, extra), `net.after(k, fm)` goes on from its k-th map.

    Shape:
        x: (N, 3, H, W). Returns logits; with True the network's tuple, the auxiliary logits as its `extra`.
    """

    def __init__(self, nets: list) -> None:
        super().__init__()
        self.net, *others = nets
        self.others = nn.ModuleList(others)
        for k, other in enumerate(others, 1):  # what comes before its first stage is never used
            parts = other.feat_modules()
            unused = parts[: max(len(parts) - (len(nets) - k), 0)]
            for name, part in list(other.named_children()):
                if any(part is m for m in unused):
                    setattr(other, name, nn.Identity())

    def deployed(self) -> nn.Module:
        """What is kept after training."""
        return self.net

    def forward(self, x: Tensor, feats: bool = False):
        f = self.net(x, True)
        if not feats:
            return f.out
        return f._replace(extra=[net.after(k, f.fms[k]).out for k, net in enumerate(self.others, 1)])


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


def _ce_sum(outs: Tensor, target: Tensor, valid: Tensor | None) -> Tensor:
    """Cross-entropies of M networks, logits (M, N, K), summed: all their rows in one call."""
    m = len(outs)
    valid = valid if valid is None else valid.repeat(m)
    return m * _ce(outs.flatten(0, 1), target.repeat(m), valid)


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
    if len(s) != 2:
        raise ValueError(f'DCM: is for two networks, got {len(s)}: name two, or take DML')
    return kd(*([*f.extra, f.out] for f in s), batch.target)
