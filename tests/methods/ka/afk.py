"""How afk.npz feeds ka_losses/afk.py, and how it is called on random tensors."""

import torch

from ka_losses.afk import AFK, Filter
from tests.methods.shared import fill, listed, many

exceptions = {'one_logit': 'several yes-or-no attributes, no softmax'}
cases = {
    'afk': """
loss = m.AFK()
inputs = {'outs_s': [S(n, 3), S(n, 4)], 'outs_t': [T(n, 3), T(n, 4)]}
""",
}


def golden(z):
    students, teachers = many(z, 'out_s_'), many(z, 'out_t_')
    values = [[z.input(n) for n in names] for names in (students, teachers)]
    _, terms = AFK()(*values, return_terms=True)
    z.compare('loss_each', torch.stack(list(terms.values())))
    mid = z.input('filter_mid')
    gate = Filter(mid.shape[1], z.shape('param_filter_w2')[0], min_hidden=z.shape('param_filter_w1')[0])
    fill(gate, {'w1.weight': z.param('filter_w1'), 'w2.weight': z.param('filter_w2')})
    residual, branch = z.input('filter_residual').detach(), z.input('filter_branch').detach()
    out = torch.relu(branch + residual * gate(mid))
    z.compare('out_filter', out)
    (out * z.input('filter_cotangent').detach()).sum().backward()
    z.compare('grad_filter_mid', mid.grad)
    yield listed(
        z, None, lambda x: AFK()([x[n] for n in students], [x[n] for n in teachers]), [*students, *teachers]
    )
