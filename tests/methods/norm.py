"""How norm.npz feeds kd_losses/norm.py."""

from kd_losses.norm import NORM
from tests.methods.shared import TEACHER, case, leaf

alone = """
loss = m.NORM(2)
inputs = {'fm_s': S(n, 8, 3, 3), 'fm_t': T(n, 4, 6, 6)}
"""


def golden(z):
    yield case(z, NORM(**z.hp('num_repeats')), 'fm_s', 'fm_t')


def extra(n, dtype, num_classes):
    """What its student hands out: the last map, eight times as wide as the teacher's."""
    return leaf(n, 8 * TEACHER[-1][0], 3, 2, dtype=dtype)


def extra_as_teacher(t):
    return t.fms[-1].repeat(1, 8, 1, 1)
