"""How ft.npz feeds kd_losses/ft.py."""

import torch.nn.functional as F

from kd_losses.ft import FT, FactorTransfer
from tests.methods.shared import Case, case, parameters

exceptions = {
    'resting': ('paraphraser', 'it learned before'),
}


def golden(z):
    yield case(z, FT(), 'factor_s', 'factor_t')
    c_s, c_t = z.shape('in_fm_s')[1], z.shape('in_fm_t')[1]

    def roles(side, prefix, part, layers):
        return {
            f'{side}_{part}{i}_{kind}': f'{prefix}.{2 * i}.{kind}'
            for i in layers
            for kind in ('weight', 'bias')
        }

    whole = FactorTransfer(c_s, c_t, **z.hp('k'))
    layers = range(3)
    learner = parameters(z, whole, roles('tran', 'translator.encoder', 'conv', layers))
    coder = roles('para', 'paraphraser.encoder', 'conv', layers)
    coder |= roles('para', 'paraphraser.decoder', 'deconv', layers)
    coder = parameters(z, whole, coder)
    factor, recon = whole.paraphraser(z.input('fm_t'))
    z.compare('out_factor_t', factor)
    z.compare('out_recon', recon)
    z.compare('out_factor_s', whole.translator(z.input('fm_s')))
    mse = {f'{key}_mse': p for key, p in coder.items()}
    z.compare('loss_recon_l1', F.l1_loss(recon, z.input('fm_t')))
    yield Case(whole.pretrain_loss, {'fm_t': z.input('fm_t')}, 'loss_recon_mse', mse)
    yield case(
        z, whole, 'fm_s', 'fm_t', suffix='_pipeline', more=learner | {'grad_fm_s': (x := z.input('fm_s'))},
        call=lambda fm_s, fm_t: whole(x, fm_t),
    )  # fmt: skip
