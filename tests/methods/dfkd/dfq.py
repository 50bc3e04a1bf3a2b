"""How dfkd_losses/dfq.py is called on random tensors."""

without_vector = 'a variant that shares the loop of dfad; test_dfkd.py compares it with its formula'

cases = {
    'dfq': """
loss = m.DFQ()
inputs = {'out_s': S(n, K), 'out_t': S(n, K), 'bn_loss': S()}
""",
}


def one_logit(inputs):
    return inputs | {name: inputs[name][:, :1] for name in ('out_s', 'out_t')}
