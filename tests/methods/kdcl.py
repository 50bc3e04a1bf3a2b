"""How kdcl.npz feeds kd_losses/kdcl.py."""

from kd_losses.kdcl import KDCL
from tests.methods.shared import case

exceptions = {
    'gradient_not_of_value': 'the combined logits are constants',
    'any_length': 'networks',
}


def golden(z):
    hp = z.hp('T', 'lambda')
    for suffix, mode in (('', 'minlogit'), ('_naive', 'naive'), ('_general', 'general')):
        loss = KDCL(mode, hp['T'], hp['lambda'])
        weights = z.input('weights').detach() if mode == 'general' else None
        one = case(
            z, loss, 'outs', 'target', suffix=suffix, call=lambda m=loss, w=weights, **x: m(**x, weights=w)
        )
        yield one
        if mode != 'general':
            z.compare(f'out_{mode}', loss.combine(z.input('outs'), z.input('target')))
    hard = KDCL('minlogit', hp['T'], 0.0)
    yield case(z, hard, 'outs', 'target', suffix='_hard')
