"""How dcm.npz feeds kd_losses/dcm.py."""

from kd_losses.dcm import DCM
from tests.methods.shared import case, leaf

exceptions = {
    'gradient_not_of_value': 'each network is a constant for the other',
}


def golden(z):
    loss = DCM(**z.hp('eps'))
    names = ('outs_1', 'outs_2', 'target')
    yield case(z, loss, *names)
    yield case(z, loss, *names, suffix='_hard', call=lambda **x: loss.terms(**x)[0])
    yield case(z, loss, *names, suffix='_soft', call=lambda **x: loss.terms(**x)[1])


networks = 2


def extra(n, dtype, num_classes):
    """What its networks hand out: logits of two heads."""
    return [leaf(n, num_classes, dtype=dtype) for _ in range(2)]
