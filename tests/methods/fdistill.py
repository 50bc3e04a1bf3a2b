"""How fdistill.npz feeds kd_losses/fdistill.py."""

from kd_losses.fdistill import FDistill
from tests.methods.shared import case

ARGS = ('out_s', 'out_t', 'target', 'out_s_gen', 'out_t_gen', 'target_gen')

exceptions = {'no_labels': 'every image counts, a label masks a position of a text only'}
cases = {
    'fdistill': """
loss = m.FDistill()
y = torch.arange(n * 5).reshape(n, 5) % K
y[:, 2] = -100
inputs = {'out_s': S(n, 5, K), 'out_t': T(n, 5, K), 'target': y}
inputs |= {'out_s_gen': S(n, 4, K), 'out_t_gen': T(n, 4, K), 'target_gen': y[:, 1:]}
""",
    'fdistill_js': """
loss = m.FDistill('js')
y = torch.arange(n * 5).reshape(n, 5) % K
y[:, 2] = -100
inputs = {'out_s': S(n, 5, K), 'out_t': T(n, 5, K), 'target': y}
inputs |= {'out_s_gen': S(n, 4, K), 'out_t_gen': T(n, 4, K), 'target_gen': y[:, 1:]}
""",
}


def golden(z):
    hp = z.hp('beta', 'T')
    for kind, suffix in (('tvd', ''), ('js', '_js'), ('kl', '_kl'), ('rkl', '_rkl')):
        yield case(z, FDistill(kind, **hp), *ARGS, suffix=suffix)
    for kind in ('tvd', 'js'):
        terms = FDistill(kind, **hp).terms(*(z.input(name) for name in ARGS))
        for term, name in zip(terms, ('teacher', 'gen')):
            z.compare(f'loss_{kind}_{name}', term)
