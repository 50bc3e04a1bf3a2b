"""FreeKD, semantic frequency prompts: wavelet details of maps, where masks that the teacher has learnt look.

Y. Zhang, T. Huang, J. Liu, T. Jiang, K. Cheng, S. Zhang, "FreeKD: Knowledge Distillation via Semantic
Frequency Prompt", CVPR 2024, arXiv:2311.12079.

    low, high_1 .. high_J = Haar transform of a map, J levels, high_j: three details of half the size
    m_jt = sigmoid(token[j, t] . sum of the three details of the teacher's high_j), per position
    loss = sum over j of mean over n, t, c, details and positions of |m_jt * (high_j(x) - high_j(fm_t))|,
        x = align(fm_s)

First phase, with the teacher alone: `learn` gives the map, its bands masked, that replaces the teacher's own
on its way to the teacher's task loss, and the overlap (dice) of the masks, which is added; only token learns,
then it is frozen.

Tap: each map of a feature pyramid, one instance per level, levels summed, weight 1. The low band is not
distilled: the authors add the mean squared error of the maps with weight 5, and a smooth L1 of the boxes.

Differences: the authors unpack three levels into names of three orientations; this is what their code does,
not what its names say. Maps of odd sizes come back larger from their inverse, here they are cut.

Source: Gumpest/FreeKD, mmrazor/models/losses/freekd.py (FreeKDLoss).

Use:
    >>> import torch
    >>> from freekd import FreeKD
    >>> fm_s, fm_t = torch.randn(2, 4, 8, 8, requires_grad=True), torch.randn(2, 6, 8, 8)
    >>> FreeKD(4, 6)(fm_s, fm_t).backward()
    >>> fm_s.grad.norm() > 0
    tensor(True)
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FreeKD(nn.Module):
    """Absolute differences of Haar details, under masks that tokens read from the teacher's details.

    Args:
        s_channels: channels of the student's map, brought to the teacher's by a 1x1 convolution; None:
            without one, equal channels.
        t_channels: channels of the teacher's map.
        tokens: masks per band; 6.
        levels: of the transform; 3.

    Shape:
        fm_s: (N, s_channels, H, W), fm_t: (N, t_channels, H, W), of any size. Returns a scalar; gradients
        reach fm_s and align only. learn(fm_t) returns a map like fm_t and a scalar; gradients reach token
        only. Computed in float32, also under TF32, or in float64 as the student.

    Raises:
        ValueError: tokens or levels < 1; a map has other channels or another size.
    """

    def __init__(self, s_channels: int | None, t_channels: int, tokens: int = 6, levels: int = 3) -> None:
        super().__init__()
        if min(tokens, levels) < 1:
            raise ValueError(f'FreeKD: tokens and levels must be >= 1, got {tokens} and {levels}')
        self.s_channels, self.t_channels = t_channels if s_channels is None else s_channels, t_channels
        self.levels = levels
        self.align = None if s_channels is None else nn.Conv2d(s_channels, t_channels, kernel_size=1)
        self.token = nn.Parameter(torch.randn(levels + 1, tokens, t_channels) * 0.01)

    def forward(self, fm_s: Tensor, fm_t: Tensor) -> Tensor:
        _expect('FreeKD', 'fm_s', fm_s, 'N', self.s_channels, 'H', 'W')
        _expect('FreeKD', 'fm_t', fm_t, len(fm_s), self.t_channels, *fm_s.shape[2:])
        with _no_autocast(fm_s):
            x, y = _full(fm_s), _full(fm_t.detach(), fm_s)
            x = x if self.align is None else _run(self.align, x)
            apart, teacher = haar(x - y, self.levels)[1], haar(y, self.levels)[1]  # the transform is linear
            loss = 0.0
            for token, d, high in zip(self.token[1:], apart, teacher):
                m = _masks(token, high.sum(dim=2)).detach()
                loss = loss + (d.abs().mean(dim=(1, 2)) * m.mean(dim=1)).mean()
            return loss

    def learn(self, fm_t: Tensor) -> tuple[Tensor, Tensor]:
        """The teacher's map as its masks let it through, and how much they overlap, for the first phase."""
        low, highs, dice = self.masked_bands(fm_t)
        return inverse(low, highs)[..., : fm_t.shape[2], : fm_t.shape[3]], dice

    def masked_bands(self, fm_t: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
        """The bands of the teacher's map, each times the sum of its masks, and the masks' overlap."""
        _expect('FreeKD', 'fm_t', fm_t, 'N', self.t_channels, 'H', 'W')
        with _no_autocast(fm_t):
            low, highs = haar(_full(fm_t.detach()), self.levels)
            of_low, *of_highs = (
                _masks(token, band) for token, band in zip(self.token, [low, *(h.sum(dim=2) for h in highs)])
            )
            highs = [h * m.sum(dim=1)[:, None, None] for h, m in zip(highs, of_highs)]
            return low * of_low.sum(dim=1, keepdim=True), highs, sum(map(_dice, [of_low, *of_highs]))


def haar(fm: Tensor, levels: int) -> tuple[Tensor, list[Tensor]]:
    """The low band, and details (N, C, 3, h, w) of each level, the finest first; odd sizes are padded."""
    highs = []
    for _ in range(levels):
        fm = F.pad(fm, (0, fm.shape[3] % 2, 0, fm.shape[2] % 2))
        a, b, c, d = (fm[..., i::2, j::2] for i in (0, 1) for j in (0, 1))
        highs.append(torch.stack([a + b - c - d, a - b + c - d, a - b - c + d], dim=2) / 2)
        fm = (a + b + c + d) / 2
    return fm, highs


def inverse(low: Tensor, highs: list[Tensor]) -> Tensor:
    """The map of these bands, with the row and column that an odd size got."""
    for high in reversed(highs):
        u, v, w = high.unbind(dim=2)
        low = low[..., : high.shape[3], : high.shape[4]]
        upper = torch.stack([low + u + v + w, low + u - v - w], dim=-1).flatten(-2)
        lower = torch.stack([low - u + v - w, low - u - v + w], dim=-1).flatten(-2)
        low = torch.stack([upper, lower], dim=-2).flatten(-3, -2) / 2
    return low


def _masks(token: Tensor, fm: Tensor) -> Tensor:
    """Tokens (T, C) and a map (N, C, H, W) -> (N, T, H, W)."""
    with _no_autocast(fm):
        x = _full(fm)
        m = _exact(_full(token, x)) @ _exact(x.flatten(2))
        return m.to(x.dtype).sigmoid().view(len(x), len(token), *x.shape[2:])


def _dice(m: Tensor) -> Tensor:
    """Overlap of masks (N, T, H, W): the mean over pictures and pairs, 0 for one mask."""
    n, tokens = m.shape[:2]
    m = m.flatten(2)
    products = (_exact(m) @ _exact(m).mT).to(m.dtype)
    own = products.diagonal(dim1=1, dim2=2)
    dice = 2 * products / (own[:, :, None] + own[:, None, :] + 2e-12)
    pairs = dice.sum() - dice.diagonal(dim1=1, dim2=2).sum()
    return pairs / (n * max(tokens * (tokens - 1), 1))


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
    """With the mean squared error of the maps, 5 times, as the authors have it."""
    for x, y in zip(s.fms, t.fms):
        if x.shape[1] != y.shape[1]:
            raise ValueError(
                f'freekd: the squared error beside it needs pyramids of one width, got {x.shape[1]} channels '
                f'and {y.shape[1]}: maskd aligns them'
            )
    return sum(k(x, y) + 5 * F.mse_loss(x, y.detach()) for k, x, y in zip(kd, s.fms, t.fms))
