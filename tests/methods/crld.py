"""How crld.npz feeds kd_losses/crld.py."""

from types import SimpleNamespace

import torch.nn.functional as F

from kd_losses.crld import CRLD, feed
from tests.methods.shared import case

exceptions = {
    'masked_class': 'the divergence is weighed by probabilities, a class of probability 0 counts nothing',
    'own_order': 'its page fixes the order of the arguments: both views of the student come first',
    'coarse': 'the teacher on the strong view',
    'labels_in_part': 'the divergences need no label',
    'layers': 'the teacher on the strong view',
    'no_meta': 'runs networks',
}
alone = """
loss = m.CRLD()
inputs = {name: S(n, 7) for name in ('out_s', 'out_s_strong')}
inputs |= {name: T(n, 7) for name in ('out_t', 'out_t_strong')}
"""


def golden(z):
    loss = CRLD(**z.hp('T', 'tau_weak', 'tau_strong', 'w_within', 'w_cross'))
    names = ('out_s', 'out_s_strong', 'out_t', 'out_t_strong')
    whole = case(z, loss, *names)
    whole.grads['grad_out_s_strong'] = whole.inputs['out_s_strong']
    yield whole
    for i, term in enumerate(('within', 'cross')):
        yield case(z, loss, *names, suffix=f'_{term}', call=lambda i=i, **x: loss.terms(**x)[i])
    for name, mask in zip(('weak', 'strong'), loss.masks(z.input('out_t'), z.input('out_t_strong'))):
        z.compare(f'out_mask_{name}', mask)
    # the cross-entropies of both views: the trainer's and the feed's
    s, s_strong, t, t_strong = (SimpleNamespace(out=z.input(name)) for name in names)
    batch = SimpleNamespace(
        views={'strong': None},
        student=lambda img: s_strong,
        teacher=lambda img: t_strong,
        target=z.input('target'),
    )
    ce = feed(loss, s, t, batch) - loss(*(z.input(name) for name in names))
    z.compare('loss_ce', ce + F.cross_entropy(s.out, batch.target))
