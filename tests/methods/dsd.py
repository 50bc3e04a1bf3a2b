"""How dsd.npz feeds kd_losses/dsd.py, and how it is called on random tensors."""

from kd_losses.dsd import DSD
from tests.methods.shared import listed

cases = {
    'dsd': """
loss = m.DSD(w_pixel=1.0, w_category=100.0)
inputs = {'fms_s': [S(n, 4, 5, 3), S(n, 3, 5, 3), S(n, 4, 5, 3)],
          'fms_t': [T(n, 4, 5, 3), T(n, 6, 5, 3), T(n, 4, 5, 3)]}
""",
}


def golden(z):
    maps = range(z.hp('maps')['maps'])
    loss = DSD()
    names = {side: [f'fm_{side}_{i}' for i in maps] for side in 'st'}
    pixel, category = loss.terms(*([z.input(name) for name in names[side]] for side in 'st'))
    z.compare('loss_pixel', pixel)
    z.compare('loss_category', category)
    made = listed(
        z,
        loss,
        lambda x: loss(*([x[name] for name in names[side]] for side in 'st')),
        sum(names.values(), []),
    )
    made.grads = {key: x for key, x in made.grads.items() if '_t_' not in key}
    yield made
