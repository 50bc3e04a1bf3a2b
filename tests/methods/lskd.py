"""How lskd.npz feeds kd_losses/lskd.py."""

from kd_losses.dkd import DKD
from kd_losses.lskd import LSKD, standardize
from tests.methods.shared import case


def golden(z):
    yield case(z, LSKD(**z.hp('T')), 'out_s', 'out_t')
    decoupled = LSKD(DKD(**z.hp('alpha', 'beta', 'T')))
    yield case(
        z,
        decoupled,
        'out_s',
        'out_t',
        'target',
        suffix='_dkd',
        call=lambda out_s, out_t, target: decoupled(out_s, out_t, target),
    )
    z.compare('out_standardized_s', standardize(z.input('out_s')))
