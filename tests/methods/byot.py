"""How byot.npz feeds kd_losses/byot.py."""

import torch

from kd_losses.byot import BYOT
from tests.methods.shared import case, leaf

exceptions = {
    'gradient_not_of_value': 'the deepest classifier is a target for the exits',
    'layers': 'adapters',
}


def golden(z):
    loss_args = z.hp('T', 'alpha', 'beta')
    levels, _, width = z.shape('in_feats')

    def build(**kw):
        loss = BYOT([width] * levels, **loss_args, **kw).double()
        with torch.no_grad():
            for i, layer in enumerate(loss.adapt):
                layer.weight.copy_(z.param('adapt_weight')[i])
                layer.bias.copy_(z.param('adapt_bias')[i])
        return loss

    loss = build()
    names = ('outs', 'feats', 'target')
    yield case(z, loss, *names)
    for kind in ('weight', 'bias'):
        z.compare(f'gradparam_adapt_{kind}', torch.stack([getattr(layer, kind).grad for layer in loss.adapt]))
    for i, term in enumerate(('hard', 'soft', 'feat')):
        yield case(z, loss, *names, suffix=f'_{term}', call=lambda i=i, **x: loss.terms(**x)[i])
    yield case(z, build(skip=(1,)), *names, suffix='_code')


def extra(n, dtype, num_classes):
    """What its student hands out: logits and features of three exits."""
    exits = [leaf(n, num_classes, dtype=dtype) for _ in range(3)]
    return [exits, [leaf(n, 8, dtype=dtype) for _ in range(3)]]
