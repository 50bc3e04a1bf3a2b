"""Students that keep what a method has added to them: build the network that belongs to a file of weights.

SimKD's student is used through the projector and its teacher's classifier, NORM's through the transform
before its classifier. Everything that is needed stands in student.pt; here is read how it was shaped. A later
method that changes its student gets a line in ADDED, and its mark in checkpoint.CHANGED.
"""

from pathlib import Path

from torch import nn

from kd_losses.norm import NORMStudent
from kd_losses.simkd import SimKD, SimKDStudent

from .checkpoint import CHANGED, _find_state, _unwrapped, changed_by, read_checkpoint
from .slimming import shaped_like


def changed_network(net: nn.Module, path: str | Path) -> nn.Module:
    """`net` with what the weights in this file need besides, or as narrow as they are; not loaded yet.

    Raises:
        ValueError: the file cannot be read.
    """
    state = read_state(path)
    method = changed_by(state)
    if method is None:
        return shaped_like(net, _unwrapped(state, net.state_dict())[0])
    mark = CHANGED[method]
    prefix = next(name for name in state if f'.{name}'.endswith(f'.{mark}'))[: -len(mark)]
    return ADDED[method](net, {name.removeprefix(prefix): x for name, x in state.items()})


def read_state(path: str | Path) -> dict:
    return _find_state(read_checkpoint(path), path, None)[0]


class SimKDNetwork(SimKDStudent):
    """A SimKD student as any other network, so that it can be a teacher."""

    def classifier_layer(self) -> nn.Linear:
        return self.classifier

    def feat_modules(self) -> list[nn.Module]:
        return [self.net, self.loss.projector]

    def bn_before_relu(self) -> list[nn.Module]:
        return self.net.bn_before_relu()

    def after(self, k: int, fm):
        raise ValueError('a SimKD student cannot be run from the middle, which this method needs')


class NORMNetwork(NORMStudent):
    """A NORM student as any other network, so that it can be a teacher."""

    def classifier_layer(self) -> nn.Linear:
        return self.net.classifier_layer()

    def feat_modules(self) -> list[nn.Module]:
        return [*self.net.feat_modules(), self.transform]

    def bn_before_relu(self) -> list[nn.Module]:
        return self.net.bn_before_relu()

    def after(self, k: int, fm):
        raise ValueError('a NORM student cannot be run from the middle, which this method needs')


def _simkd(net: nn.Module, state: dict) -> nn.Module:
    middle, s_channels = state['loss.projector.0.weight'].shape[:2]
    num_classes, t_channels = state['classifier.weight'].shape
    loss = SimKD(s_channels, t_channels, factor=t_channels // middle)
    size = tuple(state['loss.size'].tolist())
    return SimKDNetwork(net, loss, nn.Linear(t_channels, num_classes), size)


def _norm(net: nn.Module, state: dict) -> nn.Module:
    wide, s_channels = state['transform.expand.0.weight'].shape[:2]
    return NORMNetwork(net, s_channels, 1, wide)  # the file tells the product of groups and teacher channels


ADDED = {'simkd': _simkd, 'norm': _norm}
