"""How dkd.npz feeds kd_losses/dkd.py."""

from kd_losses.dkd import DKD
from tests.methods.shared import case

exceptions = {
    'masked_class': 'the divergence is weighed by probabilities, a class of probability 0 counts nothing',
}


def golden(z):
    loss = DKD(**z.hp('alpha', 'beta', 'T'))
    yield case(z, loss, 'out_s', 'out_t', 'target')
    yield case(z, loss, 'out_s', 'out_t', 'target', suffix='_tckd', call=lambda **x: loss.terms(**x)[0])
    yield case(z, loss, 'out_s', 'out_t', 'target', suffix='_nckd', call=lambda **x: loss.terms(**x)[1])
