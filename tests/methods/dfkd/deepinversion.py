"""How deepinversion.npz feeds dfkd_losses/deepinversion.py, and how it is called on random tensors."""

import torch

from dfkd_losses.deepinversion import (
    DeepInversion,
    bn_statistics_loss,
    js_divergence,
    l2_norm,
    tv_l1,
    tv_l2,
)
from tests.methods.shared import Case, many

cases = {
    'deepinversion': """
loss = m.DeepInversion(tv_l1=1.0, l2=1.0, compete=1.0)
inputs = {'x': S(n, 3, 6, 5), 'out_t': S(n, K), 'target': torch.arange(n) % K, 'bn_loss': S(),
          'out_s': S(n, K)}
""",
    'deepinversion_exact': """
loss = m.DeepInversion(tv_l2=0.0, compete=1.0, exact=True)
inputs = {'x': S(n, 3, 6, 5), 'out_t': S(n, K), 'target': torch.arange(n) % K, 'bn_loss': S(),
          'out_s': S(n, K)}
""",
    'deepinversion_statistics': """
loss = torch.nn.Identity()
call = m.bn_statistics_loss
inputs = {'bn_inputs': [S(n, 4, 5, 3), S(n, 6, 2, 2)], 'means': [C(4), C(6)], 'variances': [C(4), C(6)]}
""",
    'deepinversion_js': """
loss = torch.nn.Identity()
call = m.js_divergence
inputs = {'out_s': S(n, K), 'out_t': S(n, K)}
""",
}


exceptions = {
    'any_size': {name: 'maps may have any size' for name in ('x', 'bn_inputs')},
}


def golden(z):
    for name, term in (('tv_l1', tv_l1), ('tv_l2', tv_l2), ('l2', l2_norm)):
        x = z.input('x')
        yield Case(lambda x, term=term: term(x), {'x': x}, f'loss_{name}', {f'grad_x_{name}': x})
    x = z.input('x')  # the authors' CIFAR code measures the whole batch: ours is one image of it
    whole = Case(lambda x: l2_norm(x.reshape(1, -1)), {'x': x}, 'loss_l2_cifar', {'grad_x_l2_cifar': x})
    yield whole
    names = many(z, 'bn_x')
    inputs = {name: z.input(name) for name in names}
    kept = [[z.input(f'bn_{kind}{k}').detach() for k in range(len(names))] for kind in ('mean', 'var')]
    grads = {f'grad_{name}': x for name, x in inputs.items()}
    yield Case(lambda **x: bn_statistics_loss([*x.values()], *kept), inputs, 'loss_bn', grads)
    first = z.hp('first_bn_multiplier')['first_bn_multiplier']
    bn = bn_statistics_loss([*inputs.values()], *kept, first)
    z.compare('loss_bn_first', bn)
    out_s, out_t = z.input('out_s'), z.input('out_t')
    grads = {'grad_out_s_js': out_s, 'grad_out_t_js': out_t}
    T = z.hp('T')['T']
    value = js_divergence(out_s, out_t, T)
    z.compare('loss_js', value)
    value.backward()
    for key, tensor in grads.items():
        z.compare(key, tensor.grad)
    names = ('ce', 'tv_l1', 'tv_l2', 'l2', 'bn', 'compete', 'first_bn_multiplier', 'T')
    loss = DeepInversion(**z.hp(*names))
    x, out_s, out_t = z.input('x'), z.input('out_s'), z.input('out_t')
    args = x, out_t, z.input('target'), bn.detach(), out_s
    value, terms = loss(*args), loss.terms(*args)
    for name in ('ce', 'compete', 'tv_l1', 'tv_l2', 'l2'):
        z.compare(f'loss_{name}', terms[name])
    z.compare('loss', value)
    value.backward()
    for name, tensor in (('x', x), ('out_s', out_s), ('out_t', out_t)):
        z.compare(f'grad_{name}', torch.zeros_like(tensor) if tensor.grad is None else tensor.grad)


def one_logit(inputs):
    return inputs | {name: inputs[name][:, :1] for name in ('out_s', 'out_t')}
