"""How simkd.npz feeds kd_losses/simkd.py."""

from kd_losses.simkd import SimKD
from tests.methods.shared import TEACHER, case, leaf, parameters

exceptions = {
    'resting': ('projector', 'it learns through the student that contains it'),
}


def golden(z):
    loss = SimKD(z.shape('in_fm_s')[1], z.shape('in_fm_t')[1], **z.hp('factor'))
    roles = {f'conv{i + 1}_weight': f'projector.{3 * i}.weight' for i in range(3)}
    roles |= {f'bn{i + 1}_{x}': f'projector.{3 * i + 1}.{x}' for i in range(3) for x in ('weight', 'bias')}
    yield case(z, loss, 'fm_s', 'fm_t', more=parameters(z, loss, roles))
    z.compare('out_logits', loss.predict(z.input('fm_s'), (z.input('cls_weight'), z.input('cls_bias'))))


def extra(n, dtype, num_classes):
    """What its student hands out: the last map, projected to the teacher's channels."""
    return leaf(n, TEACHER[-1][0], 3, 2, dtype=dtype)


def extra_as_teacher(t):
    return t.fms[-1].clone()


def arguments(w):
    """Of forward: the trainer calls a part of the loss only."""
    return w.s.fms[-1], w.t.fms[-1]
