"""What flows through a training step: the batch, and Feats that are cast when they are read."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from models import Feats


@dataclass
class Batch:
    """The images of a step and all that a feed (kd_losses) may ask for besides Feats of student and teacher.

    The first fields are the same for every student of a group; a student's own copy has the others, too.
    """

    img: Tensor  # (N, 3, H, W), normalised
    target: Tensor  # (N,)
    index: Tensor  # (N,), positions in the training set
    views: dict[str, Tensor]  # further images, {view: (N, 3, H, W)}
    all_t: list = field(default_factory=list)  # Feats of all teachers, the main one first
    once: dict[Callable, Any] = field(default_factory=dict)  # {a row's once_per_batch: what it gave}
    teacher: Callable[[Tensor], Any] | None = None  # images -> the main teacher's Feats
    exact: Callable[[Tensor], Any] | None = None  # the same in float32, whatever --amp says
    net_t: nn.Module | None = None  # the main teacher
    nets_t: list = field(default_factory=list)  # all of them

    now: int = 0  # epochs done, read through `epoch`
    epochs: int = 0  # of the whole training
    generator: torch.Generator | None = None  # for numbers drawn on the device
    rng: Any = None  # random.Random, for choices of the host
    net_s: nn.Module | None = None  # the student
    student: Callable[[Tensor], Any] | None = None  # images -> the student's Feats
    raw: Any = None  # the student's Feats of img before any cast
    from_teacher: Any = None  # what this row's once_per_batch gave
    inner: float | None = None  # this row's inner schedule in this epoch
    peers: Callable[[Any], list] | None = None  # images -> Feats of all networks that learn from each other
    reads_epoch: bool = False  # somebody asked for the epoch, so this step cannot be repeated in another

    @property
    def epoch(self) -> int:
        """Epochs done, from 0; negative in phases before the training."""
        self.reads_epoch = True
        return self.now


@dataclass
class Probe:
    """What a loss may be built from: Feats of a few images, and what else there is."""

    s: Any  # of the student; a list with peers
    t: Any  # of the main teacher, None without
    net_s: Any
    net_t: nn.Module | None
    train_set: Any
    batch_size: int
    epochs: int
    num_classes: int
    another_net: Callable[[nn.Module], nn.Module] | None = None  # a fresh network of the same kind
    all_t: list = field(default_factory=list)  # Feats of all teachers, the main one first


class InFloat32:
    """Feats for losses: float32, whatever precision the network ran in, cast when a loss reads them.

    Nobody pays for maps that no loss looks at. What has been cast is kept, until freeze().

    Args:
        f: the network's Feats.
        reads: where reads are noted, {field or (field, number of the map)}, for cast_ahead.
    """

    def __init__(self, f: Feats, reads: set | None = None) -> None:
        self._f, self._cast, self._frozen = f, {}, False
        self._reads = set() if reads is None else reads

    @property
    def out(self) -> Tensor:
        return self._read('out')

    @property
    def feat(self) -> Tensor:
        return self._read('feat')

    @property
    def extra(self) -> Any:
        return self._read('extra')

    @property
    def fms(self) -> Sequence[Tensor]:
        return _Maps(self, 'fms')

    @property
    def pres(self) -> Sequence[Tensor]:
        return _Maps(self, 'pres')

    @property
    def tokens(self) -> Sequence[Tensor]:
        return _Maps(self, 'tokens')

    def _read(self, name: str, k: int | None = None):
        key = name if k is None else (name, k)
        if key in self._cast:
            return self._cast[key]
        self._reads.add(key)
        value = getattr(self._f, name)
        value = as_float(value if k is None else value[k])
        if not self._frozen:
            self._cast[key] = value
        return value

    def cast_ahead(self) -> None:
        """Cast what has been read of earlier batches."""
        for key in list(self._reads):
            self._read(*(key if isinstance(key, tuple) else (key,)))

    def freeze(self) -> None:
        """Keep no further casts: of a recorded batch they would belong to the recording that made them."""
        self._frozen = True


class _Maps(Sequence):
    """A list of maps, each cast when it is read."""

    def __init__(self, feats: InFloat32, name: str) -> None:
        self._feats, self._name = feats, name

    def __len__(self) -> int:
        return len(getattr(self._feats._f, self._name))

    def __getitem__(self, k):
        numbers = range(len(self))[k]
        if isinstance(k, slice):
            return [self[i] for i in numbers]
        return self._feats._read(self._name, numbers)


def as_float(x):
    """Tensors, lists of them and Feats in float32; anything else as it is."""
    if isinstance(x, Feats):
        return Feats(*map(as_float, x))
    if isinstance(x, (list, tuple)):
        return type(x)(map(as_float, x))
    return x.float() if isinstance(x, Tensor) else x
