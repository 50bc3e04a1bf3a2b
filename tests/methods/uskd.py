"""How uskd.npz feeds kd_losses/uskd.py."""

from kd_losses.uskd import USKD
from tests.methods.shared import case, parameters

exceptions = {
    'gradient_not_of_value': 'the labels made of the predictions are constants',
    'layers': 'the weak head',
}


def golden(z):
    hp = z.hp('alpha', 'beta', 'mu')
    K, width = z.shape('param_fc_weight')
    loss = USKD(width, K, **hp)
    roles = {'fc_weight': 'fc.weight', 'fc_bias': 'fc.bias'}
    names = ('feat_mid', 'out_s', 'target')
    yield case(z, loss, *names, more=parameters(z, loss, roles))
    for i, term in enumerate(('target', 'nontarget', 'weak')):
        yield case(z, loss, *names, suffix=f'_{term}', call=lambda i=i, **x: loss.terms(**x)[i])
    code = USKD(width, K, **hp, rank_on='logprob')
    parameters(z, code, roles)
    yield case(z, code, *names, suffix='_code')
