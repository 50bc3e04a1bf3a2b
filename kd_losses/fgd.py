"""FGD, focal and global distillation: inside and outside of boxes, and how positions relate.

Z. Yang, Z. Li, X. Jiang, Y. Gong, Z. Yuan, D. Zhao, C. Yuan, "Focal and Global Knowledge Distillation for
Detectors", CVPR 2022, arXiv:2111.11837.

    x = align(fm_s), y = fm_t;  S(z) = H * W * softmax over positions of (mean over c of |z| / temp)
    A(z) = C * softmax over channels of (mean over positions of |z| / temp)
    fg = 1 / N * sum of M_fg * S(y) * A(y) * (x - y)^2,  bg the same with M_bg
        M_fg: the largest 1 / area of the boxes over a position, 0 outside;  M_bg: 1 / their number outside
    mask = 1 / N * (sum |A(x) - A(y)| + sum |S(x) - S(y)|)
    relation = 1 / N * sum of (G(x) - G(y))^2, G a global context block (each side its own, both trained)
    loss = alpha * fg + beta * bg + gamma * mask + lambd * relation

Tap: each map of the feature pyramid, one instance per level, levels summed; and the boxes of the truth in the
picture that the network saw: image_size is the padded batch's. Two-stage detectors: alpha 5e-5, beta 2.5e-5,
gamma 5e-5, lambd 5e-7 on the first four levels. RepPoints, FCOS: 1.6e-3, 8e-4, 8e-4, 8e-6 (FCOS temp 0.8).

Differences: the authors scale boxes by the size before padding, which stretches their masks, and a box that
starts left of the picture indexes from its right end; here boxes are cut. Their class has another default of
gamma than all their configurations; ours is RetinaNet's. A box covers one cell more than it needs, as in
the authors' code.

Source: yzd-v/FGD, mmdet/distillation/losses/fgd.py (FeatureLoss).

Use:
    >>> import torch
    >>> from fgd import FGD
    >>> fm_s, fm_t = torch.randn(2, 4, 8, 8, requires_grad=True), torch.randn(2, 6, 8, 8)
    >>> boxes = [torch.tensor([[3.0, 3, 30, 40]]), torch.zeros(0, 4)]
    >>> FGD(4, 6)(fm_s, fm_t, boxes, (64, 64)).backward()
    >>> fm_s.grad.norm() > 0
    tensor(True)
"""

import torch
from torch import Tensor, nn


class FGD(nn.Module):
    """Squared error of maps, weighed by boxes and by the teacher's attention, and of global contexts.

    Args:
        s_channels, t_channels: channels of the two maps; t_channels >= 4.
        temp: temperature of the attention, > 0; 0.5.
        alpha, beta, gamma, lambd: weights of the terms; those of RetinaNet.

    Shape:
        fm_s: (N, s_channels, H, W), fm_t: (N, t_channels, H, W). boxes: N tensors (M, 4) of x1, y1, x2, y2 in
        pixels, M may be 0. image_size: height and width in pixels, for all or (N, 2). Returns a scalar;
        `terms` returns (fg, bg, mask, relation) without their weights. No gradient reaches fm_t.
        Computed in float32, or in float64 as the student.

    Raises:
        ValueError: temp is not positive; t_channels < 4; shapes differ; boxes are not one tensor per picture.
    """

    def __init__(
        self,
        s_channels: int,
        t_channels: int,
        temp: float = 0.5,
        alpha: float = 0.001,
        beta: float = 0.0005,
        gamma: float = 0.0005,
        lambd: float = 0.000005,
    ) -> None:
        super().__init__()
        if not temp > 0 or t_channels < 4:
            raise ValueError(f'FGD: temp > 0 and t_channels >= 4 are needed, got {temp} and {t_channels}')
        self.s_channels, self.t_channels, self.temp = s_channels, t_channels, temp
        self.alpha, self.beta, self.gamma, self.lambd = alpha, beta, gamma, lambd
        self.align = nn.Conv2d(s_channels, t_channels, kernel_size=1) if s_channels != t_channels else None
        self.mask_s, self.mask_t = (nn.Conv2d(t_channels, 1, kernel_size=1) for _ in range(2))
        self.channel_s, self.channel_t = (_bottleneck(t_channels) for _ in range(2))
        for layer in (self.mask_s, self.mask_t):
            nn.init.kaiming_normal_(layer.weight, mode='fan_in')
            nn.init.zeros_(layer.bias)

    def forward(self, fm_s: Tensor, fm_t: Tensor, boxes: list[Tensor], image_size) -> Tensor:
        fg, bg, mask, relation = self.terms(fm_s, fm_t, boxes, image_size)
        return self.alpha * fg + self.beta * bg + self.gamma * mask + self.lambd * relation

    def terms(
        self, fm_s: Tensor, fm_t: Tensor, boxes: list[Tensor], image_size
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        _expect('FGD', 'fm_s', fm_s, 'N', self.s_channels, 'H', 'W')
        n, _, *size = fm_s.shape
        _expect('FGD', 'fm_t', fm_t, n, self.t_channels, *size)
        if len(boxes) != n:
            raise ValueError(
                f'FGD: boxes must be one tensor per picture, {n}, got {len(boxes)}: torch.zeros(0, 4) '
                'where there is none'
            )
        inside, outside = masks([_full(box, fm_s) for box in boxes], image_size, size)
        with _no_autocast(fm_s):
            x, y = _full(fm_s), _full(fm_t.detach(), fm_s)
            x = x if self.align is None else _run(self.align, x)
            inside, outside = (m.to(x) for m in (inside, outside))
            (at_x, of_x), (at_y, of_y) = self.attention(x), self.attention(y)
            error = (x - y).square().mul(of_y[:, :, None, None]).sum(dim=1) * at_y
            mask = ((of_x - of_y).abs().sum() + (at_x - at_y).abs().sum()) / n
            contexts = self._context(x, self.mask_s, self.channel_s) - self._context(
                y, self.mask_t, self.channel_t
            )
            relation = (x - y + contexts).square().sum() / n
            return (error * inside).sum() / n, (error * outside).sum() / n, mask, relation

    def attention(self, fm: Tensor) -> tuple[Tensor, Tensor]:
        """How much the map attends to each position (N, H, W), on average 1, and to each channel (N, C)."""
        n, c, h, w = fm.shape
        size = fm.abs()
        positions = (size.mean(dim=1).flatten(1) / self.temp).softmax(dim=1) * (h * w)
        return positions.view(n, h, w), (size.mean(dim=(2, 3)) / self.temp).softmax(dim=1) * c

    def _context(self, fm: Tensor, mask: nn.Module, channel: nn.Module) -> Tensor:
        """What the global context block adds to the map (N, C, 1, 1)."""
        where = _run(mask, fm).flatten(2).softmax(dim=2)
        return _run(channel, (fm.flatten(2) * where).sum(dim=2)[:, :, None, None])


def masks(boxes: list[Tensor], image_size, size) -> tuple[Tensor, Tensor]:
    """Weights of positions inside and outside of the boxes, each (N, H, W); size: H and W of the map.

    A box without area or wholly outside of the picture counts nothing.
    """
    for i, box in enumerate(boxes):
        if tuple(box.shape) != (0, 4):
            _expect('FGD', f'boxes[{i}]', box, 'M', 4)
    n, (h, w), device = len(boxes), size, boxes[0].device
    if isinstance(image_size, (list, tuple)) and isinstance(image_size[0], Tensor):
        image_size = torch.stack(list(image_size))
    sizes = torch.as_tensor(image_size, device=device)
    sizes = sizes.expand(n, 2) if sizes.shape == (2,) else sizes
    _expect('FGD', 'image_size', sizes, n, 2)
    sizes = _full(sizes, boxes[0])
    rows, columns = (torch.arange(length, device=device) for length in (h, w))
    fg = []
    for box, (height, width) in zip(boxes, sizes):
        box = _full(box, boxes[0])
        x1, y1, x2, y2 = box.unbind(dim=1)
        counts = (x2 > x1) & (y2 > y1) & (x2 > 0) & (y2 > 0) & (x1 < width) & (y1 < height)
        left, right = (x1 / width * w).floor(), (x2 / width * w).ceil()
        top, bottom = (y1 / height * h).floor(), (y2 / height * h).ceil()
        weight = torch.where(counts, 1 / ((bottom + 1 - top) * (right + 1 - left)), 0.0)
        in_rows = (top[:, None] <= rows) & (rows <= bottom[:, None])
        in_columns = (left[:, None] <= columns) & (columns <= right[:, None])
        covers = in_rows[:, :, None] & in_columns[:, None, :]
        nothing = box.new_zeros(1, h, w) + 0 * (box.sum() + height + width)  # what is not finite must show
        fg.append(torch.cat([nothing, torch.where(covers, weight[:, None, None], 0.0)]).amax(dim=0))
    fg = torch.stack(fg)
    bg = (fg == 0).to(fg.dtype)
    return fg, bg / bg.sum(dim=(1, 2), keepdim=True).clamp(min=1)


def _bottleneck(channels: int) -> nn.Sequential:
    last = nn.Conv2d(channels // 2, channels, kernel_size=1)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    norm = nn.LayerNorm([channels // 2, 1, 1])
    return nn.Sequential(nn.Conv2d(channels, channels // 2, kernel_size=1), norm, nn.ReLU(), last)


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
    return sum(k(x, y, batch.boxes, batch.image_size) for k, x, y in zip(kd, s.fms, t.fms))


def build(loss, probe, **options):
    of_two_stages = zip(('alpha', 'beta', 'gamma', 'lambd'), (5e-5, 2.5e-5, 5e-5, 5e-7))
    weights = dict(of_two_stages) if probe.s.two_stage else {}
    return nn.ModuleList(
        loss(x.shape[1], y.shape[1], **{**weights, **options}) for x, y in zip(probe.s.fms, probe.t.fms)
    )
