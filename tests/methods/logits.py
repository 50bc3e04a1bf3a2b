"""How logits.npz feeds kd_losses/logits.py."""

from kd_losses.logits import Logits
from tests.methods.shared import case

exceptions = {
    'one_logit': 'squared errors of logits',
}


def golden(z):
    yield case(z, Logits(), 'out_s', 'out_t')
