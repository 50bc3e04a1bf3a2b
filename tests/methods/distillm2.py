"""How distillm2.npz feeds kd_losses/distillm2.py."""

import torch

from kd_losses.distillm2 import DistiLLM2, gap, ramp
from tests.methods.shared import Case, case

ARGS = ('out_s', 'out_t', 'target', 'out_s_gen', 'out_t_gen', 'target_gen')

cases = {
    'distillm2': """
loss = m.DistiLLM2()
y = torch.arange(n * 5).reshape(n, 5) % K
y[:, 2] = -100
inputs = {'out_s': S(n, 5, K), 'out_t': T(n, 5, K), 'target': y}
inputs |= {'out_s_gen': S(n, 4, K), 'out_t_gen': T(n, 4, K), 'target_gen': y[:, 1:]}
""",
}
exceptions = {'no_gradcheck': 'the skews are constants by definition'}


def golden(z):
    hp, anchors = z.hp('alpha'), z.hp('anchor_t', 'anchor_s')
    loss, curriculum = DistiLLM2(**hp), DistiLLM2(**hp, **anchors)
    yield case(z, loss, *ARGS)
    inputs = {name: z.input(name) for name in ARGS}
    for term, name in zip(loss.terms(**inputs), ('teacher', 'gen')):
        z.compare(f'loss_{name}', term)
    beta = ramp(z.hp('progress')['progress'])
    z.compare('out_beta', torch.tensor(beta, dtype=torch.float64))
    gradual = case(z, loss, *ARGS, suffix='_gradual')
    yield Case(lambda **x: loss(**x, beta=beta), gradual.inputs, gradual.loss, gradual.grads)
    out_s, out_t, target, out_s_gen, out_t_gen, target_gen = inputs.values()
    z.compare('out_gap_t', gap(out_t, out_s, target))
    z.compare('out_gap_s', gap(out_s_gen, out_t_gen, target_gen))
    for skew, name in zip(curriculum.skews(**inputs), 'ts'):
        z.compare(f'out_alpha_{name}', skew)
    yield case(z, curriculum, *ARGS, suffix='_curriculum')
