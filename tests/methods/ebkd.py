"""How ebkd.npz feeds kd_losses/ebkd.py."""

from kd_losses.ebkd import EBKD
from tests.methods.shared import case

exceptions = {
    'any_length': 'any number of teachers',
    'masked_class': 'the divergence is weighed by probabilities, a class of probability 0 counts nothing',
}


def golden(z):
    loss = EBKD(**z.hp('T'))
    yield case(z, loss, 'out_s', 'out_t', call=lambda out_s, out_t: loss(out_s, out_t))
    normalized = EBKD(**z.hp('T'), normalize=True)
    yield case(
        z, None, 'out_s', 'out_t', suffix='_normalized', call=lambda out_s, out_t: normalized(out_s, out_t)
    )
    z.compare('out_weight', loss.weights(z.input('out_t')))
