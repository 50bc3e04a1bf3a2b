"""How dgkd.npz feeds kd_losses/dgkd.py."""

import torch.nn.functional as F

from kd_losses.dgkd import DGKD
from tests.methods.shared import case

exceptions = {
    'any_length': 'any number of teachers',
    'no_meta': 'draws on the generator of the batch',
    'masked_class': 'the divergence is weighed by probabilities, a class of probability 0 counts nothing',
}


def golden(z):
    hp = z.hp('T', 'lambda')
    loss = DGKD(hp['T'], hp['lambda']).eval()
    yield case(z, loss, 'out_s', 'outs_t', 'target')
    keep = z.input('keep_mask').detach()
    yield case(z, loss, 'out_s', 'outs_t', 'target', suffix='_dropped', call=lambda **x: loss(**x, keep=keep))
    first = lambda out_s, outs_t, target: loss(out_s, outs_t[:1], target)  # noqa: E731
    yield case(z, loss, 'out_s', 'outs_t', 'target', suffix='_takd', call=first)

    def authors(out_s, outs_t, target):  # every divergence averaged over the classes as well
        ce = F.cross_entropy(out_s, target)
        return (1 - loss.lam) * ce + (loss(out_s, outs_t, target) - (1 - loss.lam) * ce) / out_s.shape[1]

    yield case(z, loss, 'out_s', 'outs_t', 'target', suffix='_code', call=authors)
