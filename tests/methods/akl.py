"""How akl.npz feeds kd_losses/akl.py."""

from kd_losses.akl import AKL
from tests.methods.shared import case


def golden(z):
    loss = AKL(**z.hp('mu'))
    args = ('out_s', 'out_t', 'target')
    yield case(z, loss, *args)
    for term, name in zip(loss.terms(*(z.input(name) for name in args)), ('head', 'tail')):
        z.compare(f'loss_{name}', term)
    z.compare('out_head_ratio', loss.head_ratio(z.input('out_s'), z.input('out_t')))
