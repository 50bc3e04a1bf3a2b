"""How pkd.npz feeds kd_losses/pkd.py, and how it is called on random tensors."""

from kd_losses.pkd import PKD
from tests.methods.shared import listed

cases = {
    'pkd': """
loss = m.PKD()
inputs = {'fms_s': [S(n, 4, 5, 6), S(n, 3, 2, 3)], 'fms_t': [T(n, 4, 5, 6), T(n, 3, 4, 3)]}
""",
    'pkd_student_size': """
loss = m.PKD(resize_student=False)
inputs = {'fms_s': [S(n, 4, 5, 6), S(n, 3, 2, 3)], 'fms_t': [T(n, 4, 5, 6), T(n, 3, 4, 3)]}
""",
}
RESIZED = 'maps are brought to one size'
exceptions = {'any_size': {f'fms_{side}.{i}': RESIZED for side in 'st' for i in (0, 1)}}


def golden(z):
    levels = range(z.hp('levels')['levels'])
    loss = PKD(bool(z.hp('resize_student')['resize_student']))

    def maps(x, side):
        return [x[f'fm_{side}_{i}'] for i in levels]

    for i in levels:
        z.compare(f'loss_{i}', loss(z.input(f'fm_s_{i}'), z.input(f'fm_t_{i}')))
    names = [f'fm_{side}_{i}' for side in 'st' for i in levels]
    made = listed(z, loss, lambda x: loss(maps(x, 's'), maps(x, 't')), names)
    made.grads = {key: x for key, x in made.grads.items() if '_t_' not in key}
    yield made
