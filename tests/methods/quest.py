"""How quest.npz feeds kd_losses/quest.py."""

import torch

from kd_losses.quest import QuEST
from tests.methods.shared import case, fill

options = {'num_words': 5}
alone = 'loss, inputs = m.QuEST(3, 4, centroids=C(5, 4)), dict(fm_s=S(n, 3, 4, 4), fm_t=T(n, 4, 4, 4))'


def before(kd, t, dtype):
    """A vocabulary."""
    words = torch.randn(5, *t.pres[-1].shape[1:], dtype=dtype)
    kd.fit(words, generator=torch.Generator().manual_seed(0))


def golden(z):
    words = z.param('centroids')
    hp = z.hp('tau', 'scale_init')
    loss = QuEST(z.shape('in_fm_s')[1], words.shape[1], len(words), hp['tau'], hp['scale_init'], words)
    fill(loss, {'weight': z.param('weight')[:, :, 0, 0], 'scale': z.param('scale')})
    yield case(z, loss, 'fm_s', 'fm_t')
    z.compare('gradparam_weight', loss.weight.grad[:, :, None, None])
    z.compare('gradparam_scale', loss.scale.grad)
