"""How tekap.npz feeds kd_losses/tekap.py."""

from kd_losses.tekap import TeKAP
from tests.methods.shared import case

exceptions = {
    'masked_class': 'the divergence is weighed by probabilities, a class of probability 0 counts nothing',
    'no_meta': 'draws on the generator of the batch',
}


def golden(z):
    loss = TeKAP(**z.hp('T', 'copies', 'noise', 'w_noisy'))
    names = {'rename': {'noise_t': 'noise'}}
    yield case(z, loss, 'out_s', 'out_t', 'noise_t', **names)
    for i, term in enumerate(('plain', 'noisy')):
        terms = case(
            z,
            loss,
            'out_s',
            'out_t',
            'noise_t',
            suffix=f'_{term}',
            call=lambda i=i, **x: loss.terms(**x)[i],
            **names,
        )
        yield terms
