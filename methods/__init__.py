"""What trains what: one row per method, in tables that every script reads.

A row says how the training scripts use a loss: what a step feeds it, what its constructor is told, its
weight, and what else it needs. Feeds and builds that several methods share are in shared.py, the others at
the end of their loss's file; schedules are in schedules.py. To add a method, write its loss file and one row.
"""

from .columns import Limits, Method, Needs, Own, When
from .ka import KA
from .kd import KD
from .lm import LM
from .peers import PEERS

METHODS = dict(sorted((KD | PEERS).items()))

__all__ = ['KA', 'KD', 'LM', 'METHODS', 'PEERS', 'Limits', 'Method', 'Needs', 'Own', 'When']
