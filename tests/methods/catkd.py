"""How catkd.npz feeds kd_losses/catkd.py."""

from kd_losses.catkd import CATKD
from tests.methods.shared import case

exceptions = {
    'one_logit': 'maps of a class each',
}


def golden(z):
    yield case(z, CATKD(**z.hp('resolution')), 'cam_s', 'cam_t')
    yield case(z, CATKD(**z.hp('resolution'), normalize=False), 'cam_s', 'cam_t', suffix='_raw')
