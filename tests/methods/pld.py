"""How pld.npz feeds kd_losses/pld.py."""

from kd_losses.pld import PLD
from tests.methods.shared import case

exceptions = {
    'masked_class': 'the divergence is weighed by probabilities, a class of probability 0 counts nothing',
}


def golden(z):
    loss = PLD(**z.hp('tau'))
    yield case(z, loss, 'out_s', 'out_t', 'target')
    z.compare('out_order', loss.order(z.input('out_t'), z.input('target')).double())
