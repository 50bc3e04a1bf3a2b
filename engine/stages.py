"""Which stages of the networks a loss compares: --kd_layers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from engine.batch import Probe
from engine.errors import UserError
from methods import Method

FLAG = '--kd_layers'


@dataclass(frozen=True)
class Stages:
    """What a loss sees of a network: its stem and these stages.

    Args:
        numbers: from 1, or from the last one backwards -1, -2, ..., each network by its own count; shallow to
            deep. (): all, as far as both networks go.
        weights: factors of the stages in the mean over them; (): all 1.
    """

    numbers: tuple[int, ...] = ()
    weights: tuple[float, ...] = ()

    def __str__(self) -> str:
        """As the flag has it: 'all', '-1', '1:0.25,2:0.5,3'."""
        weights = self.weights or [1] * len(self.numbers)
        return ','.join(str(k) if w == 1 else f'{k}:{w!r}' for k, w in zip(self.numbers, weights)) or 'all'

    def of(self, f):
        """Feats, or what is read like them, with the maps of these stages only."""
        return _Chosen(f, self.numbers) if self.numbers else f

    def of_probe(self, probe: Probe) -> Probe:
        if not self.numbers:
            return probe
        return replace(
            probe, s=self.of(probe.s), t=self.of(probe.t), net_t=_Teacher(probe.net_t, self.numbers)
        )

    def build(self, name: str, method: Method, probe: Probe, options: dict) -> nn.Module:
        """The loss of a method for these stages, their weights included."""
        if self != default_of(method):  # a wrapped network may have nothing but a last map
            self._check(name, probe)
        loss = method.build(method.loss, self.of_probe(probe), **options)
        one_each = isinstance(loss, nn.ModuleList)
        if not one_each and len(default_of(method).numbers) == 1 != len(self.numbers):
            raise UserError(f'{FLAG} {name}={self}: {name} compares the maps of one stage')
        if not self.weights:
            return loss
        if not one_each:
            raise UserError(
                f'{FLAG} {name}={self}: {name} takes no mean over stages, so they have no weights'
            )
        return nn.ModuleList(_Weighted(of_stage, weight) for of_stage, weight in zip(loss, self.weights))

    def _check(self, name: str, probe: Probe) -> None:
        """Refuse stages that a network lacks, or that are not in order."""
        for side, f in (('student', probe.s), ('teacher', probe.t)):
            many = len(f.fms) - 1
            if max(map(abs, self.numbers), default=0) > many:
                raise UserError(f'{FLAG} {name}={self}: the {side} has {many} stages')
            places = [_place(k, many + 1) for k in self.numbers]
            if any(a >= b for a, b in zip(places, places[1:])):
                raise UserError(f'{FLAG} {name}={self}: name each stage once, from the first to the last')


def default_of(method: Method) -> Stages:
    """What a row compares if nothing is said."""
    return Stages(method.needs.stages or ())


def read_stages(args, names: list[str], rows: dict[str, Method]) -> dict[str, Stages]:
    """{name: its stages} from the flag."""
    stages = {name: default_of(rows[name]) for name in names}
    for word in args.kd_layers:
        name, equals, text = word.strip().rpartition('=')
        if not equals and len(names) > 1:
            raise UserError(f'{FLAG} {word}: with several methods say METHOD={text}')
        name = name if equals else names[0]
        if name not in names:
            raise UserError(f'{FLAG}: {name!r} is not among --kd_mode {" ".join(args.kd_mode)}')
        if rows[name].needs.stages is None:
            able = ', '.join(other for other, row in rows.items() if row.needs.stages is not None)
            raise UserError(f'{FLAG}: the stages of {name} are fixed; of these they can be chosen: {able}')
        stages[name] = _parse(text)
    return stages


def _parse(text: str) -> Stages:
    if text == 'all':
        return Stages()
    try:
        parts = [part.partition(':') for part in text.split(',')]
        numbers = [int(number) for number, _, _ in parts]
        weights = [float(weight) if colon else 1.0 for _, colon, weight in parts]
    except ValueError:
        numbers, weights = [0], []
    if 0 in numbers or not all(0 < weight < math.inf for weight in weights):
        raise UserError(
            f'{FLAG}: expected all, or numbers of stages from 1, or from -1 backwards, with weights > 0 if '
            f'these differ, e.g. 2 or 1:0.25,2:0.5,3; got {text!r}'
        )
    return Stages(tuple(numbers), tuple(weights) if set(weights) != {1.0} else ())


def _place(k: int, many: int) -> int:
    """Where stage k is among the maps; the first is the stem's."""
    return k if k > 0 else many + k


class _Chosen:
    """Feats whose maps are those of the stem and some stages."""

    def __init__(self, f, numbers: tuple[int, ...]) -> None:
        self._f, self._numbers = f, numbers

    out = property(lambda self: self._f.out)
    feat = property(lambda self: self._f.feat)
    extra = property(lambda self: self._f.extra)
    tokens = property(lambda self: self._f.tokens)
    fms = property(lambda self: _Some(self._f.fms, self._numbers))
    pres = property(lambda self: _Some(self._f.pres, self._numbers))


class _Some(Sequence):
    """Some of the maps; the others are not touched, for each is cast when it is read."""

    def __init__(self, maps: Sequence[Tensor], numbers: tuple[int, ...]) -> None:
        self._maps, self._places = maps, [0, *(_place(k, len(maps)) for k in numbers)]

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, k):
        places = self._places[k]
        return [self._maps[i] for i in places] if isinstance(k, slice) else self._maps[places]


class _Teacher:
    """A network for those who build a loss: its batch norms are those of some stages."""

    def __init__(self, net: nn.Module, numbers: tuple[int, ...]) -> None:
        self._net, self._numbers = net, numbers

    def __getattr__(self, name: str):
        return getattr(self._net, name)

    def bn_before_relu(self) -> list[nn.Module]:
        bns = self._net.bn_before_relu()  # without one for the stem
        return [bns[_place(k, len(bns) + 1) - 1] for k in self._numbers]


class _Weighted(nn.Module):
    """The loss of a stage times its weight."""

    def __init__(self, loss: nn.Module, weight: float) -> None:
        super().__init__()
        self.loss, self.weight = loss, weight

    def forward(self, *maps: Tensor) -> Tensor:
        return self.weight * self.loss(*maps)
