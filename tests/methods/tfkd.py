"""How tfkd.npz feeds kd_losses/tfkd.py."""

from kd_losses.tfkd import TfKDReg, TfKDSelf
from tests.methods.shared import case

rows = {
    'tfkd_self': {
        'masked_class': 'the divergence is weighed by probabilities, a class of probability 0 counts nothing',
    },
}


def golden(z):
    reg = z.hp('reg_T', 'reg_alpha', 'reg_multiplier', 'correct_prob')
    for suffix, variant in (('', 'code'), ('_regpaper', 'paper')):
        yield case(z, TfKDReg(*reg.values(), variant), 'out_s', 'target', suffix=suffix)
    yield case(z, TfKDSelf(**z.hp('T', 'alpha', 'multiplier')), 'out_s', 'out_t', 'target', suffix='_self')
