"""How c2kd.npz feeds kd_losses/c2kd.py, and how it is called on random tensors."""

from kd_losses.c2kd import DSA, ESA, smoothed_ce
from tests.methods.shared import Case, case

cases = {
    'c2kd': """
loss = m.DSA()
inputs = {'dec_s': S(n, 2, 5, 5), 'dec_t': T(n, 2, 5, 5)}
""",
    'c2kd_esa': """
loss = m.ESA()
full = lambda k: torch.full((n,), k)
inputs = {'enc_s': S(n, 2, 4, 4), 'cross_s': S(n, 2, 3, 4), 'enc_t': T(n, 2, 6, 6), 'cross_t': T(n, 2, 3, 6),
          'len_s': full(4), 'len_t': full(6), 'len_y': full(3)}
""",
}


def golden(z):
    gamma, alpha, smoothing, ratio = z.hp('gamma', 'alpha', 'smoothing', 'ce_ratio').values()
    err = float(z.arrays['in_cer'])
    names, lengths = ('enc_s', 'cross_s', 'enc_t', 'cross_t'), ('len_s', 'len_t', 'len_y')
    esa, dsa = ESA(gamma), DSA()
    more = {name: z.input(name) for name in lengths} | {'err': err}

    def both(dec_s, dec_t, **x):
        return esa(**x, **more) + alpha * dsa(dec_s, dec_t)

    inputs = {name: z.input(name) for name in (*names, 'dec_s', 'dec_t')}
    z.compare('loss_esa', esa(**{name: inputs[name] for name in names}, **more))
    z.compare('loss_dsa', alpha * dsa(inputs['dec_s'], inputs['dec_t']))
    yield Case(both, inputs, 'loss', {f'grad_{n}': inputs[n] for n in ('enc_s', 'cross_s', 'dec_s')})
    gold = z.input('gold')
    made = case(
        z, None, 'logits', suffix='_ce', call=lambda logits: ratio * smoothed_ce(logits, gold, smoothing)
    )
    made.grads = {'grad_logits': made.inputs['logits']}
    yield made
