"""How ttm.npz feeds kd_losses/ttm.py."""

from kd_losses.ttm import TTM
from tests.methods.shared import case

exceptions = {
    'masked_class': 'the divergence is weighed by probabilities, a class of probability 0 counts nothing',
}


def golden(z):
    yield case(z, TTM(**z.hp('l')), 'out_s', 'out_t')
    weighted = case(z, TTM(**z.hp('l'), weighted=True), 'out_s', 'out_t', suffix='_wttm')
    weighted.grads = {'grad_out_s_w': weighted.inputs['out_s']}
    yield weighted
