"""How crd.npz feeds kd_losses/crd.py."""

import copy

import torch

from kd_losses.crd import CRD
from tests.methods.shared import Case, parameters

exceptions = {
    'redraws_when_compiled': 'multinomial draws other negatives',
    'layers': 'embeddings',
    'no_meta': 'draws on the generator of the batch',
}


def golden(z):
    hp = z.hp('n_data', 'feat_dim', 'nce_n', 'nce_t', 'nce_mom')
    loss = CRD(z.shape('in_feat_s_1')[1], z.shape('in_feat_t_1')[1], **hp)
    roles = {f'embed_{side}_{x[0]}': f'embed_{side}.{x}' for side in 'st' for x in ('weight', 'bias')}
    embeds = parameters(z, loss, roles)
    for side in 'st':
        loss.get_buffer(f'memory_{side}').copy_(z.param(f'memory_{side}'))
    untouched = copy.deepcopy(loss)  # two consecutive calls, by value and then by term, from the same memory
    for k in (1, 2):
        names = ('feat_s', 'feat_t', 'idx', 'sample_idx')
        inputs = {name: z.input(f'{name}_{k}') for name in names}
        grads = {f'grad_feat_s_{k}': inputs['feat_s']} | {f'{key}_{k}': p for key, p in embeds.items()}
        for p in loss.parameters():
            p.grad = None
        yield Case(
            lambda feat_s, feat_t, idx, sample_idx: loss(feat_s, feat_t, idx, sample_idx),
            inputs,
            f'loss_{k}',
            grads,
        )
        for side in 'st':
            z.compare(f'out_memory_{side}_{k}', loss.get_buffer(f'memory_{side}'))
            if k == 1:
                z.compare(f'out_z_{side}', loss.get_buffer(f'z_{side}'))
        with torch.enable_grad():
            for side, term in zip('st', untouched.terms(*inputs.values())):
                z.compare(f'loss_{side}_{k}', term)
        if k == 1:
            z.compare('loss', CRD.forward(copy_with_memory(z, loss), *inputs.values()))


def copy_with_memory(z, loss) -> CRD:
    """The module as it was before the first call."""
    fresh = copy.deepcopy(loss)
    for side in 'st':
        fresh.get_buffer(f'memory_{side}').copy_(z.param(f'memory_{side}'))
        fresh.get_buffer(f'z_{side}').fill_(-1)
    return fresh
