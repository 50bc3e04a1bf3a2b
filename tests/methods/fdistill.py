"""How fdistill.npz feeds kd_losses/fdistill.py."""

from kd_losses.fdistill import FDistill
from tests.methods.shared import case

ARGS = ('out_s', 'out_t', 'target', 'out_s_gen', 'out_t_gen', 'target_gen')


def golden(z):
    hp = z.hp('beta', 'T')
    for kind, suffix in (('tvd', ''), ('js', '_js'), ('kl', '_kl'), ('rkl', '_rkl')):
        yield case(z, FDistill(kind, **hp), *ARGS, suffix=suffix)
    for kind in ('tvd', 'js'):
        terms = FDistill(kind, **hp).terms(*(z.input(name) for name in ARGS))
        for term, name in zip(terms, ('teacher', 'gen')):
            z.compare(f'loss_{kind}_{name}', term)
