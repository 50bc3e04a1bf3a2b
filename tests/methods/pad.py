"""How pad.npz feeds kd_losses/pad.py."""

from kd_losses.pad import PAD
from tests.methods.shared import case, parameters

exceptions = {
    'layers': 'variance and connector',
}


def golden(z):
    loss = PAD(z.shape('in_feat_s')[1], z.shape('in_feat_t')[1], **z.hp('eps'))
    roles = {
        'var_weight': 'variance.weight',
        'var_bias': 'variance.bias',
        'var_bn_weight': 'norm.weight',
        'var_bn_bias': 'norm.bias',
    }
    yield case(z, loss, 'feat_s', 'feat_t', more=parameters(z, loss, roles))
