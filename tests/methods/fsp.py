"""How fsp.npz feeds kd_losses/fsp.py."""

from kd_losses.fsp import FSP
from tests.methods.shared import case

exceptions = {
    'equal_channels': 'its matrices are of channels by channels',
}


def golden(z):
    names = ('fm_s1', 'fm_s2', 'fm_t1', 'fm_t2')
    for suffix, pool in (('', 'avg'), ('_max', 'max')):
        one = case(z, FSP(pool), *names, suffix=suffix)
        one.grads = {f'grad_{name}{suffix}': one.inputs[name] for name in names[:2]}
        yield one
