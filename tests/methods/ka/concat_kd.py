"""How concat_kd.npz feeds ka_losses/concat_kd.py, and how it is called on random tensors."""

from ka_losses.concat_kd import ConcatKD
from tests.methods.shared import listed, many

cases = {
    'concat_kd': """
loss = m.ConcatKD()
inputs = {'out_s': S(n, K), 'outs_t': [T(n, 3), T(n, K - 3)]}
""",
    'concat_kd_parts': """
loss = m.ConcatKD(T=2.0, mode='parts', align='center')
inputs = {'out_s': S(n, K), 'outs_t': [T(n, 3), T(n, K - 3)]}
""",
}


def golden(z):
    teachers = many(z, 'out_t_')
    for mode in ('kl', 'soft_ce', 'mse', 'parts'):
        loss = ConcatKD(**z.hp('T'), mode=mode)
        yield listed(
            z,
            loss,
            lambda x, a=loss: a(x['out_s'], [x[t] for t in teachers]),
            ['out_s', *teachers],
            suffix=f'_{mode}',
        )
    yield listed(
        z,
        None,
        lambda x: ConcatKD(**z.hp('T'))(x['out_s'], [x[t] for t in teachers]),
        ['out_s', *teachers],
    )


def one_logit(inputs):
    one = inputs['out_s'][:, :1]
    return inputs | {'out_s': one, 'outs_t': [one]}
