"""How gkd.npz feeds kd_losses/gkd.py."""

from kd_losses.gkd import GKD
from tests.methods.shared import Case, case

exceptions = {'no_labels': 'every image counts, a label masks a position of a text only'}
cases = {
    'gkd': """
loss = m.GKD()
y = torch.arange(n * 5).reshape(n, 5) % K
y[:, 2] = -100
inputs = {'out_s': S(n, 5, K), 'out_t': T(n, 5, K), 'target': y}
""",
    'gkd_forward': """
loss = m.GKD(beta=0.0)
y = torch.arange(n * 5).reshape(n, 5) % K
y[:, 2] = -100
inputs = {'out_s': S(n, 5, K), 'out_t': T(n, 5, K), 'target': y}
""",
    'gkd_reverse': """
loss = m.GKD(beta=1.0)
y = torch.arange(n * 5).reshape(n, 5) % K
y[:, 2] = -100
inputs = {'out_s': S(n, 5, K), 'out_t': T(n, 5, K), 'target': y}
""",
}


def golden(z):
    hp = z.hp('beta', 'temperature')
    args = ('out_s', 'out_t', 'target')
    yield case(z, GKD(**hp), *args)
    for end in (0, 1):
        yield case(z, GKD(end, hp['temperature']), *args, suffix=f'_beta{end}')
    inputs = [z.input(name) for name in args]
    for reduction in ('sum', 'mean'):
        z.compare(f'loss_{reduction}', GKD(**hp, reduction=reduction)(*inputs))
        z.compare('loss_num_items', GKD(**hp, reduction=reduction)(*inputs, **z.hp('num_items')))
    z.compare('loss_all', GKD(**hp)(*inputs[:2]))
    z.compare('out_token', GKD(**hp, reduction='none')(*inputs[:2]))

    def flat(out_s, out_t, target):
        return GKD(**hp)(out_s.flatten(0, 1), out_t.flatten(0, 1), target.flatten())

    yield Case(flat, {name: z.input(name) for name in args})
