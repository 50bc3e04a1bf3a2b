"""How vitkd.npz feeds kd_losses/vitkd.py."""

import torch

from kd_losses.vitkd import ViTKD
from tests.methods.shared import Case, leaf, parameters

exceptions = {
    'layers': 'linear maps and convolutions',
}
alone = """
loss = m.ViTKD(4, 6)
inputs = {'tokens_s': [S(n, 9, 4) for _ in range(3)], 'tokens_t': [T(n, 9, 6) for _ in range(3)]}
"""


def golden(z):
    s_dim, t_dim = z.shape('in_tokens_s_0')[2], z.shape('in_tokens_t_0')[2]
    loss = ViTKD(s_dim, t_dim, **z.hp('alpha', 'beta', 'mask_ratio'))
    roles = {'mask_token': 'mask_token'}
    roles |= {f'conv{i + 1}_{x[0]}': f'generation.{2 * i}.{x}' for i in range(2) for x in ('weight', 'bias')}
    if s_dim != t_dim:
        roles |= {f'align{i}_{x[0]}': f'align.{i}.{x}' for i in range(3) for x in ('weight', 'bias')}
    learnt = parameters(z, loss, roles)
    inputs = {f'tokens_{side}_{i}': z.input(f'tokens_{side}_{i}') for side in 'st' for i in range(3)}
    noise, grid = z.input('noise').detach(), tuple(z.hp('grid_h', 'grid_w').values())

    def call(which=None, **x):
        lists = ([x[f'tokens_{side}_{i}'] for i in range(3)] for side in 'st')
        return loss(*lists, noise, grid) if which is None else loss.terms(*lists, noise, grid)[which]

    grads = {f'grad_tokens_s_{i}': inputs[f'tokens_s_{i}'] for i in range(3)}
    yield Case(call, inputs, grads=grads | learnt)
    for i, term in enumerate(('mimic', 'generation')):
        z.compare(f'loss_{term}', call(i, **inputs))
    z.compare('out_mask', loss.mask(noise))
    # truncated, not rounded: 10 * (1 - 0.9) is less than 1
    assert ViTKD(2, 2, mask_ratio=0.9).mask(torch.rand(3, 10)).all()
    assert ViTKD(2, 2, mask_ratio=0.01).mask(torch.rand(3, 10)).sum() == 3


def tokens(n, dtype, width):
    """After three blocks, for the grid of the last map."""
    return [leaf(n, 6, width, dtype=dtype) for _ in range(3)]
