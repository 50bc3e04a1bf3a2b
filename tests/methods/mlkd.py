"""How mlkd.npz feeds kd_losses/mlkd.py."""

from kd_losses.mlkd import MLKD
from tests.methods.shared import case

exceptions = {
    'masked_class': 'the divergence is weighed by probabilities, a class of probability 0 counts nothing',
}
rows = {
    'mlkd_strong': {
        'coarse': 'the teacher on the strong view',
        'unlabelled_counts': 'the cross-entropy of the trainer',
        'layers': 'the teacher on the strong view',
        'no_meta': 'runs networks',
    },
}


def golden(z):
    temps = tuple(z.arrays['hp_temps'].tolist())
    names = ('out_s', 'out_t', 'out_s_strong', 'out_t_strong')
    two = MLKD(temps, two_view=True)
    both = case(z, two, *names)
    both.grads['grad_out_s_strong'] = both.inputs['out_s_strong']
    yield both
    for i, term in enumerate(('kd', 'bc', 'cc')):
        yield case(z, two, *names, suffix=f'_{term}', call=lambda i=i, **x: two.terms(**x)[i])
    one = MLKD(temps)
    yield case(z, one, 'out_s', 'out_t', suffix='_paper')
    for i, term in enumerate(('instance', 'batch', 'class')):
        yield case(z, one, 'out_s', 'out_t', suffix=f'_paper_{term}', call=lambda i=i, **x: one.terms(**x)[i])
