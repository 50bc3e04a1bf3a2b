"""How ctkd.npz feeds kd_losses/ctkd.py."""

from kd_losses.ctkd import CTKD
from tests.methods.shared import case, parameters

exceptions = {
    'gradient_not_of_value': 'the gradient of the temperature is reversed',
    'masked_class': 'the divergence is weighed by probabilities, a class of probability 0 counts nothing',
}


def golden(z):
    hp = z.hp('t_start', 't_end', 'lambda')
    loss = CTKD(hp['t_start'], hp['t_end'])
    more = parameters(z, loss, {'theta': 'theta'})
    yield case(z, loss, 'out_s', 'out_t', more=more, call=lambda **x: loss(**x, lam=hp['lambda']))
    z.compare('out_temperature', loss.temperature)
