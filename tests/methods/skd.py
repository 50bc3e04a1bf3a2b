"""How skd.npz feeds kd_losses/skd.py."""

from kd_losses.skd import SKD
from tests.methods.shared import case


def golden(z):
    loss = SKD(**z.hp('T', 'tikhonov', 'w_kd'))
    yield case(z, loss, 'out_s', 'out_t')
    for i, term in enumerate(('instance', 'direction')):
        yield case(z, loss, 'out_s', 'out_t', suffix=f'_{term}', call=lambda i=i, **x: loss.terms(**x)[i])
        z.compare(f'out_fraction_{term}', loss.shares(z.input('out_t'))[i])
    paper = SKD(**z.hp('T', 'tikhonov'), w_kd=1.0, per_class=False, fractions=False)

    def terms(**x):  # the paper's instance term lacks T^2
        instance, direction = paper.terms(**x)
        return instance / paper.T**2, direction

    yield case(z, paper, 'out_s', 'out_t', suffix='_paper', call=lambda **x: sum(terms(**x)))
    for i, term in enumerate(('instance', 'direction')):
        yield case(z, paper, 'out_s', 'out_t', suffix=f'_paper_{term}', call=lambda i=i, **x: terms(**x)[i])
    whole, (instance, direction) = paper(**both(z)), terms(**both(z))
    assert whole == instance * paper.T**2 + direction


def both(z) -> dict:
    return {name: z.input(name) for name in ('out_s', 'out_t')}
