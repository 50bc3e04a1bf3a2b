"""FastDFKD: a generator that has learnt to learn inverts each batch in a handful of steps.

G. Fang, K. Mo, X. Wang, J. Song, S. Bei, H. Zhang, M. Song, "Up to 100x Faster Data-free Knowledge
Distillation", AAAI 2022, arXiv:2112.06253.

    mu, v = mean and biased variance of what enters a batch norm
    a = 0 before the first update(), momentum afterwards
    loss = sum over batch norms of [||running_var - (1 - a) v - a s||_2
           + ||running_mean - (1 - a) mu - a m||_2]
    update():  m <- a m + (1 - a) mu,  s <- a s + (1 - a) v           of the last forward pass
    masked_adversarial = - sum of KL(softmax(out_t) || softmax(out_s)) where both say the same class, / N

Tap: MomentumBNStatistics hooks what enters each batch norm of the teacher; loss() after each forward pass,
update() once per batch of images. The trainer adds bn * loss + oh * CE(out_t, target) + adv *
masked_adversarial. A batch: clone the generator, a few Adam steps on the clone and its noise, adding up the
clone's gradients, then one Adam step of the generator with the sum.

Differences: the authors' code, whose meta step sums the gradients of all inner steps; the paper's equations
update from the adapted network. The statistics of earlier batches are constants.

Source: zju-vipa/Fast-Datafree, datafree/synthesis/fast_meta.py and datafree/hooks.py.

Use:
    >>> import torch
    >>> from fastdfkd import MomentumBNStatistics
    >>> x, net = torch.randn(8, 3, 4, 4, requires_grad=True), torch.nn.BatchNorm2d(3).eval()
    >>> statistics = MomentumBNStatistics(net)
    >>> out = net(x)
    >>> statistics.loss().backward()
    >>> x.grad.norm() > 0
    tensor(True)
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MomentumBNStatistics(nn.Module):
    """Distance of a teacher's batch norms to their statistics, over this batch and the ones before.

    Args:
        teacher: a network with nn.BatchNorm2d; it is not part of this module.
        momentum: of earlier batches, 0 <= momentum < 1; 0.9; 0 looks at the batch alone.

    Shape:
        loss() returns a scalar, in float32, or in float64 as what enters the batch norms.

    Raises:
        ValueError: momentum out of range; a teacher without nn.BatchNorm2d with running statistics; loss()
            or update() before a forward pass.
    """

    def __init__(self, teacher: nn.Module, momentum: float = 0.9) -> None:
        super().__init__()
        if not 0 <= momentum < 1:
            raise ValueError(f'MomentumBNStatistics: momentum must be from 0 to below 1, got {momentum}')
        self.norms, self.inputs, self.last = _batch_norms('MomentumBNStatistics', teacher), {}, []
        self.momentum = momentum
        like = _full(self.norms[0].running_mean)  # 0.9 in float32 is another number than in float64
        self.register_buffer('a', like.new_zeros(()))
        for k, m in enumerate(self.norms):
            self.register_buffer(f'mean{k}', like.new_zeros(m.num_features))
            self.register_buffer(f'var{k}', like.new_zeros(m.num_features))
        self.hooks = [m.register_forward_pre_hook(self._see) for m in self.norms]

    def _see(self, norm: nn.Module, inputs: tuple) -> None:
        self.inputs[norm] = inputs[0], torch.is_grad_enabled()

    def __getstate__(self) -> dict:
        return {**vars(self), 'inputs': {}}  # neither copied nor pickled: a graph cannot be

    def loss(self) -> Tensor:
        inputs = _seen('MomentumBNStatistics', self.norms, self.inputs)
        total, self.last = 0, []
        for k, (m, x) in enumerate(zip(self.norms, inputs)):
            _expect('MomentumBNStatistics', f'what enters batch norm {k}', x, 'N', 'C', 'H', 'W')
            var, mean = torch.var_mean(x, dim=(0, 2, 3), correction=0)
            self.last.append((mean.detach(), var.detach()))
            a = _full(self.a, x)
            mean = (1 - a) * mean + a * _full(getattr(self, f'mean{k}'), x)
            var = (1 - a) * var + a * _full(getattr(self, f'var{k}'), x)
            total = total + torch.linalg.vector_norm(_full(m.running_var, x) - var)
            total = total + torch.linalg.vector_norm(_full(m.running_mean, x) - mean)
        self.inputs = {}
        return total

    @torch.no_grad()
    def update(self) -> None:
        """Remember the batch of the last loss()."""
        if not self.last:
            raise ValueError('MomentumBNStatistics: update() got no batch: call loss() first')
        for k, now in enumerate(self.last):
            for kind, value in zip(('mean', 'var'), now):
                kept = getattr(self, f'{kind}{k}')
                kept.copy_(self.a * kept + (1 - self.a) * value)
        self.a.fill_(self.momentum)

    def remove(self) -> None:
        for hook in self.hooks:
            hook.remove()


def masked_adversarial(out_s: Tensor, out_t: Tensor) -> Tensor:
    """- sum of KL(teacher || student) over the images on which both say the same class, / N."""
    _expect('masked_adversarial', 'out_s', out_s, 'N', 'K')
    _expect('masked_adversarial', 'out_t', out_t, *out_s.shape)
    out_s, out_t = _full(out_s), _full(out_t, out_s)
    log_q, log_p = F.log_softmax(out_s, dim=1), F.log_softmax(out_t, dim=1)
    p, log_p = log_p.exp(), log_p.masked_fill(log_p == -torch.inf, 0.0)  # 0 * -inf has no gradient
    log_q = log_q.masked_fill((p == 0) & (log_q == -torch.inf), 0.0)
    kl = torch.where(p == 0, 0.0, p * (log_p - log_q)).sum(dim=1)
    return -((out_s.argmax(dim=1) == out_t.argmax(dim=1)) * kl).mean()


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


def build(loss, probe, weights, options):
    return loss(probe.net_t, options['bn_mmt'])


def feed(kd, made):
    terms = {'bn': kd.loss(), 'oh': F.cross_entropy(made.t.out, made.target)}
    if made.weights['adv'] and made.calls >= made.warmup:
        terms['adv'] = masked_adversarial(made.s.out, made.t.out)
    return terms


def begin(kd, source, rng):
    """A clone makes this batch. Once, the generator's first layers start anew.

    When, and when the adversarial term begins, is counted in calls. With the preset a call is an epoch, as
    with the authors; with more calls an epoch both come so many times earlier.
    """
    if source.options['reset_l0'] and source.calls == source.recipe.warmup + 120:
        linear = next(m for m in source.generator.modules() if isinstance(m, nn.Linear))
        norm = next(m for m in source.generator.modules() if isinstance(m, nn.BatchNorm2d))
        for m in (linear, norm):  # the authors centre the batch norm's weight on 0, not on 1
            m.weight.data.copy_(0.02 * torch.randn(m.weight.shape, generator=rng))
            nn.init.zeros_(m.bias)
    source.slow.zero_grad(set_to_none=False)
    return source.generator if source.options['meta'] == 'none' else source.clone()


def gradients(kd, source, net):
    """First-order MAML: the generator's gradient is the sum of its clone's, before each of its steps."""
    if source.options['meta'] == 'fomaml':
        for p, q in zip(source.generator.parameters(), net.parameters()):
            p.grad = q.grad.clone() if p.grad is None else p.grad.add_(q.grad)


def end(kd, source, net, kept):
    if kd.momentum:
        kd.update()
    if source.options['meta'] == 'reptile':
        for p, q in zip(source.generator.parameters(), net.parameters()):
            p.grad = 67 * (p.detach() - q.detach())  # the authors' factor
    if source.options['meta'] != 'none':
        source.step(source.slow)
