"""How cfl.npz feeds ka_losses/cfl.py, and how it is called on random tensors."""

import torch

from ka_losses.cfl import CFL, mmd
from tests.methods.shared import listed, many, parameters, roles_of, terms_of

cases = {
    'cfl': """
loss = m.CFL(4, [5, 3], h_channels=3)
inputs = {'f_s': S(n, 4, 3, 5), 'f_ts': [T(n, 5, 3, 5), T(n, 3, 3, 5)]}
""",
    'cfl_fc': """
loss = m.CFL(4, [5, 3], h_channels=3, block='fc')
inputs = {'f_s': S(n, 4), 'f_ts': [T(n, 5), T(n, 3)]}
""",
}
rows = {
    'cfl_fc': {
        'layers': 'alignment, extractor and decoders',
    },
}


def cfl_block(z, stem: str, block: str):
    student, teachers = f'{stem}_s', many(z, f'{stem}_t_')
    hp = z.hp('h_channels', 'normalized', 'beta') | {'sigmas': tuple(z.arrays['hp_sigmas'].tolist())}
    channels = [z.shape(f'in_{name}')[1] for name in (student, *teachers)]
    loss = CFL(channels[0], channels[1:], **hp, block=block)
    kinds = ('conv1_', 'conv2_', 'downsample_')

    def path(role: str) -> str:
        head, _, kind = role.rpartition('_')
        for word in kinds:  # extractor_0_conv1 -> extractor.0.conv1
            head = head.replace(f'_{word[:-1]}', f'.{word[:-1]}')
        for word in ('align_s', 'align_t', 'dec_t', 'extractor'):
            if head.startswith(word):
                head = word + head.removeprefix(word).replace('_', '.')
        return f'{head}.{kind}'

    more = parameters(z, loss, {role: path(role) for role in roles_of(z)})

    def call(x, **options):
        return loss(x[student], [x[t] for t in teachers], **options)

    names = [student, *teachers]
    terms_of(z, loss, call, names, {'mmd': 'loss_mmd', 'recons': 'loss_recons'})
    values = {name: z.input(name) for name in names}
    h_s, h_ts = loss.common(values[student], [values[t] for t in teachers])
    z.compare('out_hs', h_s)
    for i, h_t in enumerate(h_ts):
        z.compare(f'out_ht_{i}', h_t)
    if 'loss_mmd_each' in z:
        each = [mmd(h_s, h_t, loss.sigmas, loss.normalized) for h_t in h_ts]
        z.compare('loss_mmd_each', torch.stack(each))
    yield listed(z, loss, call, names, more=more)


def golden(z):
    yield from cfl_block(z, 'fm', 'conv')


def golden_fc(z):
    yield from cfl_block(z, 'feat', 'fc')


more_vectors = {'cfl_fc': golden_fc}
