"""How aekd.npz feeds kd_losses/aekd.py."""

import torch

from kd_losses.aekd import AEKD
from tests.methods.shared import Case

exceptions = {
    'any_length': 'any number of teachers',
    'masked_class': 'the divergence is weighed by probabilities, a class of probability 0 counts nothing',
    'gradient_not_of_value': 'the weights depend on the student and are constants by definition',
}


def golden(z):
    T, caps = z.hp('T')['T'], z.arrays['hp_C']
    z.loosen('out_weight', 1e-6)  # the page compares weights so: they solve a problem with tiny coefficients
    out_s, outs_t = z.input('out_s'), z.input('out_t')
    grads = AEKD(T).gradients(out_s, outs_t)
    v = grads.mean(dim=1)
    z.compare('out_gram', v @ v.T)
    z.compare('loss_each', torch.stack([AEKD(T)(out_s, outs_t[m : m + 1]) for m in range(len(outs_t))]))
    for i, C in enumerate(map(float, caps)):
        for norm in (False, True):
            z.compare(f'out_weight_{i}' + '_norm' * norm, AEKD.weights(grads, C, norm))
        inputs = {name: z.input(name) for name in ('out_s', 'out_t')}
        keys = [f'loss_{i}', *(['loss'] if i == 0 else [])]
        for key in keys:
            yield Case(
                lambda out_s, out_t, C=C: AEKD(T, C)(out_s, out_t),
                inputs,
                key,
                {f'grad_out_s_{i}': inputs['out_s']} if key != 'loss' else {},
            )
