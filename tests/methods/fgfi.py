"""How fgfi.npz feeds kd_losses/fgfi.py, and how it is called on random tensors."""

import torch

from kd_losses.fgfi import FGFI, imitation_mask
from tests.methods.shared import case, parameters

MASK = '(torch.arange(n * 15).reshape(n, 5, 3) % 3 != 1)'
cases = {
    'fgfi': f"""
loss = m.FGFI(4, 6)
inputs = {{'fm_s': S(n, 4, 5, 3), 'fm_t': T(n, 6, 5, 3), 'mask': {MASK}}}
""",
    'fgfi_pyramid': f"""
loss = m.FGFI(4, 6, relu=False)
inputs = {{'fm_s': S(n, 4, 5, 3), 'fm_t': T(n, 6, 5, 3), 'mask': {MASK}[:, None].float()}}
""",
}
exceptions = {'layers': 'the adapter'}


def golden(z):
    anchors = z.input('anchors').detach()
    boxes = z.input('boxes').detach().split(z.input('counts').tolist())
    mask = torch.stack([imitation_mask(anchors, box) for box in boxes])
    z.compare('out_mask', mask.double())
    loss = FGFI(z.shape('in_fm_s')[1], z.shape('in_fm_t')[1])
    more = parameters(z, loss, {'conv_w': 'adapter.0.weight', 'conv_b': 'adapter.0.bias'})
    yield case(z, loss, 'fm_s', 'fm_t', call=lambda **x: loss(**x, mask=mask), more=more)
