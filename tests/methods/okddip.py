"""How okddip.npz feeds kd_losses/okddip.py."""

from kd_losses.okddip import OKDDip
from tests.methods.shared import case, parameters

exceptions = {
    'layers': 'query and key',
}


def golden(z):
    D, width = z.shape('in_feats')[2], z.shape('param_query')[0]
    loss = OKDDip(D, **z.hp('T'), factor=D // width)
    kd_weight = z.hp('kd_weight')['kd_weight']
    names = ('outs', 'feats', 'out_leader', 'target')
    more = parameters(z, loss, {'query': 'query.weight', 'key': 'key.weight'})
    yield case(z, loss, *names, more=more, call=lambda **x: loss(**x, kd_weight=kd_weight))
    for i, term in enumerate(('hard', 'peer', 'leader')):
        yield case(z, loss, *names, suffix=f'_{term}', call=lambda i=i, **x: loss.terms(**x)[i])
    z.compare('out_attention', loss.attention(z.input('feats')))
    z.compare('out_peer_targets', loss.targets(z.input('outs'), z.input('feats')))
