"""How rld.npz feeds kd_losses/rld.py."""

from kd_losses.rld import RLD
from tests.methods.shared import case

exceptions = {
    'masked_class': 'the divergence is weighed by probabilities, a class of probability 0 counts nothing',
}


def golden(z):
    hp, standardise = z.hp('alpha', 'beta', 'T', 'T_conf'), bool(z.hp('standardise')['standardise'])
    loss, other = RLD(**hp, standardise=standardise), RLD(**hp, standardise=not standardise)
    names = ('out_s', 'out_t', 'target')
    yield case(z, loss, *names)
    for i, term in enumerate(('scd', 'mcd')):
        yield case(z, loss, *names, suffix=f'_{term}', call=lambda i=i, **x: loss.terms(**x)[i])
    yield case(z, other, *names, suffix='_plain' if standardise else '_standard')
    z.compare('out_mask', loss.dropped(z.input('out_t'), z.input('target')).double())
