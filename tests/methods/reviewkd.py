"""How reviewkd.npz feeds kd_losses/reviewkd.py."""

import torch

from kd_losses.reviewkd import HCL, ReviewKD
from tests.methods.shared import case, parameters

exceptions = {
    'no_batch_of_one': ('batch norm of the pooled level needs two samples', 'more than 1 value'),
}
alone = """
loss = m.ReviewKD([4, 8], [4, 8])
inputs = {'fms_s': [S(n, 4, 6, 6), S(n, 8, 3, 3)], 'fms_t': [T(n, 4, 6, 6), T(n, 8, 3, 3)]}
"""


def golden(z):
    levels = range(z.hp('levels')['levels'])
    channels = [[z.shape(f'in_fm_{side}_{i}')[1] for i in levels] for side in 'st']
    loss = ReviewKD(*channels, **z.hp('mid_channels'))
    paths = {
        'conv1_w': 'conv1.0.weight',
        'bn1_w': 'conv1.1.weight',
        'bn1_b': 'conv1.1.bias',
        'conv2_w': 'conv2.0.weight',
        'bn2_w': 'conv2.1.weight',
        'bn2_b': 'conv2.1.bias',
        'att_w': 'att_conv.0.weight',
        'att_b': 'att_conv.0.bias',
    }
    roles = {
        f'{i}_{role}': f'abfs.{i}.{path}'
        for i in levels
        for role, path in paths.items()
        if f'param_{i}_{role}' in z
    }
    names = [f'fm_{side}_{i}' for side in 'st' for i in levels]

    def lists(x):
        return [[x[f'fm_{side}_{i}'] for i in levels] for side in 'st']

    yield case(z, loss, *names, more=parameters(z, loss, roles), call=lambda **x: loss(*lists(x)))
    x = lists({name: z.input(name) for name in names})
    z.compare('loss_terms', torch.stack(loss.terms(*x)))
    for i, out in enumerate(loss.fuse(*x)):
        z.compare(f'out_abf_{i}', out)
    alone = case(z, HCL(), 'fm_s', 'fm_t', suffix='_hcl', rename={'fm_s': 'hcl_fm_s', 'fm_t': 'hcl_fm_t'})
    alone.grads = {'grad_hcl_fm_s': alone.inputs['fm_s']}
    yield alone
