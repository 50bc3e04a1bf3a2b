"""SDD, scale decoupled distillation: distil the logits of regions, most where they disagree with the whole.

S. Wei, C. Luo, Y. Luo, "Scale Decoupled Distillation", CVPR 2024, arXiv:2403.13512.

    regions: the last map averaged on grids of 1, 2 and 4 per side, 21 regions, region 0 the whole image; each
    region's vector through the network's own classifier gives patch logits (N, K, R) (`local_logits`)
    l_nr = soft-target KL at T, times T^2 (base 'kd'), or DKD with alpha and beta (base 'dkd'), of region r
    w_nr = consistent where the teacher is right on region and whole, or wrong on both; else complementary
    loss = mean over n and r of w_nr * l_nr

Tap: the last stage's map and the classifier of both networks, and the labels. Cross-entropy uses the usual
logits.

Differences: the authors' code; where it replaces NaN by 0, ours has no NaN. As in their code, on maps whose
side is not a multiple of 4 region 0 is not exactly the global average.

Source: shicaiwei123/SDD-CVPR2024, mdistiller/distillers/KD.py (sdd_kd_loss), SDD_DKD.py (multi_dkd),
mdistiller/models/cifar/utils.py (SPP).

Use:
    >>> import torch
    >>> from sdd import SDD, local_logits
    >>> fm_s, fm_t = torch.randn(8, 16, 4, 4, requires_grad=True), torch.randn(8, 16, 4, 4)
    >>> fc = torch.nn.Linear(16, 10)
    >>> SDD()(local_logits(fm_s, fc), local_logits(fm_t, fc), torch.arange(8)).backward()
    >>> fm_s.grad.norm() > 0
    tensor(True)
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SDD(nn.Module):
    """Weighted distillation of region logits.

    Args:
        base: 'kd' or 'dkd'.
        T: temperature, > 0; 4.
        alpha, beta: weights of the two parts of base 'dkd'; 1 and 2.
        consistent, complementary: weights of regions that agree with the whole, and that do not; 1 and 2.

    Shape:
        patch_s, patch_t: (N, K, R), equal, region 0 the whole; target: (N,) labels. Returns a scalar.
        No gradient reaches patch_t.
        Rows of label -100 are left out. Computed in float32, or in float64 as the student.

    Raises:
        ValueError: unknown base; T is not positive; the shapes differ or are not (N, K, R); target is not
        (N,).
    """

    def __init__(
        self,
        base: str = 'kd',
        T: float = 4.0,
        alpha: float = 1.0,
        beta: float = 2.0,
        consistent: float = 1.0,
        complementary: float = 2.0,
    ) -> None:
        super().__init__()
        if base not in ('kd', 'dkd'):
            raise ValueError(f"SDD: base must be 'kd' or 'dkd', got {base!r}")
        if not T > 0:
            raise ValueError(f'SDD: T must be > 0, got {T}')
        self.base, self.T, self.alpha, self.beta = base, T, alpha, beta
        self.consistent, self.complementary = consistent, complementary

    def forward(self, patch_s: Tensor, patch_t: Tensor, target: Tensor) -> Tensor:
        _expect('SDD', 'patch_s', patch_s, 'N', 'K', 'R')
        _expect('SDD', 'patch_t', patch_t, *patch_s.shape)
        target, valid = _labels('SDD', target, *patch_s.shape[:2])
        s, t = _full(patch_s), _full(patch_t.detach(), patch_s)
        right = t.argmax(dim=1) == target[:, None]  # (N, R)
        agree = (right == right[:, :1]).to(s.dtype)  # two numbers in torch.where would be float32
        weight = agree * self.consistent + (1 - agree) * self.complementary
        z_s, z_t = s / self.T, t / self.T
        if self.base == 'kd':
            loss = _kl(F.log_softmax(z_t, dim=1), F.log_softmax(z_s, dim=1)).sum(dim=1)
        else:
            is_y = _is(target, s.shape[1])[:, :, None]
            (y_s, rest_s, other_s), (y_t, rest_t, other_t) = (_log_probabilities(z, is_y) for z in (z_s, z_t))
            binary = _kl(y_t, y_s) + _kl(rest_t, rest_s)
            loss = self.alpha * binary + self.beta * _kl(other_t, other_s).sum(dim=1)
        return _mean((weight * loss).mean(dim=1), valid) * self.T**2


def local_logits(fm: Tensor, fc, scales: tuple = (1, 2, 4)) -> Tensor:
    """(N, C, H, W) map and classifier (the last nn.Linear, or (weight, bias)) to (N, K, R) logits of the
    regions of the asked scales, whole image first, then the 2x2 and the 4x4 grid row by row."""
    weight, bias = _affine('local_logits', 'fc', fc)
    if fm.dim() != 4 or weight.shape[1] != fm.shape[1]:
        raise ValueError(
            f'local_logits: fm must be the map that is averaged for the classifier, '
            f'(N, {weight.shape[1]}, H, W), got {tuple(fm.shape)}: give the last map before the pooling'
        )
    grids = {4: F.adaptive_avg_pool2d(_full(fm), 4)}
    for side in (2, 1):
        grids[side] = F.adaptive_avg_pool2d(grids[2 * side], side)
    regions = torch.cat([grids[side].flatten(2) for side in (1, 2, 4) if side in scales], dim=2)
    with _no_autocast(fm):
        return F.linear(regions.mT, _full(weight, fm), None if bias is None else _full(bias, fm)).mT


def _log_probabilities(z: Tensor, is_y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """log p_y, log(1 - p_y), both (N, R), and the log-softmax over the other classes (N, K, R), -inf at y."""
    others = z.masked_fill(is_y, -torch.inf)
    total = z.logsumexp(dim=1)
    nothing = (others == -torch.inf).all(dim=1, keepdim=True)  # every other class is masked
    return (
        z.masked_fill(~is_y, 0.0).sum(dim=1) - total,
        others.logsumexp(dim=1) - total,
        F.log_softmax(others.masked_fill(nothing, 0.0), dim=1).masked_fill(nothing, -torch.inf),
    )


def _kl(log_p_t: Tensor, log_p_s: Tensor, on_host: bool = False) -> Tensor:
    """p_t (log p_t - log p_s), and 0 where p_t is 0 whatever the logarithms are.

    on_host: p_t may be looked at, as labels on the CPU were: the mask, a third of the time, only if needed.
    """
    p_t = log_p_t.exp()
    kl = p_t * (log_p_t - log_p_s)
    if on_host and p_t.amin().view(1).tolist()[0] > 0:  # not with NaN
        return kl
    return torch.where(p_t == 0, 0.0, kl)


def _affine(who: str, name: str, layer) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a linear layer, or of the pair (weight, bias)."""
    if isinstance(layer, (tuple, list)):
        return layer
    if getattr(getattr(layer, 'weight', None), 'ndim', 0) != 2:
        kind = type(layer).__name__
        raise ValueError(
            f'{who}: {name} must be a Linear or (weight, bias), got {kind}: give the last Linear'
        )
    return layer.weight, layer.bias


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


def _mean(rows: Tensor, valid: Tensor | None) -> Tensor:
    """Over the rows (N, ...) that count; 0 if none does."""
    if valid is None:
        return rows.mean(dim=0)
    counts = valid.reshape(-1, *[1] * (rows.dim() - 1))
    return torch.where(counts, rows, 0.0).sum(dim=0) / valid.sum().clamp(min=1)


def _no_autocast(x: Tensor) -> torch.autocast:
    """Matrix products and convolutions in the precision of their tensors; there is no autocast on meta."""
    return torch.autocast('cpu' if x.is_meta else x.device.type, enabled=False)


def _full(x: Tensor, like: Tensor | None = None) -> Tensor:
    """In float32, or float64 if the student (like) is. Inference tensors are copied, to serve backward."""
    x = x.double() if (x if like is None else like).dtype == torch.float64 else x.float()
    compiling = getattr(torch.compiler, 'is_compiling', bool)()  # torch 2.2 cannot tell: False
    return x.clone() if not compiling and x.is_inference() else x


# ------------------------------------------ how the training scripts use it; a copied file may drop this


def feed(kd, s, t, batch):
    """Logits of regions: the classifier on averages of the last map's parts."""
    sides = ((s, batch.net_s), (t, batch.net_t))
    local = (local_logits(f.pres[-1].relu(), net.classifier_layer()) for f, net in sides)
    return kd(*local, batch.target)


def build(loss, probe, **options):
    for who, f, net in (('student', probe.s, probe.net_s), ('teacher', probe.t, probe.net_t)):
        feat = f.pres[-1].relu().mean(dim=(2, 3))  # stored answers say here that they have no maps
        layer = net.classifier_layer()
        fits = layer.weight.shape[1:] == feat.shape[1:]
        if not fits or not _close(F.linear(feat, layer.weight, layer.bias), f.out):
            raise ValueError(
                f'SDD: the {who} must end in ReLU, average over positions and classifier, or logits of '
                f'regions are no parts of its logits: take a resnet, wrn or vgg'
            )
    return loss(**options)


def _close(out: Tensor, wanted: Tensor) -> bool:
    """As far as bfloat16 goes; logits of a head that is all zero say nothing."""
    most = 0.05 * float(wanted.detach().abs().max())
    return most > 0 and torch.allclose(out.float(), wanted.float(), rtol=0, atol=most)
