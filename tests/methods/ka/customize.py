"""How customize.npz feeds ka_losses/customize.py, and how it is called on random tensors."""

import torch

from ka_losses.customize import Customize, entropies, select_teacher
from tests.methods.shared import fill, listed, many, parameters, terms_of

exceptions = {'one_logit': 'squared errors of logits'}
cases = {
    'customize': """
loss = m.Customize([4, 6], [5, 8], [2, 4])
inputs = {'fms_s': [S(n, 4, 4, 5), S(n, 6, 2, 3)], 'fms_t': [T(n, 5, 4, 5), T(n, 8, 2, 3)],
          'out_s': S(n, K), 'out_t': T(n, K)}
""",
    'customize_target': """
loss = m.Customize([4, 6], None, [5, 8], scale_logits=False)
inputs = {'fms_s': [S(n, 4, 4, 5), S(n, 6, 2, 3)], 'fms_t': [T(n, 5, 4, 5), T(n, 8, 2, 3)],
          'out_s': S(n, K), 'out_t': T(n, K)}
""",
}


def golden(z):
    students, teachers = many(z, 'fm_s_'), many(z, 'fm_t_')
    h = [z.shape(f'param_s_conv{i}_weight')[0] for i in range(len(students))]
    loss = Customize([z.shape(f'in_{n}')[1] for n in students], [z.shape(f'in_{n}')[1] for n in teachers], h)
    roles = {'s_m': 'm'} | {
        f'{side}_conv{i}_{kind}': f'bridge_{side}.{i}.{kind}'
        for side in 'st'
        for i in range(len(h))
        for kind in ('weight', 'bias')
    }
    more = parameters(z, loss, roles)
    names = [*students, *teachers, 'out_s', 'out_t']

    def call(x, **options):
        return loss([x[n] for n in students], [x[n] for n in teachers], x['out_s'], x['out_t'], **options)

    terms_of(z, loss, call, names, {'feat': '', 'soft': 'loss_soft', 'wn': 'loss_wn'})
    levels, penalties = [], []
    for i in range(len(h)):
        part = Customize([loss.s_channels[i]], [loss.t_channels[i]], [h[i]])
        values = {
            f'bridge_{side}.0.{kind}': z.param(f'{side}_conv{i}_{kind}')
            for side in 'st'
            for kind in ('weight', 'bias')
        }
        fill(part, values)
        x = [[z.input(students[i])], [z.input(teachers[i])], z.input('out_s'), z.input('out_t')]
        _, terms = part(*x, return_terms=True)
        levels.append(terms['feat'])
        penalties.append(terms['wn'])
    z.compare('loss_feat', torch.stack(levels))
    z.compare('loss_wn_each', torch.stack(penalties))
    sources = [z.input(name) for name in many(z, 'sel_out_t_')]
    z.compare('out_entropy', entropies(sources))
    z.compare('out_select', select_teacher(sources).double())
    yield listed(z, loss, call, names, more=more)
