"""How rkd.npz feeds kd_losses/rkd.py."""

from kd_losses.rkd import RKD
from tests.methods.shared import case

exceptions = {'of_triples': 'angles are of all triples; test_properties.py bounds the parts'}


def golden(z):
    loss = RKD(**z.hp('w_dist', 'w_angle'))
    yield case(z, loss, 'feat_s', 'feat_t')
    yield case(z, loss, 'feat_s', 'feat_t', suffix='_dist', call=loss.distance)
    yield case(z, loss, 'feat_s', 'feat_t', suffix='_angle', call=loss.angle)
