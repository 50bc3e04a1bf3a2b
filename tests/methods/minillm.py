"""How minillm.npz feeds kd_losses/minillm.py."""

import torch

from kd_losses.minillm import MiniLLM, ReverseKL, lm_term, rollout
from tests.methods.shared import Case

exceptions = {'no_labels': 'every image counts, a label masks a position of a text only'}
cases = {
    'minillm': """
loss = m.MiniLLM()
y, out_s, out_t = torch.arange(n * 5).reshape(n, 5) % K, S(n, 5, K), T(n, 5, K)
inputs = {'out_s': out_s, 'out_t': out_t, 'tokens': y, 'mask': torch.ones(n, 5, dtype=torch.bool)}
inputs |= {'logp_old': T(n, 5), 'reward': T(n, 5), 'weight': T(n, 5)}
""",
    'minillm_reverse': """
loss = m.ReverseKL()
y = torch.arange(n * 5).reshape(n, 5) % K
y[:, 2] = -100
inputs = {'out_s': S(n, 5, K), 'out_t': T(n, 5, K), 'target': y}
""",
}


def golden(z):
    loss = MiniLLM(**z.hp('gamma', 'clip'))
    out_t, out_old, tokens, mask = (z.input(name) for name in ('out_t', 'out_old', 'tokens', 'mask'))
    sampled = rollout(out_old, out_t, tokens, mask, **z.hp('mix', 'reward_scale', 'reward_clip'))
    for x, name in zip(sampled, ('logp_old', 'reward', 'weight')):
        z.compare(f'out_{name}', x)
    logs = [x.log_softmax(-1).gather(2, tokens[..., None])[..., 0].detach() for x in (out_t, out_old)]
    d = (logs[0] - logs[1]) * mask
    z.compare('out_rev_kl', d.exp() - 1 - d)
    R, A = loss.advantage(sampled[1], mask)
    z.compare('out_return', R)
    z.compare('out_advantage', A)

    def call(of):
        return lambda out_s: of(out_s, out_t, tokens, mask, *sampled)

    target = torch.where(mask != 0, tokens, -100)
    calls = {
        '': call(loss),
        '_pg': call(lambda *x: loss.terms(*x)[0]),
        '_reg': lambda out_s: ReverseKL()(out_s, out_t, target),
    }
    for suffix, f in calls.items():
        out_s = z.input('out_s')
        yield Case(f, {'out_s': out_s}, f'loss{suffix}', {f'grad_out_s{suffix}': out_s})
    z.compare('loss_reg', call(loss.terms)(z.input('out_s'))[1])
    assert out_t.grad is None and out_old.grad is None
    inputs = {name: z.input(f'{name}_lm') for name in ('out_s', 'out_t', 'target')}
    ratio = z.hp('kd_ratio')
    yield Case(lambda **x: lm_term(**x, **ratio), inputs, 'loss_lm', {'grad_out_s_lm': inputs['out_s']})
