"""How at.npz feeds kd_losses/at.py."""

from kd_losses.at import AT
from tests.methods.shared import case


def golden(z):
    yield case(z, AT(**z.hp('p')), 'fm_s', 'fm_t')
    yield case(z, AT(p=2.0), 'fm_s', 'fm_t', suffix='_p2')
    yield case(z, AT(**z.hp('p')), 'fm_s', 'fm_t', suffix='_big', rename={'fm_s': 'fm_s_big'})
