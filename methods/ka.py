"""The rows of train_ka.py: frozen teachers that each know a part, amalgamated into one student.

The columns are those of columns.py, with what amalgamation asks of them.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import nn

from ka_losses import afk, cfl, concat_kd, customize, ka_vit, layerwise, sbm, soka
from kd_losses import radio, unic
from models.streams import StreamNet

from .columns import Limits
from .ka_shared import everything, no_module, with_labels
from .shared import plain


@dataclass(frozen=True)
class When:
    """What stands beside the loss, and what changes during a training.

    soft: the weight of soft targets over all classes (ConcatKD) beside it, default of --lambda_kd.
    updates: {share of the training done: the updates that every batch gets from there on}.
    no_soft_targets_in: updates without the soft targets.
    """

    soft: float = 1.0
    updates: dict[float, tuple] = field(default_factory=lambda: {0.0: ('all',)})
    no_soft_targets_in: tuple = ()

    def updates_now(self, done: float) -> tuple:
        """done: share of the training that lies behind."""
        return self.updates[max(share for share in self.updates if share <= done)]


@dataclass(frozen=True)
class Needs:
    """What the trainer must provide.

    setting: the names of the settings (ka_settings) that it fits, a space between them; '': any.
    layers: the stages it attaches to by default, counted from 1; none where it reads outputs only.
    shared_classes: teachers that share the student's classes; the others want parts that do not overlap.
    labels: it is a reference that reads labels; all others are never given them.
    """

    setting: str = 'classes'
    layers: tuple = ()
    shared_classes: bool = False
    labels: bool = False


@dataclass(frozen=True)
class Own:
    """Parts of a training that this method does its own way.

    parameters: (net, ka) -> {update: (parameters of the student, parameters of the loss)}; each update has
        an optimiser of its own.
    after_update: (ka, update), what follows one.
    student: (teachers, columns of their logits that are wanted) -> the student, instead of Setting.student.
    before: (ka, teachers_on, sample), once before the first step.
    forward: (net, batch) -> what the feed gets of the student, instead of Setting.forward.
    begin_phase: (net, phase, ka, teachers_on, sample) -> a line for the log or ''; where a phase of the
        training begins, see sbm.py. The network's freeze(True) holds in the first phase, freeze(False) later.
    """

    parameters: Callable = everything
    after_update: Callable | None = None
    student: Callable | None = None
    before: Callable | None = None
    forward: Callable | None = None
    begin_phase: Callable | None = None


@dataclass(frozen=True)
class Method:
    """A row. feed(ka, s, all_t, batch) -> loss, terms; build(loss, probe, **options) -> module."""

    loss: type
    weight: float  # default of --lambda_ka
    feed: Callable
    build: Callable = plain
    when: When = When()
    needs: Needs = Needs()
    own: Own = Own()
    limits: Limits = Limits()
    says: str = ''  # what it does, where the loss file's first line is another row's


both = 'classes attributes'
alone = When(soft=0)
in_turn = {0.0: ('all',), 0.1: ('competition', 'collaboration', 'balance')}
DRAWN = 'parameters of streams rest in some steps'
STATISTICS = "its statistics of the teachers would be each process's own"
BALANCE = 'its balance of tasks would differ between processes'

# fmt: off
KA = {
    'concat':           Method(concat_kd.ConcatKD,    1.0, concat_kd.feed, when=alone),
    'parts':            Method(concat_kd.ConcatKD,    1.0, concat_kd.feed, concat_kd.build_parts, alone,
                               says='soft targets inside each part'),
    'mse':              Method(concat_kd.ConcatKD,    1.0, concat_kd.feed, concat_kd.build_mse, alone,
                               says='squared error of all logits'),
    'layerwise':        Method(layerwise.LayerwiseKA, 1.0, layerwise.feed, layerwise.build,
                               needs=Needs(layers=(1, 2, 3))),
    'cfl':              Method(cfl.CFL,                10, cfl.feed, cfl.build, needs=Needs(layers=(3,))),
    'soka':             Method(soka.Coordination,     1.0, soka.feed, soka.build,
                               When(updates=in_turn, no_soft_targets_in=('balance',)), Needs(layers=(2, 3)),
                               Own(parameters=soka.parameters, after_update=soka.after_update),
                               Limits(one_process=BALANCE)),
    'customize':        Method(customize.Customize,   1.0, customize.feed, customize.build, alone,
                               Needs(both, (1, 2, 3), shared_classes=True)),
    'customize_target': Method(customize.Customize,   1.0, customize.feed_target, customize.build_target,
                               alone, Needs(both, (1, 2, 3))),
    'each_attribute':   Method(concat_kd.ConcatKD,    1.0, concat_kd.feed_each, concat_kd.build_parts, alone,
                               Needs('attributes'), says='one yes or no per attribute'),
    'afk':              Method(afk.AFK,               1.0, afk.feed, when=alone, needs=Needs('attributes'),
                               own=Own(student=StreamNet, forward=afk.forward, begin_phase=afk.begin_phase),
                               limits=Limits(one_process=DRAWN)),
    'radio':            Method(radio.RADIO,           1.0, radio.feed, radio.build, alone, Needs('backbones'),
                               Own(before=radio.before), Limits(one_process=STATISTICS)),
    'unic':             Method(unic.UNIC,             1.0, unic.feed, unic.build, alone, Needs('backbones'),
                               limits=Limits(one_process=STATISTICS)),
    'sbm':              Method(sbm.SBM,               1.0, sbm.feed, sbm.build, alone, Needs(setting='dense'),
                               Own(forward=sbm.forward, begin_phase=sbm.begin_phase)),
    'ka_vit':           Method(ka_vit.TokenAmalgamation, 1.0, ka_vit.feed),
    'scratch':          Method(nn.Identity,           1.0, with_labels, no_module, alone,
                               Needs(setting='', labels=True)),
}
