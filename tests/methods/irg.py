"""How irg.npz feeds kd_losses/irg.py."""

from kd_losses.irg import IRG
from tests.methods.shared import case

exceptions = {
    'one_logit': 'squared errors of logits',
}
alone = """
loss = m.IRG()
inputs = {'irg_s': [S(n, 4, 6, 6), S(n, 8, 3, 3), S(n, 8), S(n, 7)],
          'irg_t': [T(n, 4, 6, 6), T(n, 8, 3, 3), T(n, 8), T(n, 7)]}
"""


def golden(z):
    loss = IRG(*(z.hp(f'w_{term}')[f'w_{term}'] for term in ('vert', 'edge', 'tran')))
    names = [f'{x}_{side}' for side in 'st' for x in ('fm1', 'fm2', 'feat', 'out')]
    yield case(z, loss, *names, call=lambda **x: loss(*graphs(x)))
    for i, term in enumerate(('vert', 'edge', 'tran')):
        yield case(z, loss, *names, suffix=f'_{term}', call=lambda i=i, **x: loss.terms(*graphs(x))[i])


def graphs(x: dict) -> list[list]:
    return [[x[f'{name}_{side}'] for name in ('fm1', 'fm2', 'feat', 'out')] for side in 'st']
