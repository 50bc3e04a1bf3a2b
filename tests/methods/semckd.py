"""How semckd.npz feeds kd_losses/semckd.py."""

from kd_losses.semckd import SemCKD
from tests.methods.shared import case, parameters

exceptions = {
    'no_batch_of_one': ('its attention is over the samples, factor of them at least', 'at least factor'),
    'layers': 'query and key',
}
alone = """
loss = m.SemCKD([4, 8], [4, 8], n)
inputs = {'fms_s': [S(n, 4, 6, 6), S(n, 8, 3, 3)], 'fms_t': [T(n, 4, 6, 6), T(n, 8, 3, 3)]}
"""


def golden(z):
    hp = z.hp('batch_size', 'factor', 'n_s', 'n_t')
    S, T = range(hp['n_s']), range(hp['n_t'])
    channels = [z.shape(f'in_fm_s_{i}')[1] for i in S], [z.shape(f'in_fm_t_{j}')[1] for j in T]
    loss = SemCKD(*channels, hp['batch_size'], hp['factor'])
    parts = [('query', i) for i in S] + [('key', j) for j in T]
    roles = {
        f'{name}{i}_{layer}_{short}': f'{name}.{i}.{layer}.{kind}'
        for name, i in parts
        for layer in ('fc1', 'fc2')
        for short, kind in (('w', 'weight'), ('b', 'bias'))
    }
    layers = {'conv1_w': '0.weight', 'bn1_w': '1.weight', 'bn1_b': '1.bias', 'conv2_w': '3.weight'}
    layers |= {'bn2_w': '4.weight', 'bn2_b': '4.bias', 'conv3_w': '6.weight'}
    roles |= {
        f'reg_{i}_{j}_{role}': f'regressor.{i}.{j}.{path}'
        for i in S
        for j in T
        for role, path in layers.items()
    }
    names = [f'fm_s_{i}' for i in S] + [f'fm_t_{j}' for j in T]

    def lists(x):
        return [x[f'fm_s_{i}'] for i in S], [x[f'fm_t_{j}'] for j in T]

    more = parameters(z, loss, roles)
    both = case(z, loss, *names, more=more, call=lambda **x: loss(*lists(x)))
    both.grads = {key: x for key, x in both.grads.items() if '_t_' not in key}
    yield both
    w, m = loss.terms(*lists({name: z.input(name) for name in names}))
    z.compare('out_attention', w)
    z.compare('out_mse', m)
