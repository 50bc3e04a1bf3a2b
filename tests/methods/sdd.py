"""How sdd.npz feeds kd_losses/sdd.py."""

from kd_losses.sdd import SDD, local_logits
from tests.methods.shared import case

exceptions = {
    'layers': 'the classifiers',
}


def golden(z):
    names = ('patch_s', 'patch_t', 'target')
    yield case(z, SDD(**z.hp('T')), *names)
    yield case(z, SDD('dkd', **z.hp('T', 'alpha', 'beta')), *names, suffix='_dkd')
    fc = z.param('fc_weight'), z.param('fc_bias')
    z.compare('out_patch', local_logits(z.input('fm'), fc, tuple(z.arrays['hp_M'].tolist())))
