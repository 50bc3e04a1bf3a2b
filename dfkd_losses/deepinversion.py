"""DeepInversion: optimise pixels until the teacher knows the class and its batch norms see familiar numbers.

H. Yin, P. Molchanov, J. M. Alvarez, Z. Li, A. Mallya, D. Hoiem, N. K. Jha, J. Kautz, "Dreaming to Distill:
Data-free Knowledge Transfer via DeepInversion", CVPR 2020, arXiv:1912.08795.

    r_l = ||running_var_l - var(a_l)||_2 + ||running_mean_l - mean(a_l)||_2, a_l what enters batch norm l
    bn_loss = first_bn_multiplier * r_1 + r_2 + ... + r_L
    d_i = differences to the right, lower, lower left, lower right pixel
    TV1 = sum over i of mean |d_i|,   TV2 = sum over i of ||d_i||_2 of the batch
    L2 = mean over n of ||x_n||_2
    js = mean over n of sum over k of [M log(M / P) / 2 + M log(M / Q) / 2]
    P, Q = softmax(out / T) of student and teacher, M = (P + Q) / 2, each clamped to 0.01 ... 0.99
    loss = ce * CE(out_t, target) + bn * bn_loss + tv_l1 * TV1 + tv_l2 * TV2 + l2 * L2
           + compete * (1 - clamp(js, 0, 1))

Tap: x, the normalised images that are optimised, as the networks see them (after jitter and flip); the logits
on them; BNStatistics hooks what enters each batch norm of the teacher.

Differences: NOTHING is detached, gradients reach x through both networks. js is the authors': with its
arguments exchanged and clamped it is no Jensen-Shannon divergence, and entries under 0.01, most of them with
100 classes, have no gradient; exact=True is the real one. The authors' CIFAR code has ||x||_2 of the whole
batch for L2. As in their code, the variance of the batch is the biased one.

Source: NVlabs/DeepInversion, deepinversion.py and cifar10/deepinversion_cifar10.py.

Use:
    >>> import torch
    >>> from deepinversion import DeepInversion
    >>> x, out_t = torch.randn(8, 3, 8, 8, requires_grad=True), torch.randn(8, 10)
    >>> DeepInversion()(x, out_t, torch.arange(8), bn_loss=x.mean().square()).backward()
    >>> x.grad.norm() > 0
    tensor(True)
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DeepInversion(nn.Module):
    """The loss of a batch of images.

    Args:
        ce, tv_l1, tv_l2, l2, bn, compete: weights; 1, 0, 2.5e-5, 0, 10, 0 (authors' CIFAR-10; ImageNet bn
            0.05, tv_l2 1e-4, l2 1e-5, compete 0.2).
        first_bn_multiplier: for BNStatistics, 1 (ImageNet 10).
        T: temperature of the competition, > 0; 3.
        exact: the real Jensen-Shannon divergence, False.

    Shape:
        x: (N, C, H, W); out_t, out_s: (N, K); target: (N,) labels; bn_loss: scalar. out_s may be left out
        where compete is 0. Returns a scalar; `terms` returns all without weights. Rows of label -100 count in
        cross-entropy and competition no more. Computed in float32, or in float64 as x.

    Raises:
        ValueError: T is not positive; shapes that do not meet; labels out of range; compete without out_s.
    """

    def __init__(
        self,
        ce: float = 1.0,
        tv_l1: float = 0.0,
        tv_l2: float = 2.5e-5,
        l2: float = 0.0,
        bn: float = 10.0,
        compete: float = 0.0,
        first_bn_multiplier: float = 1.0,
        T: float = 3.0,
        exact: bool = False,
    ) -> None:
        super().__init__()
        if not T > 0:
            raise ValueError(f'DeepInversion: T must be > 0, got {T}')
        self.weights = {'ce': ce, 'tv_l1': tv_l1, 'tv_l2': tv_l2, 'l2': l2, 'bn': bn, 'compete': compete}
        self.first_bn_multiplier, self.T, self.exact = first_bn_multiplier, T, exact

    def forward(
        self, x: Tensor, out_t: Tensor, target: Tensor, bn_loss: Tensor, out_s: Tensor | None = None
    ) -> Tensor:
        if self.weights['compete'] and out_s is None:
            raise ValueError('DeepInversion: out_s must be (N, K), got None: compete needs the student')
        terms = self.terms(x, out_t, target, bn_loss, out_s)
        return sum(self.weights[name] * term for name, term in terms.items())

    def terms(
        self, x: Tensor, out_t: Tensor, target: Tensor, bn_loss: Tensor, out_s: Tensor | None = None
    ) -> dict[str, Tensor]:
        _expect('DeepInversion', 'x', x, 'N', 'C', 'H', 'W')
        _expect('DeepInversion', 'out_t', out_t, len(x), 'K')
        _expect('DeepInversion', 'bn_loss', bn_loss)
        target, valid = _labels('DeepInversion', target, *out_t.shape)
        out_t, nothing = _full(out_t, x), _full(x[:0]).sum()
        # without weight it may be of images that have no neighbours
        alone = min(x.shape[2:]) < 2 and not (self.weights['tv_l1'] or self.weights['tv_l2'])
        terms = {
            'ce': _mean(F.cross_entropy(out_t, target, reduction='none'), valid),
            'tv_l1': nothing if alone else tv_l1(x),
            'tv_l2': nothing if alone else tv_l2(x),
            'l2': l2_norm(x),
            'bn': _full(bn_loss, x),
        }
        if out_s is not None:
            _expect('DeepInversion', 'out_s', out_s, *out_t.shape)
            js = _mean(_disagreement(_full(out_s, x), out_t, self.T, self.exact), valid)
            terms['compete'] = 1 - js.clamp(0, 1)
        return terms


class BNStatistics:
    """After each forward pass of the teacher, loss() is the distance of its batch norms' inputs.

    Args:
        teacher: a network with nn.BatchNorm2d.
        first_bn_multiplier: of the first one's distance, 1.

    Raises:
        ValueError: the network has no nn.BatchNorm2d with running statistics.
    """

    def __init__(self, teacher: nn.Module, first_bn_multiplier: float = 1.0) -> None:
        self.norms, self.seen = _batch_norms('BNStatistics', teacher), {}
        self.first_bn_multiplier = first_bn_multiplier
        self.hooks = [m.register_forward_pre_hook(self._see) for m in self.norms]

    def _see(self, norm: nn.Module, inputs: tuple) -> None:
        self.seen[norm] = inputs[0], torch.is_grad_enabled()

    def __getstate__(self) -> dict:
        return {**vars(self), 'seen': {}}  # neither copied nor pickled: a graph cannot be

    def loss(self) -> Tensor:
        inputs, self.seen = _seen('BNStatistics', self.norms, self.seen), {}
        means, variances = [m.running_mean for m in self.norms], [m.running_var for m in self.norms]
        return bn_statistics_loss(inputs, means, variances, self.first_bn_multiplier)

    def remove(self) -> None:
        for hook in self.hooks:
            hook.remove()


def bn_statistics_loss(
    bn_inputs: list[Tensor],
    means: list[Tensor],
    variances: list[Tensor],
    first_bn_multiplier: float = 1.0,
) -> Tensor:
    """bn_inputs: what enters each batch norm, (N, C, H, W); means, variances: its running ones, (C,)."""
    total = 0
    for k, (x, mean, var) in enumerate(zip(bn_inputs, means, variances, strict=True)):
        _expect('bn_statistics_loss', f'bn_inputs[{k}]', x, 'N', 'C', 'H', 'W')
        _expect('bn_statistics_loss', f'means[{k}]', mean, x.shape[1])
        _expect('bn_statistics_loss', f'variances[{k}]', var, x.shape[1])
        x = _full(x)
        distance = _bn_distance(x, _full(mean, x), _full(var, x))
        total = total + (distance if k else first_bn_multiplier * distance)
    return total


def tv_l1(x: Tensor) -> Tensor:
    """Sum over four directions of the mean absolute difference of neighbours."""
    return sum(d.abs().mean() for d in _differences(x))


def tv_l2(x: Tensor) -> Tensor:
    """Sum over four directions of the length of all differences of neighbours in the batch."""
    return sum(torch.linalg.vector_norm(d) for d in _differences(x))


def l2_norm(x: Tensor) -> Tensor:
    """Mean length of an image."""
    return torch.linalg.vector_norm(_full(x).flatten(1), dim=1).mean()


def js_divergence(out_s: Tensor, out_t: Tensor, T: float = 3.0, exact: bool = False) -> Tensor:
    """The authors' divergence of predictions, or the real Jensen-Shannon divergence; (N, K) each."""
    _expect('js_divergence', 'out_s', out_s, 'N', 'K')
    _expect('js_divergence', 'out_t', out_t, *out_s.shape)
    return _disagreement(_full(out_s), _full(out_t, out_s), T, exact).mean()


def _differences(x: Tensor) -> tuple[Tensor, ...]:
    _expect('tv', 'x', x, 'N', 'C', 'H', 'W')
    if min(x.shape[2:]) < 2:
        raise ValueError(f'tv: x must have neighbours, got {tuple(x.shape)}: leave total variation out')
    x = _full(x)
    return (
        x[..., :, :-1] - x[..., :, 1:],
        x[..., :-1, :] - x[..., 1:, :],
        x[..., 1:, :-1] - x[..., :-1, 1:],
        x[..., :-1, :-1] - x[..., 1:, 1:],
    )


def _disagreement(out_s: Tensor, out_t: Tensor, T: float, exact: bool) -> Tensor:
    """(N,)"""
    if exact:
        log_p, log_q = F.log_softmax(out_s / T, dim=1), F.log_softmax(out_t / T, dim=1)
        none = (log_p == -torch.inf) & (log_q == -torch.inf)
        log_m = torch.logaddexp(*(x.masked_fill(none, 0.0) for x in (log_p, log_q))) - math.log(2)
        # a class of probability 0 adds nothing, and 0 * -inf has no gradient
        terms = (x.exp() * (x.masked_fill(x == -torch.inf, 0.0) - log_m) for x in (log_p, log_q))
        return sum(terms).sum(dim=1) / 2
    p, q = F.softmax(out_s / T, dim=1), F.softmax(out_t / T, dim=1)
    p, q, m = (y.clamp(0.01, 0.99) for y in (p, q, (p + q) / 2))
    return (m * (2 * m.log() - p.log() - q.log())).sum(dim=1) / 2


def _seen(who: str, norms: list[nn.BatchNorm2d], inputs: dict) -> list[Tensor]:
    """What entered the batch norms in the last forward pass, in full precision."""
    if len(inputs) < len(norms) or any(m not in inputs for m in norms):
        raise ValueError(
            f'{who}: loss() needs a forward pass of the teacher, got {sum(m in inputs for m in norms)} of '
            f'{len(norms)} batch norms: call the teacher first, and not in nn.DataParallel, whose copies are '
            'other modules'
        )
    if torch.is_grad_enabled() and not all(with_grad for _, with_grad in inputs.values()):
        raise ValueError(
            f'{who}: loss() must have a gradient, got a forward pass without one: activation checkpointing '
            'around the teacher needs use_reentrant=False; where no gradient is meant, call loss() in '
            'torch.no_grad(), too'
        )
    return [_full(inputs[m][0]) for m in norms]


def _batch_norms(who: str, net: nn.Module) -> list[nn.BatchNorm2d]:
    """Those with running statistics, in the order of named_modules."""
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    tracked = [m for m in norms if m.running_mean is not None]
    if not norms or len(tracked) < len(norms):
        raise ValueError(
            f'{who}: needs a teacher whose nn.BatchNorm2d have running statistics, got {len(norms)} of them, '
            f'{len(tracked)} with statistics: take a method that needs none, such as DAFL or DFAD'
        )
    return norms


def _bn_distance(x: Tensor, running_mean: Tensor, running_var: Tensor) -> Tensor:
    mean = x.mean(dim=(0, 2, 3))
    var = x.var(dim=(0, 2, 3), unbiased=False)
    return torch.linalg.vector_norm(running_var - var) + torch.linalg.vector_norm(running_mean - mean)


def _mean(rows: Tensor, valid: Tensor | None) -> Tensor:
    """Over the rows (N, ...) that count; 0 if none does."""
    if valid is None:
        return rows.mean(dim=0)
    counts = valid.reshape(-1, *[1] * (rows.dim() - 1))
    return torch.where(counts, rows, 0.0).sum(dim=0) / valid.sum().clamp(min=1)


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


def _labels(who: str, target: Tensor, n: int, K: int, name: str = 'target') -> tuple[Tensor, Tensor | None]:
    """n labels of 0..K-1 as int64, and which rows count, None for all: not those of -100, which are 0 then.

    Other labels are refused, but on a GPU, where looking at them would wait, only by the kernels.
    """
    _expect(who, name, target, n)
    if target.is_floating_point():
        raise ValueError(f'{who}: {name} must be ({n},) of integers, got {target.dtype}: {name}.long()')
    target, compiling = target.long(), getattr(torch.compiler, 'is_compiling', bool)()
    if not compiling and target.is_inference():  # what a teacher says under inference_mode: for backward
        target = target.clone()
    if target.device.type == 'cpu' and not compiling:
        (lowest,), (highest,) = (y.tolist() for y in target.aminmax(dim=0, keepdim=True))
        if lowest >= 0 and highest < K:
            return target, None
        for y in target.tolist():
            if y != -100 and not 0 <= y < K:
                raise ValueError(f'{who}: {name} must be in 0..{K - 1}, or -100 to leave a row out, got {y}')
    valid = target != -100
    return torch.where(valid, target, 0), valid


def _full(x: Tensor, like: Tensor | None = None) -> Tensor:
    """In float32, or float64 if the student (like) is. Inference tensors are copied, to serve backward."""
    x = x.double() if (x if like is None else like).dtype == torch.float64 else x.float()
    compiling = getattr(torch.compiler, 'is_compiling', bool)()  # torch 2.2 cannot tell: False
    return x.clone() if not compiling and x.is_inference() else x


# ------------------------------------------ how the training scripts use it; a copied file may drop this


def build(loss, probe, weights, options):
    kd = loss(**weights, T=options['js_T'], **{k: v for k, v in options.items() if k != 'js_T'})
    kd.statistics = BNStatistics(probe.net_t, kd.first_bn_multiplier)
    return kd


def feed(kd, made):
    out_s = made.s.out if made.weights['compete'] else None
    return kd.terms(made.x, made.t.out, made.target, kd.statistics.loss(), out_s)


def view(pixels, rng):
    """The batch rolled by up to an eighth of its size, mirrored or not."""
    reach = pixels.shape[2] // 8
    dy, dx = torch.randint(-reach, reach + 1, (2,), generator=rng).tolist()
    x = pixels.roll((dy, dx), (2, 3))
    return x.flip(3) if torch.randint(2, (), generator=rng).item() else x
