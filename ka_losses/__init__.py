"""Amalgamation losses, one method a file: `from ka_losses import CFL`.

How train_ka.py uses them is in methods/ka.py. transformer_ka, ka_vit, afk, fedka, subtask, recombination and
ood_ka have no row there: they need networks, rounds or generators that this trainer does not have.
"""

from .afk import AFK
from .cfl import CFL
from .concat_kd import ConcatKD
from .customize import Customize
from .fedka import FedKA
from .ka_vit import TokenAmalgamation
from .layerwise import LayerwiseKA
from .ood_ka import OODKAGenerator
from .recombination import SoftFocal
from .sbm import SBM
from .soka import GradNorm, SOKAFeature
from .subtask import SubTask
from .transformer_ka import TaskAmalgamation

__all__ = [
    'AFK',
    'CFL',
    'SBM',
    'ConcatKD',
    'Customize',
    'FedKA',
    'GradNorm',
    'LayerwiseKA',
    'OODKAGenerator',
    'SOKAFeature',
    'SoftFocal',
    'SubTask',
    'TaskAmalgamation',
    'TokenAmalgamation',
]


def __getattr__(name: str):
    """METHODS and Method have moved to methods/ka.py; for callers that still ask here."""
    if name in ('METHODS', 'Method'):
        from methods import ka

        return ka.KA if name == 'METHODS' else ka.Method
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
