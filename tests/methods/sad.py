"""How sad.npz feeds kd_losses/sad.py."""

from kd_losses.sad import SAD
from tests.methods.shared import case

exceptions = {
    'gradient_not_of_value': 'the deeper map is a constant for the earlier one',
}


def golden(z):
    one = case(z, SAD(**z.hp('T')), 'fm', 'fm_next')
    yield one
    assert one.inputs['fm_next'].grad is None, 'a gradient in the deeper map'
