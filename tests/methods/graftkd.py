"""How graftkd.npz feeds kd_losses/graftkd.py."""

from kd_losses.graftkd import GraftKD
from tests.methods.shared import case


def golden(z):
    yield case(z, GraftKD(), 'out_s', 'out_t')
    loss = GraftKD(norm_loss=False)
    yield case(z, loss, 'out_s', 'out_t', suffix='_mse', call=loss.forward)
