"""How dlb.npz feeds kd_losses/dlb.py."""

from kd_losses.dlb import DLB
from tests.methods.shared import case


def golden(z):
    loss = DLB(**z.hp('T', 'alpha'))
    names = ('out', 'target', 'out_prev_now', 'out_prev_then', 'target_prev')
    yield case(z, loss, *names)
    yield case(z, loss, *names, suffix='_ce', call=lambda **x: loss.terms(**x)[0])
    yield case(z, loss, *names, suffix='_kd', call=lambda **x: loss.terms(**x)[1])
