"""How nst.npz feeds kd_losses/nst.py."""

from kd_losses.nst import NST
from tests.methods.shared import case


def golden(z):
    yield case(z, NST(), 'fm_s', 'fm_t')
    yield case(z, NST('linear'), 'fm_s', 'fm_t', suffix='_linear')
    yield case(z, NST('gaussian'), 'fm_s', 'fm_t', suffix='_gaussian')
    yield case(z, NST('poly', d=2, c=0.5), 'fm_s', 'fm_t', suffix='_poly_c05')
