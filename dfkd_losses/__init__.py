"""Data-free losses, one method a file: `from dfkd_losses import DAFL`.

How train_dfkd.py uses them is in methods/dfkd.py. Where other losses take the teacher as a constant, those of
an image source do not: their gradient reaches the images through the frozen teacher.
"""

from .cmi import CMI, Embedding, MemoryBank
from .dafl import DAFL
from .deepinversion import BNStatistics, DeepInversion
from .dfad import DFAD
from .dfq import DFQ, BatchNormDistance
from .fastdfkd import MomentumBNStatistics
from .kegnet import KegNet
from .mosaickd import MosaicKD
from .zskt import ZSKT

__all__ = [
    'CMI',
    'DAFL',
    'DFAD',
    'DFQ',
    'ZSKT',
    'BNStatistics',
    'BatchNormDistance',
    'DeepInversion',
    'Embedding',
    'KegNet',
    'MemoryBank',
    'MomentumBNStatistics',
    'MosaicKD',
]
