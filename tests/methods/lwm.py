"""How lwm.npz feeds kd_losses/lwm.py."""

import torch.nn.functional as F

from kd_losses.lwm import LwM, grad_cam
from tests.methods.shared import Case, tiny_grads, tiny_pair

exceptions = {
    'not_compiled': 'it differentiates inside the forward pass',
    'coarse': 'the last layer',
    'one_logit': 'the gradient of a logit',
    'layers': 'the last layer',
    'no_meta': 'differentiates what a network prepared',
    'own_order': 'its page fixes the order of the arguments',
}
alone = """
loss = m.LwM()
fm_s, fm_t = S(n, 4, 6, 3), T(n, 6, 6, 3).requires_grad_()  # nodes of the graphs that gave the logits
inputs = {'out_s': fm_s.tanh().mean(dim=(2, 3)) @ T(4, 7), 'fm_s': fm_s,
          'out_t': fm_t.mean(dim=(2, 3)) @ T(6, 7), 'fm_t': fm_t, 'target': torch.arange(n)}
"""


def golden(z):
    img, p_s, (fm_s, out_s), (fm_t, out_t) = tiny_pair(z)
    target = z.input('target')
    for key, value in (('fm_s', fm_s), ('fm_t', fm_t), ('logits_s', out_s), ('logits_t', out_t)):
        z.compare(f'out_{key}', value)
    for side, fm, out in (('s', fm_s, out_s), ('t', fm_t, out_t)):
        cam = grad_cam(out, fm, target, side=side).flatten(1)
        z.compare(f'out_cam_{side}', F.normalize(cam, dim=1))
    value = LwM('sum')(out_s, fm_s, out_t, fm_t, target)
    z.compare('loss_sum', value)
    z.open.discard('loss_zoo_wrong_cam')  # the number of a bug of Knowledge-Distillation-Zoo
    value = LwM()(out_s, fm_s, out_t, fm_t, target)
    assert abs(value.item() / z.arrays['loss_zoo_wrong_cam'].item() - 1) > 1e-6
    yield Case(lambda: value, {}, 'loss', tiny_grads(p_s))
