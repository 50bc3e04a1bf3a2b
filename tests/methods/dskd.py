"""How dskd.npz feeds kd_losses/dskd.py."""

from kd_losses.dskd import DSKD, DSKDCMA
from tests.methods.shared import case, parameters

S = ('out_s', 'hid_s', 'head_s')
T = ('out_t', 'hid_t', 'head_t')
TERMS = ('ce', 'student_space', 'teacher_space')


def roles(*maps: str) -> dict:
    return {f'{name}_{kind[0]}': f'{name}.{kind}' for name in maps for kind in ('weight', 'bias')}


def expected(filled: dict, of: str = '') -> dict:
    return {key.replace('gradparam_', f'gradparam_{of}'): p for key, p in filled.items()}


cases = {
    'dskd': """
loss = m.DSKD(4, 6)
y = torch.arange(n * 5).reshape(n, 5) % K
inputs = {'out_s': S(n, 5, K), 'hid_s': S(n, 5, 4), 'head_s': T(K, 4)}
inputs |= {'out_t': T(n, 5, K), 'hid_t': T(n, 5, 6), 'head_t': T(K, 6), 'target': y}
""",
    'dskd_cma': """
loss = m.DSKDCMA(4, 6)
y = torch.arange(n * 5).reshape(n, 5) % K
y_t = torch.arange(n * 4).reshape(n, 4) % (K + 2)
inputs = {'out_s': S(n, 5, K), 'hid_s': S(n, 5, 4), 'head_s': T(K, 4), 'emb_s': T(K, 4), 'input_s': y,
          'out_t': T(n, 4, K + 2), 'hid_t': T(n, 4, 6), 'head_t': T(K + 2, 6), 'emb_t': T(K + 2, 6),
          'input_t': y_t, 'target': y.roll(1, 1), 'target_t': y_t}
""",
}
exceptions = {'layers': 'the linear maps'}


def golden(z):
    dims = z.shape('in_hid_s')[2], z.shape('in_hid_t')[2]
    loss = DSKD(*dims, **z.hp('T'))
    filled = parameters(z, loss, roles('t2s', 's2t'))
    names = (*S, *T, 'target')
    one = case(z, loss, *names, more=filled)
    yield one
    check_terms(z, loss, one.inputs, 'loss')

    loss = DSKDCMA(*dims, **z.hp('T', 'T_t'))
    filled = parameters(z, loss, roles('t2s', 's2t', 'query'))
    names = (*S, 'emb_s', 'input_s', *T, 'emb_t', 'input_t', 'target', 'target_t')
    one = case(z, loss, *names, rename={name: f'cma_{name}' for name in names}, more=expected(filled, 'cma_'))
    one.loss, one.grads = (
        'loss_cma',
        {
            key if key.startswith('gradparam') else key.replace('grad_', 'grad_cma_'): x
            for key, x in one.grads.items()
        },
    )
    yield one
    check_terms(z, loss, one.inputs, 'loss_cma')


def check_terms(z, loss, inputs, key):
    for term, name in zip(loss.terms(**inputs), TERMS):
        z.compare(f'{key}_{name}', term)
