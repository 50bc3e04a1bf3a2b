"""How tdd.npz feeds kd_losses/tdd.py."""

import torch

from kd_losses.tdd import TDD
from tests.methods.shared import Case

exceptions = {
    'layers': 'the classifiers of groups',
}
alone = """
loss = m.TDD([[0, 0, 1, 1], [0, 1, 2, 3]], [4, 8])
inputs = {'fms_s': [S(n, 4, 6, 6), S(n, 8, 3, 3)], 'target': torch.arange(n) % 4}
"""


def golden(z):
    levels = range(len([key for key in z.arrays if key.startswith('hp_class_to_group')]))
    groups = [torch.as_tensor(z.arrays[f'hp_class_to_group{i}']) for i in levels]
    loss = TDD(groups, [z.shape(f'in_fm_s{i}')[1] for i in levels]).double()
    target = z.input('target')
    with torch.no_grad():
        for i in levels:
            for x in ('weight', 'bias'):
                value = z.param(f'fc{i}_{x}')
                loss.get_parameter(f'classifiers.{i}.{x}')[: len(value)] = value
    maps = {f'fm_s{i}': z.input(f'fm_s{i}') for i in levels}
    yield Case(
        lambda **x: loss(list(x.values()), target), maps, 'loss', {f'grad_{k}': v for k, v in maps.items()}
    )
    for i, value in enumerate(loss.levels(list(maps.values()), target)):
        z.compare(f'loss_layer{i}', value)
        for x in ('weight', 'bias'):
            grad = loss.get_parameter(f'classifiers.{i}.{x}').grad
            count = len(z.arrays[f'param_fc{i}_{x}'])
            z.compare(f'gradparam_fc{i}_{x}', grad[:count])
            assert not grad[count:].any(), 'a group that does not exist learns'
