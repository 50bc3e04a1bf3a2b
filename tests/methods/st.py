"""How st.npz feeds kd_losses/st.py."""

from kd_losses.st import SoftTarget
from tests.methods.shared import case

exceptions = {
    'masked_class': 'the divergence is weighed by probabilities, a class of probability 0 counts nothing',
}


def golden(z):
    yield case(z, SoftTarget(**z.hp('T')), 'out_s', 'out_t')
