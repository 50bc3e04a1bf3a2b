"""How abkd.npz feeds kd_losses/abkd.py."""

from kd_losses.abkd import ABKD
from tests.methods.shared import case

exceptions = {'no_labels': 'every image counts, a label masks a position of a text only'}
cases = {
    'abkd': """
loss = m.ABKD()
y = torch.arange(n * 5).reshape(n, 5) % K
y[:, 2] = -100
inputs = {'out_s': S(n, 5, K), 'out_t': T(n, 5, K), 'target': y}
""",
    'abkd_limits': """
loss = m.ABKD(alpha=0.0, beta=1.0, T=2.0)
y = torch.arange(n * 5).reshape(n, 5) % K
y[:, 2] = -100
inputs = {'out_s': S(n, 5, K), 'out_t': T(n, 5, K), 'target': y}
""",
}


def golden(z):
    a, b, T = z.hp('alpha', 'beta', 'T').values()
    variants = {
        '': (a, b), '_fkl': (1, 0), '_rkl': (0, 1), '_zero': (0, 0), '_alpha0': (0, b), '_beta0': (a, 0),
        '_sum0': (a, -a),
    }  # fmt: skip
    for suffix, powers in variants.items():
        yield case(z, ABKD(*powers, T), 'out_s', 'out_t', 'target', suffix=suffix)
