"""The columns of a row."""

from collections.abc import Callable
from dataclasses import dataclass

from .shared import plain

# (epochs done, length of the training) -> number, see schedules.py
Schedule = Callable[[int, int], float]


@dataclass(frozen=True)
class When:
    """What changes during a training.

    ce: the weight of cross-entropy, 0 where the loss contains it; of methods on one student the product.
    ramp: a factor on the loss's weight.
    alone: of 200 epochs, how many this loss trains the student alone, before cross-entropy alone does.
    pretrain: of 200, how many the loss's own modules learn, before anything else.
    inner: a schedule that the feed reads as batch.inner.
    """

    ce: float | Schedule = 1.0
    ramp: Schedule | None = None
    alone: int = 0
    pretrain: int = 0
    inner: Schedule | None = None


@dataclass(frozen=True)
class Needs:
    """What the trainer must provide.

    teacher: False: a student of this method alone needs none.
    all_teachers: uses every --t_name, not only the first.
    views: further images of each batch, by their names in dataset/views.py.
    relations: relates the samples of a batch: --global_relations gathers those of all processes.
    full_batches: an incomplete last batch is left out.
    image_gradient: the student's images require gradients.
    tokens: compares what vision transformers say of patches: both networks are some.
    stages: those it compares unless --kd_layers says otherwise: (-1,) the last one's, () all; None: what
        its feed takes, no others.
    """

    teacher: bool = True
    all_teachers: bool = False
    views: tuple = ()
    relations: bool = False
    full_batches: bool = False
    image_gradient: bool = False
    tokens: bool = False
    stages: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Own:
    """Parts of a training that this method does its own way.

    student: (net, kd, probe) -> the network that is trained, and saved, instead of net.
    pretrain: (kd, t, batch) -> what the loss's own modules minimise in their epochs, see When.pretrain.
    before: (kd, teacher, probe), once, before the training; teacher: images -> Feats.
    once_per_batch: (net_t, t, batch) -> what the feed reads as batch.from_teacher, once for all students.
    optimiser: (kd, parameters, args) -> instead of SGD.
    update: (opt, loss_ce, loss_kd, epoch) -> instead of one backward pass and a step.

    Networks that learn from each other (train_dml.py):
    peers: (nets, probe) -> the module from images to a list of Feats.
    ensemble: (kd, list of Feats) -> logits; None: their mean.
    optimisers: (kd, peers) -> {name: optimiser}, for second_update.
    second_update: (kd, peers, batch, optimisers, guard), after the usual update; guard: Meter.guard.
    each_epoch: (kd, held_out), at the start of an epoch; held_out() -> outputs and labels of the validation
        split, None without one.
    """

    student: Callable | None = None
    pretrain: Callable | None = None
    before: Callable | None = None
    once_per_batch: Callable | None = None
    optimiser: Callable | None = None
    update: Callable | None = None
    peers: Callable | None = None
    ensemble: Callable | None = None
    optimisers: Callable | None = None
    second_update: Callable | None = None
    each_epoch: Callable | None = None


@dataclass(frozen=True)
class Limits:
    """What it cannot, with the reason; empty: it can.

    one_process: cannot run on several processes.
    no_graph: a CUDA graph cannot repeat its step.
    no_compile: a compiled network cannot serve it.
    """

    one_process: str = ''
    no_graph: str = ''
    no_compile: str = ''


@dataclass(frozen=True)
class Method:
    """A row. feed(kd, s, t, batch) -> loss; build(loss, probe, **options) -> module; see shared.py."""

    loss: type
    weight: float  # default of --lambda_kd
    feed: Callable
    build: Callable = plain
    when: When = When()
    needs: Needs = Needs()
    own: Own = Own()
    limits: Limits = Limits()
    says: str = ''  # what it does, where the loss file's first line is another row's

    def __post_init__(self) -> None:
        if bool(self.when.pretrain) != (self.own.pretrain is not None):
            raise ValueError(
                f'{self.loss.__name__}: When(pretrain=epochs) and Own(pretrain=function) go together'
            )
