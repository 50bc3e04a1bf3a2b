"""How soka.npz feeds ka_losses/soka.py, and how it is called on random tensors."""

import torch

from ka_losses.soka import GradNorm, SOKAFeature
from tests.methods.shared import listed, many, parameters

cases = {
    'soka': """
loss = m.SOKAFeature(2, (4, 1, 1))
inputs = {'fm_s': S(n, 4, 3, 5), 'fms_t': [T(n, 4, 3, 5), T(n, 4, 3, 5)]}
""",
}


def golden(z):
    levels = {}
    for level in ('fea', 'rep'):
        teachers = many(z, f'{level}_t_')
        loss = SOKAFeature(len(teachers), z.shape(f'param_{level}_weight')[1:])
        more = parameters(z, loss, {f'{level}_weight': 'weight'})
        levels[level] = loss, teachers
        yield listed(
            z,
            loss,
            lambda x, a=loss, s=f'{level}_s', ts=teachers: a(x[s], [x[t] for t in ts]),
            [f'{level}_s', *teachers],
            key=f'loss_{level}',
            more=more,
        )
    both = listed(
        z,
        None,
        lambda x: sum(a(x[f'{n}_s'], [x[t] for t in ts]) for n, (a, ts) in levels.items()),
        [name for n, (_, ts) in levels.items() for name in (f'{n}_s', *ts)],
    )
    both.grads = {}
    yield both

    norm = GradNorm(len(z.arrays['in_gn_weights']), z.hp('gn_alpha')['gn_alpha']).double()
    with torch.no_grad():
        norm.weights.copy_(z.input('gn_weights'))
        norm.init_losses.copy_(z.input('gn_init_loss'))
    value = norm.balance(z.input('gn_task_loss'), z.input('gn_grad_norm'))
    z.compare('loss_gradnorm', value)
    value.backward()
    z.compare('grad_gn_weights', norm.weights.grad)
    torch.optim.SGD(norm.parameters(), z.hp('gn_lr')['gn_lr']).step()
    norm.renormalise()
    z.compare('out_gn_weights', norm.weights)
