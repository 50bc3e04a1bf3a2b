"""MasKD, masked distillation with receptive tokens: masks that the teacher has learnt say where to imitate.

T. Huang, Y. Zhang, S. You, F. Wang, C. Qian, J. Cao, C. Xu, "Masked Distillation with Receptive Tokens", ICLR
2023, arXiv:2205.14589.

    m_t(z) = sigmoid(token_t . z[:, h, w]), a mask per token;  w(z) = softmax over the tokens of prob(z)
    d[n, t, c] = sum over positions of m_t(y)^2 * (align(fm_s) - y)^2 / sum of m_t(y),  y = fm_t
    loss = mean over n of sum over t of w_t(y) * mean over c of d      (not weighted: the mean of d)

First phase, with the teacher alone: `learn` gives the map, masked, that replaces the teacher's own on its way
to the teacher's task loss, and the overlap (dice) of the masks, which is added; only token and prob learn,
then they are frozen.

Tap: maps of a feature pyramid (detection: 6 tokens, weighted; weight 7 RetinaNet, 10 FCOS, 1 two-stage;
levels summed), or logit maps (segmentation: s_channels=None, 8 tokens, weighted=False, half=True).
customise=True from step 5000 to 8500 on multiplies the student's own masks in.

Differences: this is the authors' mmrazor version, half=True their segmentation's (half of it, 1e-5 added
below). Their step counter is lost when a training resumes: customise is an argument. The sum of a mask is at
least 1e-5.

Source: hunto/MasKD, mmrazor/mmrazor/models/losses/maskd.py (MasKDLoss).

Use:
    >>> import torch
    >>> from maskd import MasKD
    >>> fm_s, fm_t = torch.randn(2, 4, 8, 8, requires_grad=True), torch.randn(2, 6, 8, 8)
    >>> MasKD(4, 6)(fm_s, fm_t).backward()
    >>> fm_s.grad.norm() > 0
    tensor(True)
"""

import torch
from torch import Tensor, nn


class MasKD(nn.Module):
    """Squared error of maps under each of the masks that the tokens read from the teacher's map.

    Args:
        s_channels: channels of the student's map, brought to the teacher's by a 1x1 convolution; None:
            without one, equal channels.
        t_channels: channels of the teacher's map.
        tokens: number of masks; 6.
        weighted: weigh the masks by what `prob` sees in the teacher's map.
        half: the form for segmentation; not weighted.

    Shape:
        fm_s: (N, s_channels, H, W), fm_t: (N, t_channels, H, W). customise: multiply the student's masks in.
        Returns a scalar; gradients reach fm_s and align only. learn(fm_t) returns a map like fm_t and a
        scalar; gradients reach token and prob only. masks(fm): (N, tokens, H, W).
        Computed in float32, also under TF32, or in float64 as the student.

    Raises:
        ValueError: tokens < 1; half with weighted or customise; a map has other channels or another size.
    """

    def __init__(
        self,
        s_channels: int | None,
        t_channels: int,
        tokens: int = 6,
        weighted: bool = True,
        half: bool = False,
    ) -> None:
        super().__init__()
        if tokens < 1:
            raise ValueError(f'MasKD: tokens must be >= 1, got {tokens}')
        if half and weighted:
            raise ValueError(f'MasKD: half is not weighted, got {half} and {weighted}: weighted=False')
        self.s_channels, self.t_channels = t_channels if s_channels is None else s_channels, t_channels
        self.weighted, self.half = weighted, half
        self.align = None if s_channels is None else nn.Conv2d(s_channels, t_channels, kernel_size=1)
        self.token = nn.Parameter(torch.randn(tokens, t_channels) * 0.01)
        self.prob = None
        if weighted:
            wide = nn.Conv2d(t_channels, t_channels, kernel_size=3, padding=1)
            self.prob = nn.Sequential(wide, nn.AdaptiveAvgPool2d(1), nn.Conv2d(t_channels, tokens, 1))
            for conv in self.prob[::2]:
                out = conv.out_channels * conv.kernel_size[0] ** 2
                nn.init.normal_(conv.weight, std=(2 / out) ** 0.5)
                nn.init.zeros_(conv.bias)

    def forward(self, fm_s: Tensor, fm_t: Tensor, customise: bool = False) -> Tensor:
        _expect('MasKD', 'fm_s', fm_s, 'N', self.s_channels, 'H', 'W')
        _expect('MasKD', 'fm_t', fm_t, len(fm_s), self.t_channels, *fm_s.shape[2:])
        if customise and self.half:
            raise ValueError('MasKD: half is not customised, got customise=True: leave it out')
        with _no_autocast(fm_s):
            x, y = _full(fm_s), _full(fm_t.detach(), fm_s)
            x = x if self.align is None else _run(self.align, x)
            m = self.masks(y).detach()
            if customise:
                m = m * self.masks(x.detach()).detach()
            # the channels first: the error of each position, once for all masks
            error = (m.square() * (x - y).square().mean(dim=1, keepdim=True)).sum(dim=(2, 3))
            total = m.sum(dim=(2, 3))
            if self.half:
                return 0.5 * (error / (total + 1e-5)).mean()
            d = error / total.clamp(min=1e-5)
            return (self._weights(y).detach() * d).sum(dim=1).mean()

    def masks(self, fm: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, tokens, H, W)."""
        _expect('MasKD', 'fm', fm, 'N', self.t_channels, 'H', 'W')
        return _masks(self.token, fm)

    def learn(self, fm_t: Tensor) -> tuple[Tensor, Tensor]:
        """The teacher's map as its masks let it through, and how much they overlap, for the first phase."""
        _expect('MasKD', 'fm_t', fm_t, 'N', self.t_channels, 'H', 'W')
        with _no_autocast(fm_t):
            y = _full(fm_t.detach())
            m = self.masks(y)
            share = self._weights(y)[:, :, None, None] if self.weighted else 1.0
            return y * (share * m).sum(dim=1, keepdim=True), _dice(m)

    def _weights(self, y: Tensor) -> Tensor:
        """(N, tokens), of sum 1."""
        if self.prob is None:
            return y.new_full((len(y), len(self.token)), 1 / len(self.token))
        return _run(self.prob, y).flatten(1).softmax(dim=1)


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


def learn(kd, t, batch):
    """First phase of detectors, also freekd's: the masked maps go through the teacher's heads."""
    maps, overlaps = zip(*(k.learn(fm) for k, fm in zip(kd, t.fms)))
    return t.replaced(list(maps)).loss() + sum(overlaps)


def learn_seg(kd, t, batch):
    out, overlap = kd.learn(t.out)
    return t.replaced(out).loss(batch.target) + overlap


def build_seg(loss, probe, **options):
    return loss(None, probe.num_classes, **{'tokens': 8, 'weighted': False, 'half': True, **options})
