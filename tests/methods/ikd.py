"""How ikd.npz feeds kd_losses/ikd.py."""

from kd_losses.ikd import IKD
from tests.methods.shared import case, fill


def golden(z):
    loss = IKD(z.shape('in_fm_s')[1], z.shape('in_fm_t')[1])
    if loss.projection is None:  # equal channels
        yield case(z, loss, 'fm_s', 'fm_t')
        return
    fill(loss, {'projection.weight': z.param('proj_weight')[:, :, None, None]})
    yield case(z, loss, 'fm_s', 'fm_t')
    z.compare('gradparam_proj_weight', loss.projection.weight.grad[:, :, 0, 0])
