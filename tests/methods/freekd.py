"""How freekd.npz feeds kd_losses/freekd.py, and how it is called on random tensors."""

import torch

from kd_losses.freekd import FreeKD, haar, inverse
from tests.methods.shared import case, fill

cases = {
    'freekd': """
loss = m.FreeKD(4, 5, tokens=3, levels=2)
inputs = {'fm_s': S(n, 4, 5, 3), 'fm_t': T(n, 5, 5, 3)}
""",
    'freekd_equal': """
loss = m.FreeKD(None, 5, tokens=1)
inputs = {'fm_s': S(n, 5, 4, 3), 'fm_t': T(n, 5, 4, 3)}
""",
}
rows = {'freekd': {'layers': 'align'}, 'freekd_equal': {}}


def golden(z):
    loss = FreeKD(None, z.shape('in_fm_t')[1], **z.hp('tokens'), levels=z.shape('param_token')[0] - 1)
    token = fill(loss, {'token': z.param('token')})['token']
    yield case(z, loss, 'fm_s', 'fm_t')
    fm_t = z.input('fm_t').detach()
    low, highs = haar(fm_t, loss.levels)
    z.compare('out_low', low)
    for j, high in enumerate(highs, 1):
        z.compare(f'out_high_{j}', high)
    low, highs, dice = loss.masked_bands(fm_t)
    masked = inverse(low, highs)  # the vector's is not cut to the size of the map
    z.compare('out_masked', masked)
    assert torch.equal(loss.learn(fm_t)[0], masked[..., : fm_t.shape[2], : fm_t.shape[3]])
    z.compare('loss_dice', dice)
    ((masked * z.input('probe').detach()).sum() + dice).backward()
    z.compare('gradparam_token', token.grad)
