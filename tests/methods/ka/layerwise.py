"""How layerwise.npz feeds ka_losses/layerwise.py, and how it is called on random tensors."""

from ka_losses.layerwise import LayerwiseKA
from tests.methods.shared import listed, many, parameters, roles_of, terms_of

cases = {
    'layerwise': """
loss = m.LayerwiseKA(4, [5, 3])
inputs = {'fm_s': S(n, 4, 3, 5), 'fms_t': [T(n, 5, 3, 5), T(n, 3, 3, 5)]}
""",
}


def golden(z):
    teachers = many(z, 'fm_t_')
    loss = LayerwiseKA(
        z.shape('in_fm_s')[1], [z.shape(f'in_{t}')[1] for t in teachers], **z.hp('w_amal', 'w_recons')
    )
    more = parameters(z, loss, {role: role.replace('_', '.') for role in roles_of(z)})

    def call(x, **options):
        return loss(x['fm_s'], [x[t] for t in teachers], **options)

    terms_of(z, loss, call, ['fm_s', *teachers], {'amal': 'loss_amal', 'recons': 'loss_recons'})
    yield listed(z, loss, call, ['fm_s', *teachers], more=more)
