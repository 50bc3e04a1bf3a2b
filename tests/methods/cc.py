"""How cc.npz feeds kd_losses/cc.py."""

from kd_losses.cc import CC
from tests.methods.shared import case


def golden(z):
    yield case(z, CC(**z.hp('gamma', 'P_order')), 'feat_s', 'feat_t')
    for kernel in ('rbf_taylor', 'rbf', 'bilinear', 'mmd'):
        yield case(z, CC(**z.hp('gamma', 'P_order'), kernel=kernel), 'feat_s', 'feat_t', suffix=f'_{kernel}')
