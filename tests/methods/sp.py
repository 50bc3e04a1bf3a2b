"""How sp.npz feeds kd_losses/sp.py."""

from kd_losses.sp import SP
from tests.methods.shared import case

exceptions = {
    'any_rank': 'maps of any shape, only the batch must agree',
}


def golden(z):
    yield case(z, SP(), 'fm_s', 'fm_t')
