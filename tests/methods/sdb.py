"""How sdb.npz feeds kd_losses/sdb.py."""

import torch.nn.functional as F

from kd_losses.sdb import SDB, SDBStudent
from tests.methods.shared import Case, case, leaf

rows = {
    'sdb': {
        'coarse': 'the untrained network',
        'gradient_not_of_value': 'the keyed output is a constant in one of the terms',
        'layers': 'the untrained network',
        'no_meta': 'shows images to a network',
        'resting': ('random', 'the untrained network does not learn'),
        'own_order': 'the network that learns is the teacher of others',
    },
    'sdb_student': {
        'coarse': 'the teacher looks at other images',
        'layers': 'the teacher looks at other images',
        'masked_class': 'the divergence is weighed by probabilities, a class of probability 0 counts nothing',
        'no_meta': 'shows images to a network',
        'own_order': 'labels last',
    },
}
exceptions = rows['sdb']
alone = """
loss = m.SDB()
inputs = {'out': S(n, 7), 'out_key': S(n, 7), 'out_adv': T(n, 7), 'out_rand': T(n, 7),
          'target': torch.arange(n)}
"""


def golden(z):
    hp = z.hp('T', 'weight', 'eta')
    loss, names = SDB(**hp), ('out', 'out_key', 'out_adv', 'out_rand', 'target')
    inputs = {name: z.input(name) for name in names}
    for name in ('out_adv', 'out_rand'):
        inputs[name] = inputs[name].detach()
    for name, term in zip(('ce', 'disturb', 'keep', 'random'), loss.terms(**inputs)):
        z.compare(f'loss_{name}', term)
    yield Case(loss, inputs, 'loss', {f'grad_{name}': inputs[name] for name in ('out', 'out_key')})

    def coded(out_key, out_adv):  # probabilities where logarithms belong, without T^2
        log_p, q = F.log_softmax(out_key / hp['T'], dim=1), (out_adv / hp['T']).softmax(dim=1)
        return (log_p.exp() * (log_p - q)).sum(dim=1).mean()

    inputs = {
        name: x.detach().requires_grad_() if name in ('out', 'out_key') else x.detach()
        for name, x in inputs.items()
    }
    z.compare('loss_keep_code', coded(inputs['out_key'], inputs['out_adv']))
    yield Case(
        lambda **x: loss(**x) - loss.terms(**x)[2] + coded(x['out_key'], x['out_adv']),
        inputs,
        'loss_code',
        {f'grad_{name}_code': inputs[name] for name in ('out', 'out_key')},
    )
    student = SDBStudent(hp['T'], **z.hp('alpha'))
    key, target = z.input('out_key').detach(), z.input('target')
    made = case(z, None, 'out_s', suffix='_kd', call=lambda out_s: student(out_s, key, target))
    made.grads = {'grad_out_s': made.inputs['out_s']}
    yield made


def extra(n, dtype, num_classes):
    """What the box hands out in training: logits with the key."""
    return leaf(n, num_classes, dtype=dtype)
