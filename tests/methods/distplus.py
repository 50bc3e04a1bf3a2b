"""How distplus.npz feeds kd_losses/distplus.py."""

import torch

from kd_losses.distplus import DISTPlus
from tests.methods.shared import case

exceptions = {
    'layers': 'the adapter',
}
alone = """
loss = m.DISTPlus()
inputs = {'out_s': S(n, 7), 'fm_s': S(n, 4, 6, 3), 'out_t': T(n, 7), 'fm_t': T(n, 4, 6, 3)}
"""


def golden(z):
    hp = z.hp('beta', 'gamma', 'iota', 'kappa', 'tau')
    loss, within = DISTPlus(**hp), DISTPlus(**hp, spatial='within')
    names = ('out_s', 'fm_s', 'out_t', 'fm_t')
    yield case(z, loss, *names)
    for i, term in enumerate(('dist', 'channel', 'spatial')):
        yield case(z, loss, *names, suffix=f'_{term}', call=lambda i=i, **x: loss.terms(**x)[i])
    yield case(z, within, *names, suffix='_within')
    yield case(z, within, *names, suffix='_spatial_within', call=lambda **x: within.terms(**x)[2])

    def torchdistill(**x):
        """Its channel term has the other sign."""
        dist, channel, spatial = loss.terms(**x)
        return dist + hp['iota'] * (1 - channel) + hp['kappa'] * spatial

    for key in ('loss_torchdistill', 'grad_fm_s_torchdistill'):
        z.loosen(key, 1e-6)  # it clamps norms where here 1e-8 is added to their product
    yield case(z, loss, *names, suffix='_torchdistill', call=torchdistill)
    dead = torch.zeros(3, 4, 2, 2, requires_grad=True)
    loss(torch.randn(3, 5), dead, torch.randn(3, 5), torch.rand(3, 4, 2, 2)).backward()
    assert not dead.grad.any()
