"""How wsld.npz feeds kd_losses/wsld.py."""

from kd_losses.wsld import WSLD
from tests.methods.shared import case

exceptions = {
    'gradient_not_of_value': 'the weights of the samples are constants',
}


def golden(z):
    yield case(z, WSLD(**z.hp('T')), 'out_s', 'out_t', 'target')
