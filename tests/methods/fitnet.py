"""How fitnet.npz feeds kd_losses/fitnet.py."""

from kd_losses.fitnet import FitNet
from tests.methods.shared import case, parameters


def golden(z):
    yield case(z, FitNet(), 'fm_s', 'fm_t')
    loss = FitNet(z.shape('in_fm_s_reg')[1], z.shape('in_fm_t')[1])
    roles = {
        'conv_weight': 'regressor.0.weight',
        'conv_bias': 'regressor.0.bias',
        'bn_weight': 'regressor.1.weight',
        'bn_bias': 'regressor.1.bias',
    }
    more = parameters(z, loss, roles)
    yield case(z, loss, 'fm_s', 'fm_t', suffix='_reg', rename={'fm_s': 'fm_s_reg'}, more=more)
