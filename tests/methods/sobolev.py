"""How sobolev.npz feeds kd_losses/sobolev.py."""

import torch

from kd_losses.sobolev import Sobolev, input_gradient
from tests.methods.shared import Case, tiny_grads, tiny_pair

exceptions = {
    'not_compiled': 'it differentiates inside the forward pass',
    'coarse': 'the network',
    'one_logit': 'the gradient of a logit',
    'layers': 'the network',
    'no_meta': 'differentiates what a network prepared',
    'own_order': 'its page fixes the order of the arguments',
}
alone = """
loss = m.Sobolev()
img = T(n, 3, 8, 8).requires_grad_()
out = (img.flatten(1) @ S(3 * 64, 7)).tanh()
inputs = {'out_s': out, 'out_t': out.square(), 'img': img, 'target': torch.arange(n)}
"""


def golden(z):
    img, p_s, (_, out_s), (_, out_t) = tiny_pair(z)
    target = z.input('target')
    z.compare('out_logits_s', out_s)
    z.compare('out_logits_t', out_t)
    z.compare('out_jac_s', input_gradient(out_s, img, target))
    jac_t = input_gradient(out_t, img, target)
    z.compare('out_jac_t', jac_t)
    loss = Sobolev()
    value = loss(out_s, out_t, img, target)
    assert torch.equal(value, loss(out_s, None, img, target, jac_t))
    yield Case(lambda: value, {}, 'loss', tiny_grads(p_s))
