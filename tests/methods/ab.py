"""How ab.npz feeds kd_losses/ab.py."""

from kd_losses.ab import AB
from tests.methods.shared import case, parameters


def golden(z):
    yield case(z, AB(**z.hp('margin')), 'fm_s', 'fm_t')
    yield case(z, AB(**z.hp('margin'), reduction='batchmean'), 'fm_s', 'fm_t', suffix='_batchmean')
    loss = AB(z.shape('in_fm_s_conn')[1], z.shape('in_fm_t')[1], **z.hp('margin'))
    roles = {
        'conv_weight': 'connector.0.weight',
        'bn_weight': 'connector.1.weight',
        'bn_bias': 'connector.1.bias',
    }
    more = parameters(z, loss, roles)
    yield case(z, loss, 'fm_s', 'fm_t', suffix='_conn', rename={'fm_s': 'fm_s_conn'}, more=more)
