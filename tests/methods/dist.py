"""How dist.npz feeds kd_losses/dist.py."""

from kd_losses.dist import DIST
from tests.methods.shared import case

exceptions = {
    'masked_class': 'the divergence is weighed by probabilities, a class of probability 0 counts nothing',
}


def golden(z):
    loss = DIST(**z.hp('beta', 'gamma', 'tau'))
    yield case(z, loss, 'out_s', 'out_t')
    yield case(z, loss, 'out_s', 'out_t', suffix='_inter', call=lambda **x: loss.terms(**x)[0])
    yield case(z, loss, 'out_s', 'out_t', suffix='_intra', call=lambda **x: loss.terms(**x)[1])
