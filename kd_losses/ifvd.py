"""IFVD, intra-class feature variation: how alike each pixel is to the centre of its class.

Y. Wang, W. Zhou, T. Jiang, X. Bai, Y. Xu, "Intra-class Feature Variation Distillation for Semantic
Segmentation", ECCV 2020.

    centre of class k in picture n = sum of its vectors / (their number + 1e-6), of each network its own
    v[n, h, w] = cosine of the vector there and the centre of its class
    loss = mean over all n, h, w of (v_s - v_t)^2

Positions without a label contribute 0 but count in the mean. The gradient goes through vectors and centres.

Tap: the map that the classifier reads, and the labels of the pixels, which are brought to the map's size
(nearest neighbour). Widths may differ. Weight 20 in CIRKD's comparison, 200 in the authors' options. Nothing
is learnt.

Differences: the authors take every label outside 0..K-1 as unlabelled; here only `ignore` and -100 are,
others are refused. They compare an unlabelled vector with itself; here it is left out, which is the same but
for zero vectors. A zero vector has no direction: cosine 0 and no gradient, where the code's is a
hundred million.

Source: YukangWang/IFVD, utils/criterion.py (CriterionIFV).

Use:
    >>> import torch
    >>> from ifvd import IFVD
    >>> fm_s, fm_t = torch.randn(2, 4, 8, 8, requires_grad=True), torch.randn(2, 6, 8, 8)
    >>> IFVD(num_classes=3)(fm_s, fm_t, torch.randint(3, (2, 32, 32))).backward()
    >>> fm_s.grad.norm() > 0
    tensor(True)
"""

import torch
from torch import Tensor, nn


class IFVD(nn.Module):
    """Squared error of the cosines between pixels and the centres of their classes.

    Args:
        num_classes: labels are 0 .. num_classes - 1.
        ignore: the label of pixels that have none, -1; 255 in the files of VOC. -100 is left out as well.

    Shape:
        fm_s: (N, C_s, H, W), fm_t: (N, C_t, H, W), target: (N, H_0, W_0) integers of any size. Returns a
        scalar, 0 if no pixel has a label. No gradient reaches fm_t.
        Computed in float32, also under TF32, or in float64 as the student.

    Raises:
        ValueError: shapes differ; target is not of integers; a label is none of the above (on the CPU).
    """

    def __init__(self, num_classes: int, ignore: int = -1) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f'IFVD: num_classes must be >= 1, got {num_classes}')
        self.num_classes, self.ignore = num_classes, ignore

    def forward(self, fm_s: Tensor, fm_t: Tensor, target: Tensor) -> Tensor:
        _expect('IFVD', 'fm_s', fm_s, 'N', 'C', 'H', 'W')
        _expect('IFVD', 'fm_t', fm_t, len(fm_s), 'C', *fm_s.shape[2:])
        y, valid = _dense_labels('IFVD', target, len(fm_s), self.num_classes, self.ignore)
        y, valid = (_nearest(x, *fm_s.shape[2:]).flatten(1) for x in (y, valid))
        classes = torch.arange(self.num_classes, device=y.device)
        is_y = (y[:, :, None] == classes) & valid[:, :, None]
        with _no_autocast(fm_s):
            v_s = _variation(_full(fm_s).flatten(2), is_y)
            v_t = _variation(_full(fm_t.detach(), fm_s).flatten(2), is_y)
            return torch.where(valid, v_s - v_t, 0.0).square().mean()


def _variation(f: Tensor, is_y: Tensor) -> Tensor:
    """Vectors (N, C, HW) and their classes (N, HW, K), all 0 where there is none -> cosines (N, HW)."""
    x, is_y = _exact(f), is_y.to(_exact(f).dtype)
    centres = x @ is_y / (is_y.sum(dim=1, keepdim=True) + 1e-6)
    return (_direction(x) * _direction(centres @ is_y.mT)).sum(dim=1).to(f.dtype)


def _direction(x: Tensor) -> Tensor:
    """Vectors along axis 1 by their length, at least 1e-8; a zero vector stays zero and gets no gradient."""
    norm = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    dead = norm <= 1e-12  # NaN is not: it must show in the loss
    return torch.where(dead, 0.0, x / torch.where(dead, 1.0, norm.clamp(min=1e-8)))


def _dense_labels(who: str, target: Tensor, n: int, K: int, ignore: int) -> tuple[Tensor, Tensor]:
    """Labels (N, H, W) of 0..K-1 as int64, and where they count: not at ignore and -100, which are 0 then.

    Other labels are refused, but on a GPU, where looking at them would wait, only by the kernels.
    """
    _expect(who, 'target', target, n, 'H', 'W')
    if target.is_floating_point():
        raise ValueError(f'{who}: target must be of integers, got {target.dtype}: target.long()')
    target = target.long()
    valid = (target != ignore) & (target != -100)
    if target.device.type == 'cpu' and not getattr(torch.compiler, 'is_compiling', bool)():
        bad = target[valid & ((target < 0) | (target >= K))]
        if len(bad):
            raise ValueError(
                f'{who}: target must be in 0..{K - 1}, or {ignore} or -100 for pixels without a label, got '
                f'{bad[0].item()}: set `ignore` to the mark of your data'
            )
    return torch.where(valid, target, 0), valid


def _nearest(y: Tensor, h: int, w: int) -> Tensor:
    """Labels (N, H, W) at the size of a map, by nearest neighbour, in integers."""
    rows = torch.arange(h, device=y.device) * y.shape[1] // h
    return y[:, rows][:, :, torch.arange(w, device=y.device) * y.shape[2] // w]


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
