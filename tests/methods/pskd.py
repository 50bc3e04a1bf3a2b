"""How pskd.npz feeds kd_losses/pskd.py."""

from kd_losses.pskd import pskd_loss
from tests.methods.shared import case


def golden(z):
    alpha = z.hp('alpha')['alpha']
    yield case(z, None, 'out', 'prev_prob', 'target', call=lambda **x: pskd_loss(**x, alpha=alpha))
