"""How vid.npz feeds kd_losses/vid.py."""

import torch

from kd_losses.vid import VID
from tests.methods.shared import case, parameters


def golden(z):
    loss = VID(z.shape('in_fm_s')[1], z.shape('in_fm_t')[1], **z.hp('mid_channels', 'eps', 'init_var'))
    # the constructor works in float32, the vector in float64
    torch.testing.assert_close(
        loss.alpha.detach().double(), torch.from_numpy(z.arrays['out_alpha_init']), rtol=1e-6, atol=0
    )
    z.open.discard('out_alpha_init')
    roles = {
        'conv1_w': 'regressor.0.weight',
        'conv2_w': 'regressor.2.weight',
        'conv3_w': 'regressor.4.weight',
    }
    roles['alpha'] = 'alpha'
    more = parameters(z, loss, roles)
    yield case(z, loss, 'fm_s', 'fm_t', more=more)
