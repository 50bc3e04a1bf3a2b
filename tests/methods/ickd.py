"""How ickd.npz feeds kd_losses/ickd.py."""

from kd_losses.ickd import ICKD
from tests.methods.shared import case, parameters


def golden(z):
    loss = ICKD(z.shape('in_fm_s')[1], z.shape('in_fm_t')[1])
    roles = {'conv_w': 'embed_s.0.weight', 'bn_w': 'embed_s.1.weight', 'bn_b': 'embed_s.1.bias'}
    yield case(z, loss, 'fm_s', 'fm_t', more=parameters(z, loss, roles))
