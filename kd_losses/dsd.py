"""DSD, double similarity distillation: how attention changes between layers, how classes share places.

Y. Feng, X. Sun, W. Diao, J. Li, X. Gao, "Double Similarity Distillation for Semantic Image Segmentation",
IEEE Transactions on Image Processing, 2021.

    a_l = unit(mean over channels of fm_l^2, all positions);  unit(z) = z / its length
    r_nm = unit(a_m - a_n) for every pair of layers n < m
    pixel = mean over pairs, pictures and positions of (r_nm of the student - of the teacher)^2
    P = softmax over positions of the logits, averaged 2 x 2, / tau;  G = P P^T, classes by classes
    category = mean over pictures and pairs of classes of (G of the student - of the teacher)^2
    loss = w_pixel * pixel + w_category * category

Tap: maps of one size, the last of them the logits before they are enlarged; the reference code takes the
logits of the auxiliary head, the map that the classifier reads, and the logits. Nothing is learnt.

Differences: the authors' code was not found; the formulas are those of CIRKD's comparison. Where two layers
attend alike, the difference has no direction: 0 without gradient, where that code's gradient is 1e21.

Source: winycg/CIRKD, losses/dsd.py (CriterionDoubleSimKD).

Use:
    >>> import torch
    >>> from dsd import DSD
    >>> fms_s = [torch.randn(2, c, 8, 8, requires_grad=True) for c in (5, 16, 5)]
    >>> DSD()(fms_s, [torch.randn(2, c, 8, 8) for c in (5, 32, 5)]).backward()
    >>> fms_s[1].grad.norm() > 0
    tensor(True)
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DSD(nn.Module):
    """Squared errors of changes of attention, and of similarities between the classes' places.

    Args:
        w_pixel, w_category: weights of the terms; 1000 and 10.
        tau: temperature of the second, > 0; 4.

    Shape:
        fms_s, fms_t: two maps or more each, (N, C, H, W), all of one N, H and W; widths are free, but those
        of the last, the logits, are equal. Returns a scalar; `terms` returns (pixel, category) without their
        weights. No gradient reaches fms_t. Computed in float32, also under TF32, or in float64 as the
        student.

    Raises:
        ValueError: tau is not positive; there are fewer than two maps, or not as many of the teacher's; sizes
        or the logits' classes differ.
    """

    def __init__(self, w_pixel: float = 1000.0, w_category: float = 10.0, tau: float = 4.0) -> None:
        super().__init__()
        if not tau > 0:
            raise ValueError(f'DSD: tau must be > 0, got {tau}')
        self.w_pixel, self.w_category, self.tau = w_pixel, w_category, tau

    def forward(self, fms_s: list[Tensor], fms_t: list[Tensor]) -> Tensor:
        pixel, category = self.terms(fms_s, fms_t)
        return self.w_pixel * pixel + self.w_category * category

    def terms(self, fms_s: list[Tensor], fms_t: list[Tensor]) -> tuple[Tensor, Tensor]:
        if len(fms_s) != len(fms_t) or len(fms_s) < 2:
            raise ValueError(
                f'DSD: fms_s and fms_t must have two maps or more, as many each, got {len(fms_s)} '
                f'and {len(fms_t)}: take the map that the classifier reads and the logits'
            )
        _expect('DSD', 'fms_s[0]', fms_s[0], 'N', 'C', 'H', 'W')
        n, _, *size = fms_s[0].shape
        for i, (x, y) in enumerate(zip(fms_s, fms_t)):
            _expect('DSD', f'fms_s[{i}]', x, n, 'C', *size)
            last = i == len(fms_s) - 1
            _expect('DSD', f'fms_t[{i}]', y, n, x.shape[1] if last else 'C', *size)
        with _no_autocast(fms_s[0]):
            s, t = [_full(x) for x in fms_s], [_full(y.detach(), fms_s[0]) for y in fms_t]
            changes = [(r_s - r_t).square().mean() for r_s, r_t in zip(_turns(s), _turns(t))]
            category = (self._shared(s[-1]) - self._shared(t[-1])).square().mean()
            return torch.stack(changes).mean(), category

    def _shared(self, out: Tensor) -> Tensor:
        """Logits -> (N, K, K)."""
        p = F.avg_pool2d(out, 2, 2, ceil_mode=True).flatten(2)
        p = _exact((p / self.tau).softmax(dim=2))
        return (p @ p.mT).to(out.dtype)


def _turns(fms: list[Tensor]) -> list[Tensor]:
    """Directions (N, HW) in which the attention changes, for every pair of maps."""
    attention = [_unit(fm.square().mean(dim=1).flatten(1)) for fm in fms]
    return [_unit(b - a) for m, b in enumerate(attention) for a in attention[:m]]


def _unit(x: Tensor) -> Tensor:
    """Rows divided by their length; a zero row stays zero and gets no gradient."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / norm.masked_fill(norm <= 1e-12, torch.inf)  # NaN is not: it must show in the loss


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


def _no_autocast(x: Tensor) -> torch.autocast:
    """Matrix products and convolutions in the precision of their tensors; there is no autocast on meta."""
    return torch.autocast('cpu' if x.is_meta else x.device.type, enabled=False)


def _exact(x: Tensor) -> Tensor:
    """For products that decide the loss: in float64 where float32 ones are rounded, TF32 for example."""
    return x.double() if x.dtype == torch.float32 and _rounded() and x.device.type != 'mps' else x


def _rounded() -> bool:
    """Whether torch.set_float32_matmul_precision or its newer forms ask for less than float32."""
    mode = getattr(torch.backends.cuda.matmul, 'fp32_precision', None)
    if mode is None:  # before torch 2.9
        return torch.get_float32_matmul_precision() != 'highest'
    rounded = ('tf32', 'bf16')
    return mode in rounded or torch.backends.mkldnn.matmul.fp32_precision in rounded


_rounded._dynamo_marked_constant = True  # torch.compiler.assume_constant_result, without its imports


def _full(x: Tensor, like: Tensor | None = None) -> Tensor:
    """In float32, or float64 if the student (like) is. Inference tensors are copied, to serve backward."""
    x = x.double() if (x if like is None else like).dtype == torch.float64 else x.float()
    compiling = getattr(torch.compiler, 'is_compiling', bool)()  # torch 2.2 cannot tell: False
    return x.clone() if not compiling and x.is_inference() else x


# ------------------------------------------ how the training scripts use it; a copied file may drop this


def feed(kd, s, t, batch):
    size, sides = t.out.shape[2:], ([s.fms[-2], s.feat, s.out], [t.fms[-2], t.feat, t.out])
    return kd(
        *([F.interpolate(x, size, mode='bilinear', align_corners=False) for x in maps] for maps in sides)
    )
