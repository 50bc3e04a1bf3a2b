"""How afd.npz feeds kd_losses/afd.py."""

from kd_losses.afd import AFD
from tests.methods.shared import case, parameters

exceptions = {
    'equal_channels': 'channels are matched one to one',
}


def golden(z):
    channels = z.shape('in_fm_t')[1]
    loss = AFD(channels, channels, **z.hp('att_f'))
    roles = {
        'conv1_w': 'attention.0.weight',
        'conv1_b': 'attention.0.bias',
        'conv2_w': 'attention.2.weight',
        'conv2_b': 'attention.2.bias',
    }
    more = parameters(z, loss, roles)
    yield case(z, loss, 'fm_s', 'fm_t', more=more)
    z.compare('out_rho', loss.attention_of(z.input('fm_t')))
