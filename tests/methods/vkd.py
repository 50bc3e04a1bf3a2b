"""How vkd.npz feeds kd_losses/vkd.py."""

import torch

from kd_losses.vkd import VkD
from tests.methods.shared import case

exceptions = {
    'no_pickle': 'torch does not pickle parametrised modules; copies and state_dict work',
    'layers': 'the projection',
}


def golden(z):
    loss = VkD(z.shape('in_feat_s')[1], z.shape('in_feat_t')[1]).double()
    with torch.no_grad():
        loss.projection.weight = z.param('weight')
    yield case(z, loss, 'feat_s', 'feat_t')
