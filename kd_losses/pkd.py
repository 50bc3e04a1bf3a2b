"""PKD, Pearson correlation of pyramid maps: what varies together, whatever its scale and offset.

W. Cao, Y. Zhang, J. Gao, A. Cheng, K. Cheng, J. Cheng, "PKD: General Distillation Framework for Object
Detectors via Pearson Correlation Coefficient", NeurIPS 2022, arXiv:2207.02039. (Not "patient KD" of language
models, which has the same letters.)

    norm(z)[c] = (z[:, c] - mean) / (std + 1e-6), over batch and positions, std with n - 1
    level = 1/2 * mean over all elements of (norm(fm_s) - norm(fm_t))^2
    loss = sum over the levels of the pyramid

To the 1e-6 this is (n - 1) / n * (1 - correlation), averaged over the channels: detectors whose maps have
other magnitudes, or are other detectors altogether, can teach.

Tap: the maps of the feature pyramid, before any ReLU; both sides have its channels. Authors' weight per
level: 6 for two-stage detectors (the first four levels), 10 for RetinaNet and RepPoints, 2 for RetinaNet and
FCOS. Nothing is learnt. Levels are summed, as the weights are the authors'.

Differences: the authors resize where the heights differ and fail where only the widths do; here where either
does. A channel of the student that is constant has no gradient; there it is a million times the teacher's
map.

Source: open-mmlab/mmrazor, mmrazor/models/losses/pkd_loss.py (PKDLoss).

Use:
    >>> import torch
    >>> from pkd import PKD
    >>> fms_s = [torch.randn(2, 16, k, k, requires_grad=True) for k in (8, 4)]
    >>> PKD()(fms_s, [torch.randn(2, 16, k, k) for k in (8, 4)]).backward()
    >>> fms_s[1].grad.norm() > 0
    tensor(True)
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PKD(nn.Module):
    """Half the squared error of maps whose channels are standardised over batch and positions.

    Args:
        resize_student: where sizes differ, the student's map is brought to the teacher's size (bilinear),
            else the teacher's to the student's.

    Shape:
        fms_s, fms_t: a map (N, C, H, W) or a list of them, one per level, from shallow to deep; equal
        channels, any sizes. Returns a scalar, the sum over the levels. No gradient reaches fms_t.
        Computed in float32, or in float64 as the student.

    Raises:
        ValueError: the numbers of levels differ; a map is not 4-D or has other channels; a channel has one
        value in the whole batch.
    """

    def __init__(self, resize_student: bool = True) -> None:
        super().__init__()
        self.resize_student = resize_student

    def forward(self, fms_s: Tensor | list[Tensor], fms_t: Tensor | list[Tensor]) -> Tensor:
        fms_s, fms_t = ([x] if isinstance(x, Tensor) else list(x) for x in (fms_s, fms_t))
        if len(fms_s) != len(fms_t) or not fms_s:
            raise ValueError(
                f'PKD: fms_s and fms_t must have one map per level each, got {len(fms_s)} and {len(fms_t)}: '
                'take the levels that both pyramids have'
            )
        return sum(self._level(i, x, y) for i, (x, y) in enumerate(zip(fms_s, fms_t)))

    def _level(self, i: int, fm_s: Tensor, fm_t: Tensor) -> Tensor:
        _expect('PKD', f'fms_s[{i}]', fm_s, 'N', 'C', 'H', 'W')
        _expect('PKD', f'fms_t[{i}]', fm_t, *fm_s.shape[:2], 'H', 'W')
        with _no_autocast(fm_s):
            x, y = _full(fm_s), _full(fm_t.detach(), fm_s)
            if x.shape != y.shape:
                if self.resize_student:
                    x = F.interpolate(x, y.shape[2:], mode='bilinear', align_corners=False)
                else:
                    y = F.interpolate(y, x.shape[2:], mode='bilinear', align_corners=False)
            if x[:, 0].numel() < 2:
                raise ValueError(
                    f'PKD: fms_s[{i}] must have two values per channel, got {tuple(x.shape)}: leave this '
                    'level out or take a larger batch'
                )
            return 0.5 * (_by_deviation(x) - _by_deviation(y)).square().mean()


def _by_deviation(x: Tensor) -> Tensor:
    """Every channel with mean 0 and deviation 1 over batch and positions; 0, and no gradient, if constant."""
    mean = x.mean(dim=(0, 2, 3), keepdim=True)
    x = x - mean
    var = x.square().sum(dim=(0, 2, 3), keepdim=True) / (x[:, 0].numel() - 1)
    # of equal numbers the mean is off by a rounding. NaN is not dead: it must show in the loss
    dead = var <= (8 * torch.finfo(x.dtype).eps * mean).square().clamp(min=1e-24)
    return torch.where(dead, 0.0, x / (torch.where(dead, 1.0, var).sqrt() + 1e-6))


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


def _full(x: Tensor, like: Tensor | None = None) -> Tensor:
    """In float32, or float64 if the student (like) is. Inference tensors are copied, to serve backward."""
    x = x.double() if (x if like is None else like).dtype == torch.float64 else x.float()
    compiling = getattr(torch.compiler, 'is_compiling', bool)()  # torch 2.2 cannot tell: False
    return x.clone() if not compiling and x.is_inference() else x
