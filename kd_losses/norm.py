"""NORM, N-to-one representation matching: many linear views of the student's map each imitate the teacher's.

X. Liu, L. Li, C. Li, A. Yao, "NORM: Knowledge Distillation via N-to-One Representation Matching", ICLR 2023.

    the student gains a linear block after its last stage (FeatureTransform), for training and for use:
        wide = batch norm of a 1x1 convolution of x to R * C_t channels
        y = x + batch norm of a 1x1 convolution of wide back;  classifier on the average of y
    S_1 .. S_R = wide cut into R groups of C_t channels
    loss = sum over r of mean over n, c, h, w of (S_r - fm_t)^2

Tap: `wide`, and the teacher's last map after its ReLU, max-pooled if its side is a multiple of the student's.

Differences: the authors' loss. Their code also layer-normalises both networks' logits and multiplies them by
2.5 before cross-entropy; that is left out. Without an activation the block folds into one C x C affine map in
eval mode.

Source: OSVAI/NORM, helper/loops.py (train_distill) and models/cifar/*_student.py.

Use:
    >>> import torch
    >>> from norm import NORM, FeatureTransform
    >>> x, fm_t = torch.randn(8, 16, 4, 4, requires_grad=True), torch.randn(8, 32, 4, 4)
    >>> wide, y = FeatureTransform(16, 32)(x)  # y goes on to the classifier
    >>> NORM()(wide, fm_t).backward()
    >>> x.grad.norm() > 0
    tensor(True)
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class NORM(nn.Module):
    """R squared errors against one teacher map.

    Args:
        num_repeats: R, groups of channels in the student's wide map; 8.

    Shape:
        fm_s: (N, R C_t, h, w), fm_t: (N, C_t, H, W), H = k h and W = k w. Returns a scalar. No gradient
        reaches fm_t.
        Computed in float32, or in float64 as the student.

    Raises:
        ValueError: num_repeats < 1; channels, batch or sizes do not fit.
    """

    def __init__(self, num_repeats: int = 8) -> None:
        super().__init__()
        if num_repeats < 1:
            raise ValueError(f'NORM: num_repeats must be at least 1, got {num_repeats}')
        self.num_repeats = num_repeats

    def forward(self, fm_s: Tensor, fm_t: Tensor) -> Tensor:
        R = self.num_repeats
        _expect('NORM', 'fm_s', fm_s, 'N', 'C', 'H', 'W')
        if fm_s.shape[1] % R:
            raise ValueError(
                f'NORM: fm_s must be (N, {R} C, h, w), got {tuple(fm_s.shape)}: see FeatureTransform'
            )
        _expect('NORM', 'fm_t', fm_t, len(fm_s), fm_s.shape[1] // R, 'H', 'W')
        k = max(fm_t.shape[2] // fm_s.shape[2], 1)
        fm_s, fm_t, given = _full(fm_s), _full(fm_t.detach(), fm_s), tuple(fm_t.shape)
        fm_t = F.max_pool2d(fm_t, k) if 1 < k <= min(fm_t.shape[2:]) else fm_t
        if fm_t.shape[2:] != fm_s.shape[2:]:
            raise ValueError(
                f'NORM: fm_t must have the size of fm_s {tuple(fm_s.shape)} or a multiple, '
                f'got {given}: average-pool it first'
            )
        return R * F.mse_loss(fm_s, fm_t.repeat(1, R, 1, 1))


class FeatureTransform(nn.Module):
    """The linear block of a NORM student: map (N, s_channels, H, W) -> (wide, map of the same shape).

    With num_repeats = 1 it is the identity without parameters, and s_channels must equal t_channels.
    """

    def __init__(self, s_channels: int, t_channels: int, num_repeats: int = 8) -> None:
        super().__init__()
        self.expand = self.reduce = None
        if num_repeats > 1:
            wide = num_repeats * t_channels
            self.expand = nn.Sequential(nn.Conv2d(s_channels, wide, 1, bias=False), nn.BatchNorm2d(wide))
            self.reduce = nn.Sequential(
                nn.Conv2d(wide, s_channels, 1, bias=False), nn.BatchNorm2d(s_channels)
            )
        elif s_channels != t_channels:
            raise ValueError(
                f'FeatureTransform: with num_repeats = 1, t_channels must be {s_channels}, got {t_channels}'
            )

    def forward(self, fm: Tensor) -> tuple[Tensor, Tensor]:
        if self.expand is None:
            return fm, fm
        wide = self.expand(fm)
        return wide, self.reduce(wide) + fm


class NORMStudent(nn.Module):
    """A network with the transform between its last stage and its classifier, in training and in use.

    Args:
        net: `net(x, True)` gives (out, feat, fms, pres, extra), `net.after(k, fm)` goes on from its k-th map.
        s_channels, t_channels, num_repeats: of the transform.

    Shape:
        x: (N, 3, H, W). Returns logits; with True the network's tuple, `wide` as its `extra`.
    """

    def __init__(self, net: nn.Module, s_channels: int, t_channels: int, num_repeats: int = 8) -> None:
        super().__init__()
        self.net, self.transform = net, FeatureTransform(s_channels, t_channels, num_repeats)

    def forward(self, x: Tensor, feats: bool = False):
        f = self.net(x, True)
        wide, y = self.transform(f.fms[-1])
        end = self.net.after(len(f.fms) - 1, y)
        return f._replace(out=end.out, feat=end.feat, extra=wide) if feats else end.out


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
    return kd(s.extra, t.pres[-1].relu() if kd.t_sums else t.fms[-1])


def build(loss, probe, **options):
    kd = loss(**options)
    kd.t_sums = _sums(probe.t)
    return kd


def _sums(f) -> bool:
    """Whether the last map is before a ReLU, as a wide network's: not after it, and not without one."""
    return bool((f.fms[-1] < 0).any()) and not torch.equal(f.fms[-1], f.pres[-1])


def student(net, kd, probe):
    return NORMStudent(net, probe.s.fms[-1].shape[1], probe.t.fms[-1].shape[1], kd.num_repeats)
