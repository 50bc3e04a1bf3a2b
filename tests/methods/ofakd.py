"""How ofakd.npz feeds kd_losses/ofakd.py."""

from kd_losses.ofakd import OFAKD
from tests.methods.shared import case

exceptions = {
    'masked_class': 'the divergence is weighed by probabilities, a class of probability 0 counts nothing',
}


def golden(z):
    yield case(z, OFAKD(**z.hp('eps', 'T')), 'out_s', 'out_t', 'target')
