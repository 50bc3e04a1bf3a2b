"""How akl.npz feeds kd_losses/akl.py."""

from kd_losses.akl import AKL
from tests.methods.shared import case

cases = {
    'akl': """
loss = m.AKL()
y = torch.arange(n * 5).reshape(n, 5) % K
y[:, 2] = -100
inputs = {'out_s': S(n, 5, K), 'out_t': T(n, 5, K), 'target': y}
""",
}
CONSTANT = 'the share of the head is a constant by definition'
exceptions = {
    'no_labels': 'every image counts, a label masks a position of a text only',
    'no_gradcheck': CONSTANT,
    'gradient_not_of_value': CONSTANT,
}


def golden(z):
    loss = AKL(**z.hp('mu'))
    args = ('out_s', 'out_t', 'target')
    yield case(z, loss, *args)
    for term, name in zip(loss.terms(*(z.input(name) for name in args)), ('head', 'tail')):
        z.compare(f'loss_{name}', term)
    z.compare('out_head_ratio', loss.head_ratio(z.input('out_s'), z.input('out_t')))
