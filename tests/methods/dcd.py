"""How dcd.npz feeds kd_losses/dcd.py."""

import torch

from kd_losses.dcd import DCD
from tests.methods.shared import case, parameters

exceptions = {
    'layers': 'embeddings',
}


def golden(z):
    loss = DCD(z.shape('in_feat_s')[1], z.shape('in_feat_t')[1], **z.hp('feat_dim', 'alpha', 'max_scale'))
    roles = {f'embed_{side}_{x[0]}': f'embed_{side}.{x}' for side in 'st' for x in ('weight', 'bias')}
    more = parameters(z, loss, roles | {'log_scale': 'log_scale', 'bias': 'bias'})
    yield case(z, loss, 'feat_s', 'feat_t', more=more)
    for i, term in enumerate(('contrast', 'consistency')):
        yield case(z, loss, 'feat_s', 'feat_t', suffix=f'_{term}', call=lambda i=i, **x: loss.terms(**x)[i])
    with torch.no_grad():
        loss.log_scale.fill_(3)  # above the ceiling
    loss.log_scale.grad = None
    yield case(z, loss, 'feat_s', 'feat_t', suffix='_clamped',
               more={'gradparam_log_scale_clamped': loss.log_scale})  # fmt: skip
