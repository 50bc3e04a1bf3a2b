"""How nkd.npz feeds kd_losses/nkd.py."""

from kd_losses.nkd import NKD
from tests.methods.shared import case

exceptions = {
    'masked_class': 'the divergence is weighed by probabilities, a class of probability 0 counts nothing',
}


def golden(z):
    loss = NKD(**z.hp('gamma', 'T'))
    yield case(z, loss, 'out_s', 'out_t', 'target')
    yield case(z, loss, 'out_s', 'out_t', 'target', suffix='_target', call=lambda **x: loss.terms(**x)[0])
    yield case(z, loss, 'out_s', 'out_t', 'target', suffix='_nontarget', call=lambda **x: loss.terms(**x)[1])
