"""How diffkd.npz feeds kd_losses/diffkd.py."""

import torch

from kd_losses.diffkd import DiffKD
from tests.methods.shared import case, parameters

exceptions = {
    'own_order': 'its page fixes the order of the arguments: maps first, logits if they are used',
    'layers': 'convolutions of the diffusion model',
    'class_by_class': 'the classes are channels of the layers that learn to denoise logits',
    'no_meta': 'draws on the generator of the batch',
    'no_batch_of_one': ('batch norms of logits', 'two values per channel'),
}
alone = """
loss = m.DiffKD(4, 8, n_classes=7, ae_channels=9)
inputs = {'fm_s': S(n, 4, 3, 2), 'fm_t': T(n, 8, 3, 2), 'out_s': S(n, 7), 'out_t': T(n, 7)}
"""


def golden(z):
    hp = z.hp('steps', 'train_steps', 'ae_channels', 'tau')
    hp['ae_channels'] = hp['ae_channels'] or None
    loss = DiffKD(z.shape('in_fm_s')[1], z.shape('in_fm_t')[1], z.shape('in_out_s')[1], **hp)
    roles = {f'{role(tap)}{path}'.replace('.', '_'): f'{tap}.{path}'
             for tap in ('feature', 'logit')
             for path, _ in getattr(loss, tap).named_parameters()}  # fmt: skip
    grads = parameters(z, loss, roles)
    steps = torch.tensor([t for t, *_ in loss.feature.schedule]).double()
    z.compare('out_sampler_timesteps', steps)

    def terms(fm_s, fm_t, out_s, out_t):
        return of(z, loss, 'feature', fm_s, fm_t)[1] | of(z, loss, 'logit', out_s, out_t)[1]

    names = ('fm_s', 'fm_t', 'out_s', 'out_t')
    yield case(z, loss, *names, call=lambda **x: sum(terms(**x).values()), more=grads)
    found = terms(*(z.input(name) for name in names))
    keys = {'feature': 'loss_kd', 'ddim': 'loss_ddim', 'rec': 'loss_rec', 'logit': 'logit_loss_kd',
            'logit_ddim': 'logit_loss_ddim'}  # fmt: skip
    for name, value in found.items():
        z.compare(keys[name], value)
    z.compare('loss_feature', sum(x for name, x in found.items() if 'logit' not in name))
    z.compare('loss_logits', found['logit'] + found['logit_ddim'])
    for tap, side in (('feature', 'fm'), ('logit', 'out')):
        denoiser, s = getattr(loss, tap), z.input(f'{side}_s')
        refined, target = of(z, loss, tap, s, z.input(f'{side}_t'))[0]
        z.compare(f'{role(tap)}out_refined', refined)
        z.compare(f'{role(tap)}out_target', target)
        gamma = denoiser.noise_adapter(denoiser.trans(s if tap == 'feature' else s[:, :, None, None]))
        z.compare(f'{role(tap)}out_gamma', gamma)


def role(tap: str) -> str:
    return 'logit_' if tap == 'logit' else ''


def of(z, loss, tap, s, t):
    """(refined, target) and the terms of a tap, with the file's noise."""
    given = [z.input(f'{role(tap)}{name}') for name in ('noise_s', 'noise_t', 'timesteps')]
    if tap == 'logit':
        s, t, *given[:2] = (x[:, :, None, None] for x in (s, t, *given[:2]))
    denoised = getattr(loss, tap)(s, t, None, *given)
    return denoised[:2], (loss.of_maps if tap == 'feature' else loss.of_logits)(denoised)
