"""Af-DCD, augmentation-free dense contrastive distillation: each piece of a vector finds the teacher's.

J. Fan, C. Li, X. Liu, M. Song, A. Yao, "Augmentation-Free Dense Contrastive Knowledge Distillation for
Efficient Semantic Segmentation", NeurIPS 2023.

    g = projector(align(fm_s) * mask)                                     (trained with the student)
    feature = 1 / N * sum over everything of (g - fm_t)^2
    a, b = g and fm_t max-pooled, cut into patches of positions, their channels into M groups
    d = L1 distance of the student's (position, group) to those of the teacher in the same patch
    contrast = 1 / (N * h * w) * sum of -log(exp(-d_own / T) / (exp(-d_own / T) + sum of exp(-d_other / T))),
               d_own: same position and group;  d_other: every position, another group
    loss = w_feature * feature + w_contrast * contrast

Tap: the last map of the backbone, at an eighth of the picture (512 and 2048 channels). Small maps need a
small pool and patch: 8 x 8 positions pool=2, patch=(2, 2). Authors' weights: Cityscapes 2e-6 and 0.005,
ADE20K 1e-6 and 0.04, COCO-Stuff 5e-6 and 0.005, VOC 1e-6 and 0.005, CamVid 8e-6 and 0.01, beside soft targets
per pixel.

Differences: equal channels fail in the authors' class, here there is no align then. Their cropping for CamVid
is the caller's. Do not judge the contrast by its value: where all entries of the student lie on one side of
the teacher's, its gradient is exactly 0, until the feature term has moved the student.

Source: OSVAI/Af-DCD, losses/ocmgd.py (OmniContrastiveFeatureLoss).

Use:
    >>> import torch
    >>> from afdcd import AfDCD
    >>> fm_s, fm_t = torch.randn(2, 4, 16, 16, requires_grad=True), torch.randn(2, 16, 16, 16)
    >>> AfDCD(4, 16, groups=4)(fm_s, fm_t).backward()
    >>> fm_s.grad.norm() > 0
    tensor(True)
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class AfDCD(nn.Module):
    """A masked reconstruction of the teacher's map, and its contrast between groups of channels in patches.

    Args:
        s_channels, t_channels: channels of the two maps; groups must divide t_channels.
        T: temperature, > 0; 0.07.
        groups: M; with one there is no contrast, it is 0.
        pool: side and stride of the maximum; 0 for none.
        patch: height and width of a patch, in positions after pooling, which they must divide.
        mask_ratio: share of positions hidden from the projector, in [0, 1); 0.75.
        enhanced: a projector of four convolutions, the mean of two depths.
        w_feature, w_contrast: weights of the terms.

    Shape:
        fm_s: (N, s_channels, H, W), fm_t: (N, t_channels, H, W). mask: (N, 1, H, W) of 0 (hidden) and 1
        instead of a drawn one. generator: where to draw from. Returns a scalar; `terms` returns (feature,
        contrast) without their weights. No gradient reaches fm_t. Computed in float32, or in float64 as the
        student.

    Raises:
        ValueError: an argument is not legal; a map has other channels or another size than announced; its
        size divided by pool and rounded down is no multiple of patch; mask does not fit.
    """

    def __init__(
        self,
        s_channels: int,
        t_channels: int,
        T: float = 0.07,
        groups: int = 16,
        pool: int = 4,
        patch: tuple[int, int] = (4, 4),
        mask_ratio: float = 0.75,
        enhanced: bool = False,
        w_feature: float = 2e-6,
        w_contrast: float = 0.005,
    ) -> None:
        super().__init__()
        if not T > 0 or not 0 <= mask_ratio < 1 or pool < 0 or min(patch) < 1:
            raise ValueError(
                'AfDCD: T > 0, mask_ratio in [0, 1), pool >= 0 and patch sides >= 1 are needed, got '
                f'{T}, {mask_ratio}, {pool} and {tuple(patch)}'
            )
        if groups < 1 or t_channels % groups:
            raise ValueError(f'AfDCD: groups must divide {t_channels} channels, got {groups}')
        self.s_channels, self.t_channels, self.T, self.groups = s_channels, t_channels, T, groups
        self.pool, self.patch, self.mask_ratio = pool, tuple(patch), mask_ratio
        self.w_feature, self.w_contrast = w_feature, w_contrast
        self.align = nn.Conv2d(s_channels, t_channels, kernel_size=1) if s_channels != t_channels else None
        if enhanced:
            self.projector = _TwoDepths(t_channels)
        else:
            self.projector = nn.Sequential(_conv(t_channels), nn.ReLU(), _conv(t_channels))

    def forward(
        self, fm_s: Tensor, fm_t: Tensor, mask: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        feature, contrast = self.terms(fm_s, fm_t, mask, generator)
        return self.w_feature * feature + self.w_contrast * contrast

    def terms(
        self, fm_s: Tensor, fm_t: Tensor, mask: Tensor | None = None, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        _expect('AfDCD', 'fm_s', fm_s, 'N', self.s_channels, 'H', 'W')
        n, _, *size = fm_s.shape
        _expect('AfDCD', 'fm_t', fm_t, n, self.t_channels, *size)
        pooled = [length // (self.pool or 1) for length in size]
        if 0 in pooled or any(length % side for length, side in zip(pooled, self.patch)):
            raise ValueError(
                f'AfDCD: fm_s must have a size that is a multiple of patch {self.patch} once divided by pool '
                f'{self.pool}, got {tuple(fm_s.shape)}: take a smaller pool (0 is none) or patch'
            )
        if mask is None:
            mask = torch.rand(n, 1, *size, device=fm_s.device, **_by(generator)) >= self.mask_ratio
        else:
            _expect('AfDCD', 'mask', mask, n, 1, *size)
        with _no_autocast(fm_s):
            x, fm_t = _full(fm_s), _full(fm_t.detach(), fm_s)
            hidden = 0 * x.detach().sum()  # a ReLU may swallow an inf, which must show
            x = x if self.align is None else _run(self.align, x)
            g = _run(self.projector, x * _full(mask, x))
            feature = (g - fm_t).square().sum() / n + hidden
            return feature, self._contrast(g, fm_t) / (n * pooled[0] * pooled[1])

    def _contrast(self, g: Tensor, fm_t: Tensor) -> Tensor:
        a, b = self._pieces(g), self._pieces(fm_t)
        logits = torch.cdist(a, b, p=1) / -self.T
        group = torch.arange(a.shape[1], device=a.device) % self.groups
        left_out = group[:, None] == group
        left_out.fill_diagonal_(False)
        own = logits.diagonal(dim1=1, dim2=2)
        return (logits.masked_fill(left_out, -torch.inf).logsumexp(dim=2) - own).sum()

    def _pieces(self, fm: Tensor) -> Tensor:
        """(patches, positions * groups, channels of a group)."""
        if self.pool:
            fm = F.max_pool2d(fm, self.pool)
        n, c, h, w = fm.shape
        high, wide = self.patch
        fm = fm.reshape(n, self.groups, c // self.groups, h // high, high, w // wide, wide)
        return fm.permute(0, 3, 5, 4, 6, 1, 2).flatten(0, 2).flatten(1, 3)


class _TwoDepths(nn.Module):
    """The mean of a projector of two convolutions and one of three, which share the first."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block1, self.block2 = (nn.Sequential(_conv(channels), nn.ReLU()) for _ in range(2))
        self.out1, self.out2 = _conv(channels), _conv(channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block1(x)
        return (self.out1(x) + self.out2(self.block2(x))) / 2


def _conv(channels: int) -> nn.Conv2d:
    return nn.Conv2d(channels, channels, kernel_size=3, padding=1)


def _by(generator: torch.Generator | None) -> dict:
    """Left out where there is none: torch.compile cannot pass None for a batch of another size."""
    return {} if generator is None else {'generator': generator}


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


def _run(module: nn.Module, x: Tensor, *more):
    """module(x, ...) in the precision of x, whatever half() or double() has made of the parameters."""
    if all(p.dtype == x.dtype for p in module.parameters()):
        return module(x, *more)
    state = {name: _full(p, x) for name, p in module.named_parameters()}
    state |= {name: _full(b, x) if b.is_floating_point() else b for name, b in module.named_buffers()}
    y = torch.func.functional_call(module, state, (x, *more))
    with torch.no_grad():
        for name, b in module.named_buffers():  # running statistics
            if b is not state[name]:  # a copy onto itself is a change, which backward would refuse
                b.copy_(state[name])
    return y


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
    x, y = s.fms[-1], t.fms[-1]
    x = (
        x
        if x.shape[2:] == y.shape[2:]
        else F.interpolate(x, y.shape[2:], mode='bilinear', align_corners=False)
    )
    return kd(x, y, generator=batch.generator)


def build(loss, probe, **options):
    y = probe.t.fms[-1]
    pool = next(
        (p for p in (4, 2) if not any(side % (4 * p) for side in y.shape[2:])), 0
    )  # of small maps less
    return loss(probe.s.fms[-1].shape[1], y.shape[1], **{'pool': pool, **options})
