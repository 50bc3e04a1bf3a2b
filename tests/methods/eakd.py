"""How eakd.npz feeds kd_losses/eakd.py."""

import torch

from kd_losses.dkd import DKD
from kd_losses.eakd import EAKD, entropy_weight
from tests.methods.shared import case

exceptions = {
    'masked_class': 'the divergence is weighed by probabilities, a class of probability 0 counts nothing',
    'gradient_not_of_value': 'the weights of the samples are constants',
}


def golden(z):
    hp, K = z.hp('T', 'T_entropy', 'dkd_alpha', 'dkd_beta'), z.shape('in_out_s')[1]
    yield case(z, EAKD(hp['T'], hp['T_entropy']), 'out_s', 'out_t')
    z.compare('out_weight', entropy_weight(z.input('out_s'), z.input('out_t'), hp['T_entropy']))
    yield case(z, EAKD(hp['T'], hp['T_entropy'], upper=K), 'out_s', 'out_t', suffix='_cifar_as_coded')
    dkd = DKD(hp['dkd_alpha'], hp['dkd_beta'], hp['T'])

    def weighed(out_s, out_t, target):
        rows = torch.stack([dkd(*(x[i : i + 1] for x in (out_s, out_t, target))) for i in range(len(out_s))])
        return (entropy_weight(out_s, out_t, 3.0) * rows).mean()

    for key in ('loss_dkd', 'grad_out_s_dkd'):  # the authors clamp p at 1e-10 there instead of adding it
        z.loosen(key, 1e-8)
    yield case(z, None, 'out_s', 'out_t', 'target', suffix='_dkd', call=weighed)
