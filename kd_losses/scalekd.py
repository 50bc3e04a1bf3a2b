"""ScaleKD: queries of the teacher's grid read the student's map by attention; two views of it are compared.

J. Fan, C. Li, X. Liu, A. Yao, "ScaleKD: Strong Vision Transformers Could Be Excellent Teachers", NeurIPS
2024, arXiv:2411.06786.

    x = relu(BN(3x3 convolution of fm_s)) + pos_embed
    r = relu(1x1 convolution of the query), a query per position of the teacher's map, learned or handed in
    A = softmax over j of scale / sqrt(d) * q(r)_i . k(x)_j per head of width d
    z = LayerNorm(out(A v(x))),  tokens = z + ffn2(relu(ffn1(z)))
    n(.) = length 1 over the channels of each position,  c(.) = less the channel's mean over the positions
    spatial = alpha_0 / N * sum of (n(tokens) - n(fm_t))^2
    frequency = alpha_1 / N * sum of (n(c(tokens')) - n(c(fm_t)))^2
    loss = spatial + frequency,  tokens' of a second such projector, nothing shared

Tap: the maps of the stages (of a transformer its patch tokens as a map), one module per stage, trained with
the student. The authors take the last two stages and send the projected third through the teacher's frozen
last stage (`project`, `spatial`, `frequency` allow that: what comes out is compared with the teacher's last
map and is the query of the last stage); our trainer compares each of the last two with the teacher's own.

Differences: the authors remove the zero frequency of a cosine transform, which is the mean over positions:
the same here without the transform, also for maps that are not square. Their windows other than 1 x 1, which
no configuration uses, compare tokens in another order than the teacher's; left out. Their Swin-B
configuration gives one scale where two are read. A zero vector stays zero and gets no gradient.

Source: deep-optimization/ScaleKD, mmcls/models/dis_losses/fmd.py (FreqMaskingDistillLoss).

Use:
    >>> import torch
    >>> from scalekd import ScaleKD
    >>> fm_s, fm_t = torch.randn(4, 16, 8, 8, requires_grad=True), torch.randn(4, 32, 4, 4)
    >>> ScaleKD(16, 32, (4, 4), (8, 8))(fm_s, fm_t).backward()
    >>> fm_s.grad.norm() > 0
    tensor(True)
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ScaleKD(nn.Module):
    """Attention projectors, and distances of directions with and without the mean over the positions.

    Args:
        s_channels, t_channels: channels of the two maps.
        query_hw: (height, width) of the teacher's map.
        pos_hw: (height, width) of the student's map; None: as the teacher's.
        num_heads: of the attention, a divisor of t_channels; 8.
        alpha: weights of the spatial and the frequency term, (0.08, 0.06).
        scale: of their attentions, times 1 / sqrt(width of a head); (5, 5).
        self_query: whether queries are learned; if not they must be handed in.

    Shape:
        fm_s: (N, s_channels, *pos_hw), fm_t: (N, t_channels, *query_hw); query_spatial, query_frequency: None
        or (N, Hq * Wq, t_channels), which is taken instead of the learned one. Returns a scalar.
        No gradient reaches fm_t. `project` returns both tokens (N, Hq * Wq, t_channels); `spatial` and
        `frequency` the weighted terms of such tokens. In training N * H * W >= 2 for the batch norm.
        Computed in float32, or in float64 as the student.

    Raises:
        ValueError: num_heads does not divide t_channels; alpha or scale is no pair; a map or query has
            another shape; there is no query.
    """

    def __init__(
        self,
        s_channels: int,
        t_channels: int,
        query_hw: tuple[int, int],
        pos_hw: tuple[int, int] | None = None,
        num_heads: int = 8,
        alpha: tuple[float, float] = (0.08, 0.06),
        scale: tuple[float, float] = (5.0, 5.0),
        self_query: bool = True,
    ) -> None:
        super().__init__()
        for name, pair in (('alpha', alpha), ('scale', scale)):
            if not isinstance(pair, (tuple, list)) or len(pair) != 2:
                raise ValueError(
                    f'ScaleKD: {name} must be two numbers, (spatial, frequency), got {pair}: 5,5 for example'
                )
        if t_channels % num_heads:
            raise ValueError(
                f'ScaleKD: num_heads must divide t_channels = {t_channels}, got {num_heads}: give another one'
            )
        self.s_channels, self.t_channels, self.alpha = s_channels, t_channels, tuple(alpha)
        self.query_hw, self.pos_hw = tuple(query_hw), tuple(query_hw if pos_hw is None else pos_hw)
        length = self.query_hw[0] * self.query_hw[1] if self_query else 0
        self.spatial_projector, self.frequency_projector = (
            _Projector(s_channels, t_channels, self.pos_hw, num_heads, factor, length) for factor in scale
        )

    def forward(
        self,
        fm_s: Tensor,
        fm_t: Tensor,
        query_spatial: Tensor | None = None,
        query_frequency: Tensor | None = None,
    ) -> Tensor:
        spatial, frequency = self.project(fm_s, query_spatial, query_frequency)
        return self.spatial(spatial, fm_t) + self.frequency(frequency, fm_t)

    def project(
        self, fm_s: Tensor, query_spatial: Tensor | None = None, query_frequency: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        _expect('ScaleKD', 'fm_s', fm_s, 'N', self.s_channels, *self.pos_hw)
        fm_s, found = _full(fm_s), []
        for name, query, projector in (
            ('query_spatial', query_spatial, self.spatial_projector),
            ('query_frequency', query_frequency, self.frequency_projector),
        ):
            if query is not None:
                length = self.query_hw[0] * self.query_hw[1]
                _expect('ScaleKD', name, query, len(fm_s), length, self.t_channels)
                query = _full(query, fm_s)
            elif not hasattr(projector, 'query'):
                raise ValueError(
                    f'ScaleKD: {name} must be given, got None: hand it in, or build with self_query=True'
                )
            with _no_autocast(fm_s):
                found.append(_run(projector, fm_s, query))
        return tuple(found)

    def spatial(self, tokens: Tensor, fm_t: Tensor) -> Tensor:
        s, t = self._sides(tokens, fm_t)
        return self.alpha[0] / len(s) * (_unit(s) - _unit(t)).square().sum()

    def frequency(self, tokens: Tensor, fm_t: Tensor) -> Tensor:
        s, t = (_without_mean(x) for x in self._sides(tokens, fm_t))
        return self.alpha[1] / len(s) * (_unit(s) - _unit(t)).square().sum()

    def _sides(self, tokens: Tensor, fm_t: Tensor) -> tuple[Tensor, Tensor]:
        """Both (N, Hq * Wq, t_channels)."""
        _expect('ScaleKD', 'tokens', tokens, 'N', self.query_hw[0] * self.query_hw[1], self.t_channels)
        _expect('ScaleKD', 'fm_t', fm_t, len(tokens), self.t_channels, *self.query_hw)
        return _full(tokens), _full(fm_t.detach(), tokens).flatten(2).mT


def _without_mean(x: Tensor) -> Tensor:
    """(N, L, D) minus its mean over the positions; what differs from it by a rounding only becomes 0."""
    centred = x - x.mean(dim=1, keepdim=True)
    norm, size = (torch.linalg.vector_norm(y.detach(), dim=2, keepdim=True) for y in (centred, x))
    return torch.where(norm <= 8 * torch.finfo(x.dtype).eps * size, 0.0, centred)


class _Projector(nn.Module):
    """(N, s_channels, H, W) -> (N, length, t_channels) by cross attention; length 0: no learned queries."""

    def __init__(self, s_channels, t_channels, pos_hw, num_heads, scale, length) -> None:
        super().__init__()
        self.num_heads, self.scale = num_heads, scale / (t_channels // num_heads) ** 0.5
        self.pos_embed = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, s_channels, *pos_hw), std=0.02))
        self.student = nn.Sequential(
            nn.Conv2d(s_channels, s_channels, 3, padding=1), nn.BatchNorm2d(s_channels), nn.ReLU()
        )
        self.query_proj = nn.Conv2d(t_channels, t_channels, 1)
        self.q, self.out = nn.Linear(t_channels, t_channels), nn.Linear(t_channels, t_channels)
        self.k, self.v = nn.Linear(s_channels, t_channels), nn.Linear(s_channels, t_channels)
        self.norm = nn.LayerNorm(t_channels)
        self.ffn1, self.ffn2 = nn.Linear(t_channels, 4 * t_channels), nn.Linear(4 * t_channels, t_channels)
        if length:
            self.query = nn.Embedding(length, t_channels)

    def forward(self, fm_s: Tensor, query: Tensor | None) -> Tensor:
        x = (self.student(fm_s) + self.pos_embed).flatten(2).mT
        if query is None:  # the same for all samples: worked out once
            query = self.query.weight[None]
        r = F.relu(self.query_proj(query.mT[..., None])).squeeze(3).mT
        q, k, v = (y.unflatten(2, (self.num_heads, -1)).transpose(1, 2)
                   for y in (self.q(r).expand(len(x), -1, -1), self.k(x), self.v(x)))  # fmt: skip
        o = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        z = self.norm(self.out(o.transpose(1, 2).flatten(2)))
        return z + self.ffn2(F.relu(self.ffn1(z)))


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


def build(loss, probe, **options):
    """One module for each of the last two stages."""
    modules = []
    for fm_s, fm_t in zip(probe.s.fms[1:][-2:], probe.t.fms[1:][-2:]):
        heads = max(h for h in range(1, 9) if fm_t.shape[1] % h == 0)
        sizes = {'query_hw': fm_t.shape[2:], 'pos_hw': fm_s.shape[2:], 'num_heads': heads}
        modules.append(loss(fm_s.shape[1], fm_t.shape[1], **sizes | options))
    return nn.ModuleList(modules)


def feed(kd, s, t, batch):
    stages = zip(kd, s.fms[-len(kd) :], t.fms[-len(kd) :])
    return sum(k(x, y) for k, x, y in stages) / len(kd)
