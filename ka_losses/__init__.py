"""Amalgamation losses, one method a file: `from ka_losses import CFL`.

How train_ka.py uses them is in methods/ka.py. transformer_ka, fedka, subtask, recombination and ood_ka have
no row there: they need networks, rounds or generators that this trainer does not have, and a tool each has.
"""

from .afk import AFK, Filter
from .cfl import CFL
from .concat_kd import ConcatKD
from .customize import Customize
from .fedka import FedKA, Translator
from .ka_vit import TokenAmalgamation, TokenExpand
from .layerwise import LayerwiseKA
from .ood_ka import OODKAGenerator
from .recombination import RangeQuantizer, SoftFocal
from .sbm import SBM, ChannelCoding
from .soka import Coordination, GradNorm, SOKAFeature
from .subtask import SubTask
from .transformer_ka import SeqAgg, SeqHint, TaskAmalgamation

__all__ = [
    'AFK',
    'CFL',
    'SBM',
    'ChannelCoding',
    'ConcatKD',
    'Coordination',
    'Customize',
    'FedKA',
    'Filter',
    'GradNorm',
    'LayerwiseKA',
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
