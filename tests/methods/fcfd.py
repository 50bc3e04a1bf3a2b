"""How fcfd.npz feeds kd_losses/fcfd.py."""

from kd_losses.fcfd import FCFD
from tests.methods.shared import case

exceptions = {
    'not_compiled': 'the paths are drawn by the host',
    'resting': ('bridges_s', 'only the bridges of the paths drawn in a step learn'),
    'any_length': 'paths',
    'coarse': 'mixed paths',
    'unlabelled_counts': 'its networks',
    'layers': 'mixed paths',
    'no_meta': 'runs networks',
    'own_order': 'its page fixes the order of the arguments',
    'masked_class': 'the divergence is weighed by probabilities, a class of probability 0 counts nothing',
}
alone = """
loss = m.FCFD([4, 8], [4, 8])
inputs = {'maps': [[S(n, 4, 6, 6)], [S(n, 8, 3, 3)]], 'fms_t': [T(n, 4, 6, 6), T(n, 8, 3, 3)],
          'out_s': S(n, 7), 'out_t': T(n, 7), 'outs_mix': [S(n, 7), S(n, 7)]}
"""


def golden(z):
    loss = FCFD([1], [1], **z.hp('T', 'l2_weight'))
    names = ('fm_bridged', 'fm_t', 'out_s', 'out_mix', 'out_t')

    def whole(fm_bridged, fm_t, out_s, out_mix, out_t):
        return loss([[fm_bridged], [fm_bridged]], [fm_t, fm_t], out_s, out_t, [out_mix])

    yield case(z, loss, *names, call=whole)
    pair = ('fm_bridged', 'fm_t')
    for suffix, last in (('_app_mid', False), ('_app_final', True)):
        one = lambda fm_bridged, fm_t, last=last: loss.appearance([fm_bridged], fm_t, last)  # noqa: E731
        yield case(z, loss, *pair, suffix=suffix, call=one)
    for suffix, name in (('_kl_student', 'out_s'), ('_kl_mix', 'out_mix')):
        kl = lambda name=name, **x: loss.divergence(x[name], x['out_t'])  # noqa: E731
        yield case(z, loss, name, 'out_t', suffix=suffix, call=kl)
