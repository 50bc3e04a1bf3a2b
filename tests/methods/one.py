"""How one.npz feeds kd_losses/one.py."""

from kd_losses.one import ONE
from tests.methods.shared import case, parameters

exceptions = {
    'gradient_not_of_value': 'the ensemble is a constant for the branches',
    'coarse': "the trunk's mean",
    'layers': 'the gate',
}


def golden(z):
    loss = ONE(z.shape('in_feat')[1], z.shape('in_outs')[0], **z.hp('T'))
    kd_weight = z.hp('kd_weight')['kd_weight']
    roles = {'gate_weight': 'gate.weight', 'gate_bias': 'gate.bias'}
    roles |= {'gate_bn_weight': 'norm.weight', 'gate_bn_bias': 'norm.bias'}
    names = ('outs', 'feat', 'target')
    more = parameters(z, loss, roles)
    yield case(z, loss, *names, more=more, call=lambda **x: loss(**x, kd_weight=kd_weight))
    z.compare('out_ensemble', loss.ensemble)
    yield case(z, loss, *names, suffix='_hard', call=lambda **x: loss.terms(**x)[0])
    yield case(z, loss, *names, suffix='_kd', call=lambda **x: loss.terms(**x)[1])
