"""How sortkd.npz feeds kd_losses/sortkd.py."""

from kd_losses.dkd import DKD
from kd_losses.sortkd import SortKD, sort_logits
from tests.methods.shared import case

exceptions = {
    'masked_class': 'the divergence is weighed by probabilities, a class of probability 0 counts nothing',
}


def golden(z):
    yield case(z, SortKD(**z.hp('T')), 'out_s', 'out_t', 'target')
    z.compare('out_sorted', sort_logits(z.input('out_t'), z.input('target')))
    hp = z.hp('T', 'dkd_alpha', 'dkd_beta')
    dkd = DKD(hp['dkd_alpha'], hp['dkd_beta'], hp['T'])

    def on_sorted(out_s, out_t, target):
        return dkd(out_s, sort_logits(out_t, target), target)

    yield case(z, None, 'out_s', 'out_t', 'target', suffix='_dkd', call=on_sorted)
