"""How scalekd.npz feeds kd_losses/scalekd.py."""

import pytest
import torch

from kd_losses.scalekd import ScaleKD
from tests.methods.shared import Case, parameters

exceptions = {
    'layers': 'projectors',
}
alone = """
loss = m.ScaleKD(4, 8, (3, 2), (6, 5))
inputs = {'fm_s': S(n, 4, 6, 5), 'fm_t': T(n, 8, 3, 2)}
"""
LAYERS = {
    'student': 'student.0',
    'bn': 'student.1',
    'query': 'query_proj',
    'ln': 'norm',
    **{name: name for name in ('q', 'k', 'v', 'out', 'ffn1', 'ffn2')},
}


def golden(z):
    hp = {key.removeprefix('hp_'): x.item() for key, x in z.arrays.items() if key.startswith('hp_')}
    loss = ScaleKD(
        z.shape('in_fm_s')[1],
        z.shape('in_fm_t')[1],
        (hp['query_h'], hp['query_w']),
        z.shape('in_fm_s')[2:],
        hp['num_heads'],
        (hp['alpha_spatial'], hp['alpha_frequency']),
        (hp['scale_spatial'], hp['scale_frequency']),
        bool(hp['self_query']),
    )
    roles = {}
    for p in ('spatial', 'frequency'):
        roles[f'{p}_pos_embed'] = f'{p}_projector.pos_embed'
        for role, path in LAYERS.items():
            roles |= {f'{p}_{role}_{x[0]}': f'{p}_projector.{path}.{x}' for x in ('weight', 'bias')}
        if hp['self_query']:
            roles[f'{p}_query'] = f'{p}_projector.query.weight'
    learnt = parameters(z, loss, {role: path for role, path in roles.items() if f'param_{role}' in z})
    queries = [f'query_{x}' for x in 'sf' if f'in_query_{x}' in z]
    for key in queries:  # handed in, they win, and the learned ones get nothing
        spare = learnt.get(f'gradparam_{dict(s="spatial", f="frequency")[key[-1]]}_query')
        if spare is not None:
            spare.grad = torch.zeros_like(spare)
    inputs = {name: z.input(name) for name in ('fm_s', 'fm_t', *queries)}

    def call(fm_s, fm_t, query_s=None, query_f=None):
        return loss(fm_s, fm_t, query_s, query_f)

    grads = {f'grad_{name}': inputs[name] for name in ('fm_s', *queries)}
    yield Case(call, inputs, grads=grads | learnt)
    found = loss.project(inputs['fm_s'], inputs.get('query_s'), inputs.get('query_f'))
    for x, term in zip(found, (loss.spatial, loss.frequency)):
        z.compare(f'out_tokens_{term.__name__}', x)
        z.compare(f'loss_{term.__name__}', term(x, inputs['fm_t']))
    if hp['self_query'] and not queries:  # the same queries handed in
        fm_s = inputs['fm_s']
        given = [
            p.query.weight.detach().expand(len(fm_s), -1, -1)
            for p in (loss.spatial_projector, loss.frequency_projector)
        ]
        for x, y in zip(loss.project(fm_s, *given), found):
            torch.testing.assert_close(x, y)
    with pytest.raises(ValueError, match='query_spatial must be given'):
        ScaleKD(4, 8, (3, 2), self_query=False).project(torch.zeros(2, 4, 3, 2))
