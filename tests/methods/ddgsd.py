"""How ddgsd.npz feeds kd_losses/ddgsd.py."""

from kd_losses.ddgsd import DDGSD
from tests.methods.shared import case

exceptions = {
    'gradient_not_of_value': 'each view is a constant for the other',
}


def golden(z):
    hp = z.hp('T', 'lambda', 'mu')
    loss = DDGSD(hp['T'], hp['lambda'], hp['mu'])
    names = ('out_a', 'out_b', 'feat_a', 'feat_b', 'target')
    yield case(z, loss, *names)
    for i, term in enumerate(('ce', 'kl', 'mmd')):
        yield case(z, loss, *names, suffix=f'_{term}', call=lambda i=i, **x: loss.terms(**x)[i])
