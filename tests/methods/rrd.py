"""How rrd.npz feeds kd_losses/rrd.py."""

import copy

from kd_losses.rrd import RRD
from tests.methods.shared import Case, parameters

exceptions = {
    'layers': 'embeddings',
    'resting': ('embed_t', 'a random projection of the teacher, which never learns'),
}


def golden(z):
    hp = z.hp('feat_dim', 'queue', 'T_s', 'T_t')
    loss = RRD(z.shape('in_feat_s_1')[1], z.shape('in_feat_t_1')[1], **hp)
    roles = {f'embed_{side}_{x[0]}': f'embed_{side}.{x}' for side in 'st' for x in ('weight', 'bias')}
    embeds = parameters(z, loss, roles)
    loss.queue.copy_(z.param('queue'))
    z.compare('loss', copy.deepcopy(loss)(z.input('feat_s_1'), z.input('feat_t_1')))
    call = 1
    while f'loss_{call}' in z:  # one after the other, on the same queue
        inputs = {name: z.input(f'{name}_{call}') for name in ('feat_s', 'feat_t')}
        grads = {f'{key}_{call}': p for key, p in embeds.items()}
        loss.zero_grad()
        yield Case(loss.forward, inputs, f'loss_{call}', {f'grad_feat_s_{call}': inputs['feat_s'], **grads})
        z.compare(f'out_queue_{call}', loss.queue)
        call += 1
