"""How dfkd_losses/zskt.py is called on random tensors."""

without_vector = 'a variant that shares the loop of dfad; test_dfkd.py compares it with its formula'

cases = {
    'zskt': """
loss = m.ZSKT()
inputs = {'out_s': S(n, K), 'out_t': T(n, K), 'fms_s': [S(n, 4, 6, 3), S(n, 8, 3, 2)],
          'fms_t': [T(n, 5, 6, 3), T(n, 6, 3, 2)]}
""",
    'zskt_generator': """
loss = m.ZSKT()
call = loss.generator_loss
inputs = {'out_s': S(n, K), 'out_t': S(n, K)}
""",
}


def one_logit(inputs):
    return inputs | {name: inputs[name][:, :1] for name in ('out_s', 'out_t')}
