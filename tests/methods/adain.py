"""How adain.npz feeds kd_losses/adain.py."""

import torch.nn.functional as F

from kd_losses.adain import AdaINKD
from tests.methods.shared import case

exceptions = {
    'one_logit': 'squared errors of logits',
    'layers': "the teacher's classifier",
}


def golden(z):
    loss = AdaINKD(**z.hp('eps'))
    weight, bias = z.input('cls_weight'), z.input('cls_bias')

    def tail(fm):
        return F.linear(fm.relu().mean(dim=(2, 3)), weight.detach(), bias.detach())

    names = ('fm_s', 'fm_t', 'out_t')
    yield case(z, loss, *names, call=lambda **x: loss(**x, teacher_tail=tail))
    for i, term in enumerate(('stat', 'adain')):
        yield case(
            z, loss, *names, suffix=f'_{term}', call=lambda i=i, **x: loss.terms(**x, teacher_tail=tail)[i]
        )
