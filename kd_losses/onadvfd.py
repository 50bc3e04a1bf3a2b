"""OnAdvFD: peers distil their logits, and an adversary per peer makes their last maps alike in distribution.

I. Chung, S. Park, J. Kim, N. Kwak, "Feature-map-level Online Adversarial Knowledge Distillation", ICML 2020,
arXiv:2002.01775 (the paper calls it AFD).

    logits of net 1:   loss = CE(out_1) + T^2 * mean over n of KL(softmax(out_2 / T) || softmax(out_1 / T))
    D_1, owned by net 1, calls the other's map real and net 1's fake (least squares, scores in (0, 1)):
        d_loss = mean of (1 - D_1(T_2(fm_2)))^2 + mean of D_1(T_1(fm_1))^2       trains D_1 and the T
        g_loss = mean of (1 - D_1(T_1(fm_1)))^2                                   trains net 1
    T_k: a layer to the common, largest number of channels, nothing for the network that has it
    more than two networks: each learns from the one before it, the first from the last

Tap: logits, labels and the last map before pooling of networks trained together. Two steps per batch: the
logits, then, from a fresh forward pass, the adversary (fm detached) and the networks against it, with
optimisers of their own (Adam, 2e-5). Contains its cross-entropy.

Differences: a reconstruction. No code of the authors was found, the equations are those of secondary sources;
the architecture of D and T, T = 3 and the rates are partly ours.

Source: formula only; no code of the authors was found.

Use:
    >>> import torch
    >>> from onadvfd import OnAdvFD
    >>> out_1, out_2 = torch.randn(8, 10, requires_grad=True), torch.randn(8, 10)
    >>> OnAdvFD()(out_1, out_2, torch.arange(8)).backward()
    >>> out_1.grad.norm() > 0
    tensor(True)
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class OnAdvFD(nn.Module):
    """Cross-entropy and soft targets from a peer; call again with 1 and 2 swapped for the other network.

    Args:
        T: temperature, > 0; 3.
        channels: list, channels of the networks' last maps, to own their `adversaries`; None: logits only.

    Shape:
        out_1, out_2: (N, K), equal; target: (N,) labels. Returns a scalar. No gradient reaches out_2.
        Rows of label -100 are left out. Computed in float32, or in float64 as the student.

    Raises:
        ValueError: T is not positive; shapes do not fit.
    """

    def __init__(self, T: float = 3.0, channels: list | None = None) -> None:
        super().__init__()
        if not T > 0:
            raise ValueError(f'OnAdvFD: T must be > 0, got {T}')
        self.T = T
        self.adversaries = None if channels is None else Adversaries(channels)

    def forward(self, out_1: Tensor, out_2: Tensor, target: Tensor) -> Tensor:
        _expect('OnAdvFD', 'out_1', out_1, 'N', 'K')
        _expect('OnAdvFD', 'out_2', out_2, *out_1.shape)
        target, valid = _labels('OnAdvFD', target, *out_1.shape)
        out_1, out_2 = _full(out_1), _full(out_2.detach(), out_1)
        log_p, log_q = F.log_softmax(out_1 / self.T, dim=1), F.log_softmax(out_2 / self.T, dim=1)
        kl = _per_sample(_kl(log_q, log_p, valid is None), valid)
        return _ce(out_1, target, valid) + kl * self.T**2


class Discriminator(nn.Module):
    """Map (N, channels, H, W) -> scores (N, 1, h, w) in (0, 1), h and w half of H and W."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(channels, channels, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.LeakyReLU(0.2),
            nn.Conv2d(channels, 1, 3, padding=1),
        )

    def forward(self, fm: Tensor) -> Tensor:
        with _no_autocast(fm):
            return _run(self.layers, _full(fm)).sigmoid()


class TransferLayer(nn.Sequential):
    """Map (N, in_channels, H, W) -> (N, out_channels, H, W): 3x3 convolution, batch norm, ReLU."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(
            nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(),
        )


class Adversaries(nn.Module):
    """One discriminator per network and the transfer layers.

    Args:
        channels: list, channels of the networks' last maps, in order.

    `d_loss(fms)` and `g_loss(fms)`: sums over the networks, for a list of maps, one per network.
    """

    def __init__(self, channels: list) -> None:
        super().__init__()
        wide = max(channels)
        self.transfer = nn.ModuleList(
            nn.Identity() if c == wide else TransferLayer(c, wide) for c in channels
        )
        self.discriminators = nn.ModuleList(Discriminator(wide) for _ in channels)

    def d_loss(self, fms: list[Tensor]) -> Tensor:
        """Trains this module; the maps are detached."""
        moved = [_move(layer, fm.detach()) for layer, fm in zip(self.transfer, fms)]
        pairs = zip(self.discriminators, moved, [moved[-1], *moved[:-1]])
        return sum(d_loss(D(real), D(fake)) for D, fake, real in pairs)

    def g_loss(self, fms: list[Tensor]) -> Tensor:
        """Trains the networks."""
        trios = zip(self.discriminators, self.transfer, fms)
        return sum(g_loss(D(_move(layer, fm))) for D, layer, fm in trios)


def _move(layer: nn.Module, fm: Tensor) -> Tensor:
    with _no_autocast(fm):
        return _run(layer, _full(fm))


def d_loss(score_real: Tensor, score_fake: Tensor) -> Tensor:
    """mean (1 - score_real)^2 + mean score_fake^2, of score maps (N, 1, h, w)."""
    return (1 - _full(score_real)).square().mean() + _full(score_fake).square().mean()


def g_loss(score: Tensor) -> Tensor:
    """mean (1 - score)^2, of a score map (N, 1, h, w)."""
    return (1 - _full(score)).square().mean()


def _kl(log_p_t: Tensor, log_p_s: Tensor, on_host: bool = False) -> Tensor:
    """p_t (log p_t - log p_s), and 0 where p_t is 0 whatever the logarithms are.

    on_host: p_t may be looked at, as labels on the CPU were: the mask, a third of the time, only if needed.
    """
    p_t = log_p_t.exp()
    kl = p_t * (log_p_t - log_p_s)
    if on_host and p_t.amin().view(1).tolist()[0] > 0:  # not with NaN
        return kl
    return torch.where(p_t == 0, 0.0, kl)


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


def _ce(out: Tensor, target: Tensor, valid: Tensor | None) -> Tensor:
    """Cross-entropy, the mean over the rows that count."""
    if valid is None:
        return F.cross_entropy(out, target)
    return _mean(F.cross_entropy(out, target, reduction='none'), valid)


def _per_sample(x: Tensor, valid: Tensor | None, axis: int = 0) -> Tensor:
    """The sum over all axes but that of the samples, and the mean over the samples that count."""
    if valid is None:
        return x.sum() / x.shape[axis]
    return _mean(x.movedim(axis, 0).flatten(1).sum(dim=1), valid)


def _mean(rows: Tensor, valid: Tensor | None) -> Tensor:
    """Over the rows (N, ...) that count; 0 if none does."""
    if valid is None:
        return rows.mean(dim=0)
    counts = valid.reshape(-1, *[1] * (rows.dim() - 1))
    return torch.where(counts, rows, 0.0).sum(dim=0) / valid.sum().clamp(min=1)


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
    """Each network learns from the one before it."""
    return sum(kd(x.out, y.out, batch.target) for x, y in zip(s, [s[-1], *s[:-1]]))


def build(loss, probe, **options):
    return loss(**options, channels=[f.fms[-1].shape[1] for f in probe.s])


def optimisers(kd, peers):
    return {
        'adversary': torch.optim.Adam(kd.adversaries.parameters(), lr=2e-5, weight_decay=0.1),
        'networks': torch.optim.Adam(peers.parameters(), lr=2e-5, weight_decay=0.1),
    }


def second_update(kd, peers, batch, opts, guard):
    """From a fresh forward pass, a step of the adversaries, then one of the networks."""
    fms = [f.fms[-1] for f in batch.peers(batch.img)]
    loss = kd.adversaries.d_loss(fms)
    if not guard(loss, opts['adversary']):
        return
    opts['adversary'].zero_grad(set_to_none=True)
    loss.backward()
    opts['adversary'].step()
    kd.adversaries.requires_grad_(False)
    loss = kd.adversaries.g_loss(fms)
    if guard(loss, opts['networks']):
        opts['networks'].zero_grad(set_to_none=True)
        loss.backward()
        opts['networks'].step()
    kd.adversaries.requires_grad_(True)
