"""The index of the amalgamation losses that train_ka.py trains: one import, one row in METHODS per method.

As in kd_losses: a row says what a training step feeds the loss (feed), what its constructor is told (build),
the default weights, and what else the trainer must provide, see Method. A feed returns the loss and its terms
without weights, for the log. transformer_ka, ka_vit, afk, fedka, subtask, recombination and ood_ka are files
without a row: they need networks, rounds or generators that this trainer does not have.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .afk import AFK, Filter
from .cfl import CFL
from .concat_kd import ConcatKD
from .customize import Customize, select_teacher
from .fedka import FedKA, Translator
from .ka_vit import TokenAmalgamation, TokenExpand
from .layerwise import LayerwiseKA
from .ood_ka import OODKAGenerator
from .recombination import RangeQuantizer, SoftFocal
from .sbm import SBM, ChannelCoding
from .soka import GradNorm, SOKAFeature
from .subtask import SubTask
from .transformer_ka import SeqAgg, SeqHint, TaskAmalgamation

__all__ = [
    'AFK',
    'CFL',
    'METHODS',
    'SBM',
    'ChannelCoding',
    'ConcatKD',
    'Customize',
    'FedKA',
    'Filter',
    'GradNorm',
    'LayerwiseKA',
    'Method',
    'OODKAGenerator',
    'RangeQuantizer',
    'SOKAFeature',
    'SeqAgg',
    'SeqHint',
    'SoftFocal',
    'SubTask',
    'TaskAmalgamation',
    'TokenAmalgamation',
    'TokenExpand',
    'Translator',
]


# feed: what one step gives the loss; returns value and terms.  s: Feats of the student (out, feat, fms,
# pres), or its outputs per task; ts: a list of these, one per teacher, cut to the classes in use.  b: the
# batch (img, epoch, epochs, layers, blocks, update, phase, rng; target only where a row reads labels).


def joined(ka, s, ts, b):
    return ka(s.out, [t.out for t in ts], return_terms=True)


def levels(ka, s, ts, b):
    return total(loss(s.fms[k], [t.fms[k] for t in ts], return_terms=True) for k, loss in zip(b.layers, ka))


def common(ka, s, ts, b):
    (loss,) = ka
    k = b.layers[-1]
    return loss(*((s.fms[k], [t.fms[k] for t in ts]) if loss.conv else (s.feat, [t.feat for t in ts])), True)


def chosen(ka, s, ts, b):
    """Each image from the source that is surest of it."""
    which = select_teacher([t.out for t in ts])
    results = []
    for i, (loss, t) in enumerate(zip(ka, ts)):
        mine = (which == i).nonzero()[:, 0]
        if len(mine):
            maps = ([f.pres[k][mine] for k in b.layers] for f in (s, t))
            results.append(loss(*maps, s.out[mine], t.out[mine], return_terms=True))
    return total(results)


def components(ka, s, ts, b):
    """Every image from every component, each for its own head."""
    return total(
        loss(*([f.pres[k] for k in b.layers] for f in (s, t)), s.out[:, block], t.out, return_terms=True)
        for loss, t, block in zip(ka, ts, b.blocks)
    )


def coordinated(ka, s, ts, b):
    soft = ConcatKD()
    parts = torch.stack([soft(s.out[:, block], [t.out]) for t, block in zip(ts, b.blocks)])
    terms = {f'task{i}': part for i, part in enumerate(parts, 1)}
    ka.norm.start(parts)
    if b.update == 'balance':
        return ka.norm(parts, ka.shared[0]), terms
    loss = (ka.norm.weights.detach() * parts).sum()
    la = sum(f(s.fms[k], [t.fms[k] for t in ts]) for k, f in zip(b.layers, ka.features))
    if b.update == 'collaboration':
        loss = 0.05 * loss + la
    return loss, terms | {'la': la}


def dense(ka, s, ts, b):
    return ka(s, ts, return_terms=True)


def labels(ka, s, ts, b):
    loss = b.supervised(s, b.target)
    return loss, {'labels': loss}


def total(results) -> tuple[Tensor, dict]:
    """The sum of several (loss, terms)."""
    losses, terms = zip(*results)
    return sum(losses), {key: sum(term[key] for term in terms) for key in terms[0]}


# build: from the loss's class to its module; e: what there is to build from (s, ts: Feats of a first batch;
# net, the student; layers; tasks).


def plain(loss, e, **options):
    return loss(**options)


def nothing(loss, e, **options):
    return loss()


def per_level(loss, e, **options):
    return nn.ModuleList(
        loss(e.s.fms[k].shape[1], [t.fms[k].shape[1] for t in e.ts], **options) for k in e.layers
    )


def common_space(loss, e, **options):
    k = e.layers[-1]
    conv = options.get('block', 'conv') == 'conv'
    widths = [(f.fms[k] if conv else f.feat).shape[1] for f in (e.s, *e.ts)]
    options.setdefault('h_channels', 32 if conv else max(widths[0] // 4, 1))
    return nn.ModuleList([loss(widths[0], widths[1:], **options)])


def bridges(loss, e, **options):
    """One module per source, bridges half as wide as the source's maps."""
    s, *ts = ([f.pres[k].shape[1] for k in e.layers] for f in (e.s, *e.ts))
    return nn.ModuleList(loss(s, t, [max(c // 2, 1) for c in t], **options) for t in ts)


def bridges_s(loss, e, **options):
    """One module per component, bridges on the target's side only."""
    s, *ts = ([f.pres[k].shape[1] for k in e.layers] for f in (e.s, *e.ts))
    return nn.ModuleList(loss(s, None, t, **options) for t in ts)


class Coordination(nn.Module):
    """SOKA's parts: a feature loss per level, the balance of tasks, the last weight that they share."""

    def __init__(self, channels: list, n_teachers: int, shared: nn.Parameter, alpha: float = 1.5) -> None:
        super().__init__()
        self.features = nn.ModuleList(SOKAFeature(n_teachers, (c, 1, 1)) for c in channels)
        self.norm, self.shared = GradNorm(n_teachers, alpha), [shared]  # a list: it is the student's


def coordination(loss, e, **options):
    body = [m for module in e.net.feat_modules() for m in module.modules() if isinstance(m, nn.Conv2d)]
    wide = [conv for conv in body if conv.kernel_size != (1, 1)]
    channels = [e.s.fms[k].shape[1] for k in e.layers]
    return loss(channels, len(e.ts), (wide or body)[-1].weight, **options)


def per_task(loss, e, **options):
    return loss(e.tasks, **options)


# groups: {update: (parameters of the student, parameters of the loss)}, each with an optimiser of its own.


def everything(net, ka) -> dict:
    return {'all': (list(net.parameters()), list(ka.parameters()))}


def apart(net, ka) -> dict:
    head = list(net.classifier_layer().parameters())
    body = [p for p in net.parameters() if all(p is not q for q in head)]
    features = list(ka.features.parameters())
    return {
        'all': ([*body, *head], []),
        'competition': (head, []),
        'collaboration': (body, features),
        'balance': ([], [ka.norm.weights]),
    }


# turn: which updates a batch gets, from the share of the run that is done.


def always(done: float) -> tuple:
    return ('all',)


def in_turn(done: float) -> tuple:
    return ('all',) if done < 0.1 else ('competition', 'collaboration', 'balance')


def renormalise(ka, update: str) -> None:
    if update == 'balance':
        ka.norm.renormalise()


def wandering(net, b):
    """In the block phase every branch leaves the trunk at a random point."""
    return net(b.img, None if b.phase else [b.rng.randrange(net.levels) for _ in net.branches])


@torch.no_grad()
def branch_off(net, phase: int, ka, look, batches) -> str:
    """At the start of a phase: freeze the branches, or choose their points and let them train."""
    if phase == 0:
        return ''
    sums = torch.zeros(net.levels, len(net.branches))
    net.eval()
    for img, *_ in batches():
        ts = look(img)
        for k in range(net.levels):
            _, terms = ka(net(img, [k] * len(net.branches)), ts, return_terms=True)
            sums[k] += torch.stack(list(terms.values())).cpu() * len(img)
    net.choose(sums.argmin(dim=0).tolist())
    return f'branch points {net.points.tolist()}'


@dataclass(frozen=True)
class Method:
    """How train_ka.py uses a loss.

    loss, feed, build: its class, what it is fed, how it is built; see above.
    weight: lambda_ka, its weight.
    kd: lambda_kd, the weight of soft targets over all classes (ConcatKD) beside it.
    layers: the stages it attaches to by default, counted from 1; none where it reads logits only.
    labels: a reference that reads labels; all others are never given them.
    shared: wants teachers that share the student's classes; the others want parts that do not overlap.
    dense: for teachers of one dense task each (segmentation, depth, normals), not of classes; None:
        for either.
    groups, turn: optimisers, and which of them steps when; see above.
    unsoft: updates without the soft targets.
    after: what follows an update.
    forward: another forward pass of the student than the usual one.
    phase: called where a phase of the run begins, see branch_off; freeze: the branches rest in phase 0.
    one_process: why it cannot be trained by several processes; '' if it can.
    """

    loss: type
    feed: Callable
    build: Callable = plain
    weight: float = 1.0
    kd: float = 1.0
    layers: tuple = ()
    labels: bool = False
    shared: bool = False
    dense: bool | None = False
    groups: Callable = everything
    turn: Callable = always
    unsoft: tuple = ()
    after: Callable | None = None
    forward: Callable | None = None
    phase: Callable | None = None
    one_process: str = ''


def in_parts(loss, e, **options):
    return loss(mode='parts', **options)


def squared(loss, e, **options):
    return loss(mode='mse', **options)


_BALANCE = 'its balance of tasks would differ between processes'

METHODS = {
    'concat': Method(ConcatKD, joined, kd=0),
    'parts': Method(ConcatKD, joined, in_parts, kd=0),
    'mse': Method(ConcatKD, joined, squared, kd=0),
    'layerwise': Method(LayerwiseKA, levels, per_level, layers=(1, 2, 3)),
    'cfl': Method(CFL, common, common_space, weight=10, layers=(3,)),
    'soka': Method(Coordination, coordinated, coordination, layers=(2, 3), groups=apart, turn=in_turn,
                   unsoft=('balance',), after=renormalise, one_process=_BALANCE),
    'customize': Method(Customize, chosen, bridges, kd=0, layers=(1, 2, 3), shared=True),
    'customize_target': Method(Customize, components, bridges_s, kd=0, layers=(1, 2, 3)),
    'sbm': Method(SBM, dense, per_task, kd=0, dense=True, forward=wandering, phase=branch_off),
    'scratch': Method(nn.Identity, labels, nothing, kd=0, labels=True, dense=None),
}  # fmt: skip
