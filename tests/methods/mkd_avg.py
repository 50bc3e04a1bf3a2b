"""How mkd_avg.npz feeds kd_losses/mkd_avg.py."""

from kd_losses.mkd_avg import MultiTeacherKD
from tests.methods.shared import Case

exceptions = {
    'any_length': 'any number of teachers',
    'masked_class': 'the divergence is weighed by probabilities, a class of probability 0 counts nothing',
}


def golden(z):
    for key, mode, grad in (
        ('loss', 'loss', 'grad_out_s'),
        ('loss_avg_loss', 'loss', 'grad_out_s'),
        ('loss_avg_prob', 'prob', 'grad_out_s'),  # another value, the same gradient
        ('loss_avg_logit', 'logit', 'grad_out_s_avg_logit'),
    ):
        inputs = {name: z.input(name) for name in ('out_s', 'out_t')}
        loss = MultiTeacherKD(**z.hp('T'), mode=mode)
        yield Case(lambda out_s, out_t, f=loss: f(out_s, out_t), inputs, key, {grad: inputs['out_s']})
