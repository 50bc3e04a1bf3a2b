"""How sla.npz feeds kd_losses/sla.py."""

from kd_losses.sla import SLA
from tests.methods.shared import case, leaf

exceptions = {
    'gradient_not_of_value': 'the aggregate is a constant for the plain head',
}


def golden(z):
    loss = SLA(**z.hp('num_transforms', 'T'))
    names = ('joint_out', 'out', 'target')
    yield case(z, loss, *names)
    for i, term in enumerate(('joint', 'single', 'kd')):
        yield case(z, loss, *names, suffix=f'_{term}', call=lambda i=i, **x: loss.terms(**x)[i])
    z.compare('out_agg', loss.aggregate(z.input('joint_out')))


def extra(n, dtype, num_classes):
    """What its student hands out: joint logits of four rotations."""
    return leaf(4 * n, 4 * num_classes, dtype=dtype)
