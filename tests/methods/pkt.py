"""How pkt.npz feeds kd_losses/pkt.py."""

from kd_losses.pkt import PKT
from tests.methods.shared import case


def golden(z):
    yield case(z, PKT(**z.hp('eps')), 'feat_s', 'feat_t')
    yield case(z, PKT(eps=1e-6), 'feat_s', 'feat_t', suffix='_eps1em6')
