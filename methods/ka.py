"""The rows of train_ka.py: frozen teachers that each know a part, amalgamated into one student."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from ka_losses import cfl, concat_kd, customize, layerwise, sbm, soka

from .ka_shared import everything, no_module, with_labels
from .shared import plain

# turn: which updates a batch gets, from the share of the run that is done.


def always(done: float) -> tuple:
    return ('all',)


def in_turn(done: float) -> tuple:
    return ('all',) if done < 0.1 else ('competition', 'collaboration', 'balance')


@dataclass(frozen=True)
class Method:
    """How train_ka.py uses a loss.

    loss, feed, build: its class, what it is fed, how it is built; see ka_shared.py.
    weight: lambda_ka, its weight.
    kd: lambda_kd, the weight of soft targets over all classes (ConcatKD) beside it.
    layers: the stages it attaches to by default, counted from 1; none where it reads logits only.
    labels: a reference that reads labels; all others are never given them.
    shared: wants teachers that share the student's classes; the others want parts that do not overlap.
    dense: for teachers of one dense task each (segmentation, depth, normals), not of classes; None:
        for either.
    groups, turn: optimisers, and which of them steps when; see ka_shared.py and above.
    unsoft: updates without the soft targets.
    after: what follows an update.
    forward: another forward pass of the student than the usual one.
    phase: called where a phase of the run begins, see sbm.begin_phase.
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


_BALANCE = 'its balance of tasks would differ between processes'

KA = {
    'concat': Method(concat_kd.ConcatKD, concat_kd.feed, kd=0),
    'parts': Method(concat_kd.ConcatKD, concat_kd.feed, concat_kd.build_parts, kd=0),
    'mse': Method(concat_kd.ConcatKD, concat_kd.feed, concat_kd.build_mse, kd=0),
    'layerwise': Method(layerwise.LayerwiseKA, layerwise.feed, layerwise.build, layers=(1, 2, 3)),
    'cfl': Method(cfl.CFL, cfl.feed, cfl.build, weight=10, layers=(3,)),
    'soka': Method(soka.Coordination, soka.feed, soka.build, layers=(2, 3), groups=soka.parameters,
                   turn=in_turn, unsoft=('balance',), after=soka.after_update, one_process=_BALANCE),
    'customize': Method(customize.Customize, customize.feed, customize.build, kd=0, layers=(1, 2, 3),
                        shared=True),
    'customize_target': Method(customize.Customize, customize.feed_target, customize.build_target, kd=0,
                               layers=(1, 2, 3)),
    'sbm': Method(sbm.SBM, sbm.feed, sbm.build, kd=0, dense=True, forward=sbm.forward,
                  phase=sbm.begin_phase),
    'scratch': Method(nn.Identity, with_labels, no_module, kd=0, labels=True, dense=None),
}  # fmt: skip
