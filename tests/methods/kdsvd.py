"""How kdsvd.npz feeds kd_losses/kdsvd.py."""

import torch

from kd_losses.kdsvd import KDSVD
from tests.methods.shared import case

exceptions = {
    'equal_channels': 'singular vectors live in channel space',
}


def golden(z):
    levels = range(z.hp('levels')['levels'])
    loss = KDSVD(**z.hp('k'))
    names = [f'fm_{side}_{i}' for side in 'st' for i in levels]

    def lists(x):
        return [[x[f'fm_{side}_{i}'] for i in levels] for side in 'st']

    z.loosen('grad_', 1e-6)  # its page: the gradients pass through gaps between eigenvalues
    yield case(z, loss, *names, call=lambda **x: loss(*lists(x)))
    terms = loss.terms(*lists({name: z.input(name) for name in names}))
    z.compare('loss_terms', torch.stack(terms))
