"""How cd.npz feeds kd_losses/cd.py."""

from kd_losses.cd import CD, GKD
from tests.methods.shared import case, parameters


def golden(z):
    loss = CD(z.shape('in_fm_s')[1], z.shape('in_fm_t')[1])
    roles = {
        'conv_weight': 'connector.0.weight',
        'bn_weight': 'connector.1.weight',
        'bn_bias': 'connector.1.bias',
    }
    yield case(z, loss, 'fm_s', 'fm_t', more=parameters(z, loss, roles))
    guided = case(z, GKD(**z.hp('T')), 'out_s', 'out_t', 'target', suffix='_gkd')
    guided.grads = {'grad_out_s': guided.inputs['out_s']}
    yield guided
