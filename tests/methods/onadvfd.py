"""How onadvfd.npz feeds kd_losses/onadvfd.py."""

from kd_losses.onadvfd import OnAdvFD, d_loss, g_loss
from tests.methods.shared import case

exceptions = {
    'gradient_not_of_value': 'each network is a constant for the next',
    'resting': ('adversaries', 'they have a step of their own'),
}


def golden(z):
    loss = OnAdvFD(**z.hp('T'))
    names = ('out_1', 'out_2', 'target', 'score_g')

    def both(score_g, **x):
        return loss(**x) + g_loss(score_g)

    one = case(z, loss, *names, call=both)
    one.grads = {'grad_out_1': one.inputs['out_1'], 'grad_score_g': one.inputs['score_g']}
    yield one
    yield case(z, loss, *names[:3], suffix='_logit')
    yield case(z, loss, 'score_g', suffix='_g', call=lambda score_g: g_loss(score_g))
    scores = case(z, loss, 'score_d_real', 'score_d_fake', suffix='_d', call=lambda **x: d_loss(*x.values()))
    scores.grads = {f'grad_{name}': x for name, x in scores.inputs.items()}
    yield scores
