"""DIST+: correlations, within samples and within classes, over channels and over positions.

T. Huang, S. You, F. Wang, C. Qian, C. Xu, "DIST+: Knowledge Distillation From a Stronger Adaptive Teacher",
TPAMI 47(7), 2025.

    pearson(a, b) = a'.b' / (||a'|| * ||b'|| + 1e-8),  a' = a - mean(a)
    p = softmax(out / tau) over the classes
    dist = tau^2 * [beta * (1 - mean over n of pearson(p_s[n, :], p_t[n, :]))
                    + gamma * (1 - mean over k of pearson(p_s[:, k], p_t[:, k]))]
    channel = 1 - mean over n, h, w of pearson(fm_s[n, :, h, w], fm_t[n, :, h, w])
    S = sum of the map over its channels, (N, H * W)
    spatial, 'batch':  1 - mean over positions j of pearson(S_s[:, j], S_t[:, j])
    spatial, 'within': 1 - mean over n of pearson(S_s[n, :], S_t[n, :])
    loss = dist + iota * channel + kappa * spatial

Tap: the logits, and the maps of the last stage, which must be of one shape: put a 1x1 convolution that learns
with the student in between if the channels differ (our trainer does). 'batch' wants large batches.

Differences: no code of the authors could be found; this is torchdistill's, in which the channel term is the
mean correlation itself, so that training pulls the maps towards opposite ones: taken as a slip, here it is 1
minus the mean as in the other terms. Whether the paper's spatial term is 'batch', as torchdistill has it, or
'within' could not be checked either, nor its weights; torchdistill weighs the whole by 2. The paper also
tunes the teacher first; that is not here. Constant vectors (dead positions after a ReLU), and
pairs whose lengths multiply to 1e-12 or less, count as uncorrelated and get no gradient.

Source: yoshitomo-matsubara/torchdistill, torchdistill/losses/mid_level.py (DISTPlusLoss).

Use:
    >>> import torch
    >>> from distplus import DISTPlus
    >>> fm_s, out_s = torch.randn(8, 16, 4, 4, requires_grad=True), torch.randn(8, 10)
    >>> DISTPlus()(out_s, fm_s, torch.randn(8, 10), torch.randn(8, 16, 4, 4)).backward()
    >>> fm_s.grad.norm() > 0
    tensor(True)
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DISTPlus(nn.Module):
    """Pearson distances of softened probabilities, of channels and of positions.

    Args:
        beta, gamma: weights of the inter-class and intra-class term; 2 and 2.
        iota, kappa: weights of the channel and the spatial term; 1 and 1.
        tau: temperature, > 0; 1.
        spatial: 'batch', over the samples at a position; 'within', over the positions of a sample.

    Shape:
        out_s, out_t: (N, K), equal; fm_s, fm_t: (N, C, H, W), equal. Returns a scalar. No gradient reaches
        out_t and fm_t. `terms` returns (dist, channel, spatial), without iota and kappa.
        Computed in float32, or in float64 as the student.

    Raises:
        ValueError: tau is not positive; spatial is another word; shapes differ; K < 2.
    """

    def __init__(
        self,
        beta: float = 2.0,
        gamma: float = 2.0,
        iota: float = 1.0,
        kappa: float = 1.0,
        tau: float = 1.0,
        spatial: str = 'batch',
    ) -> None:
        super().__init__()
        if not tau > 0:
            raise ValueError(f'DISTPlus: tau must be > 0, got {tau}')
        if spatial not in ('batch', 'within'):
            raise ValueError(f"DISTPlus: spatial must be 'batch' or 'within', got {spatial!r}")
        self.beta, self.gamma, self.iota, self.kappa = beta, gamma, iota, kappa
        self.tau, self.spatial = tau, spatial

    def forward(self, out_s: Tensor, fm_s: Tensor, out_t: Tensor, fm_t: Tensor) -> Tensor:
        dist, channel, spatial = self.terms(out_s, fm_s, out_t, fm_t)
        return dist + self.iota * channel + self.kappa * spatial

    def terms(
        self, out_s: Tensor, fm_s: Tensor, out_t: Tensor, fm_t: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        _expect('DISTPlus', 'out_s', out_s, 'N', 'K')
        _expect('DISTPlus', 'out_t', out_t, *out_s.shape)
        _expect('DISTPlus', 'fm_s', fm_s, len(out_s), 'C', 'H', 'W')
        _expect('DISTPlus', 'fm_t', fm_t, len(out_s), 'C', 'H', 'W')
        if fm_s.shape[1] != fm_t.shape[1]:
            raise ValueError(
                f'DISTPlus: fm_t must have the channels of fm_s {tuple(fm_s.shape)}, got '
                f'{tuple(fm_t.shape)}: adapt the student by nn.Conv2d({fm_s.shape[1]}, {fm_t.shape[1]}, 1), '
                f'which learns with it'
            )
        _expect('DISTPlus', 'fm_t', fm_t, *fm_s.shape)
        p_s = F.softmax(_full(out_s) / self.tau, dim=1)
        p_t = F.softmax(_full(out_t.detach(), out_s) / self.tau, dim=1)
        fm_s, fm_t = _full(fm_s, out_s), _full(fm_t.detach(), out_s)
        inter, intra = (1 - _pearson(p_s, p_t, dim).mean() for dim in (1, 0))
        channel = 1 - _pearson(fm_s, fm_t, 1).mean()
        S_s, S_t = (fm.sum(dim=1).flatten(1) for fm in (fm_s, fm_t))
        spatial = 1 - _pearson(S_s, S_t, 0 if self.spatial == 'batch' else 1).mean()
        return (self.beta * inter + self.gamma * intra) * self.tau**2, channel, spatial


def _pearson(a: Tensor, b: Tensor, dim: int) -> Tensor:
    length = [torch.linalg.vector_norm(x, dim=dim) for x in (a, b)]
    a, b = a - a.mean(dim, keepdim=True), b - b.mean(dim, keepdim=True)
    norms = [torch.linalg.vector_norm(x, dim=dim) for x in (a, b)]
    # of equal numbers the mean is off by a rounding, and what is left is no direction
    dead = [norm <= 8 * torch.finfo(norm.dtype).eps * of for norm, of in zip(norms, length)]
    product = norms[0] * norms[1]
    seen = 0 * product.detach()  # NaN beside equal numbers must show
    unrelated = dead[0] | dead[1] | (product <= 1e-12)
    return torch.where(unrelated, seen, (a * b).sum(dim) / (product + 1e-8))


def _same_size(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Average-pool two maps to the smaller of their heights and of their widths."""
    size = (min(a.shape[2], b.shape[2]), min(a.shape[3], b.shape[3]))
    return tuple(x if x.shape[2:] == size else F.adaptive_avg_pool2d(x, size) for x in (a, b))


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
    """With a convolution on the student's side if the channels differ."""
    kd, s_channels, t_channels = loss(**options), probe.s.fms[-1].shape[1], probe.t.fms[-1].shape[1]
    kd.adapter = nn.Conv2d(s_channels, t_channels, 1) if s_channels != t_channels else nn.Identity()
    return kd


def feed(kd, s, t, batch):
    with _no_autocast(s.out):
        fm_s, fm_t = _same_size(_run(kd.adapter, _full(s.fms[-1], s.out)), _full(t.fms[-1], s.out))
    return kd(s.out, fm_s, t.out, fm_t)
