"""How cskd.npz feeds kd_losses/cskd.py."""

from kd_losses.cskd import CSKD
from tests.methods.shared import case

exceptions = {
    'masked_class': 'the divergence is weighed by probabilities, a class of probability 0 counts nothing',
}


def golden(z):
    yield case(z, CSKD(**z.hp('T')), 'out', 'out_pair')
