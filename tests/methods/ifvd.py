"""How ifvd.npz feeds kd_losses/ifvd.py, and how it is called on random tensors."""

from kd_losses.ifvd import IFVD
from tests.methods.shared import case

cases = {
    'ifvd': """
loss = m.IFVD(K)
inputs = {'fm_s': S(n, 4, 3, 5), 'fm_t': T(n, 6, 3, 5), 'target': torch.arange(n * 42) % 4 % 3}
inputs['target'] = inputs['target'].reshape(n, 6, 7)
inputs['target'][:, 0, 2:4] = -1
inputs['target'][:, 2, :2] = -100
""",
}
exceptions = {'any_size': {'target': 'labels are brought to the size of the map'}}


def golden(z):
    target = z.input('target')
    K = z.hp('num_classes')['num_classes']
    marks = [y for y in target.unique().tolist() if not 0 <= y < K and y != -100]
    loss = IFVD(K, *marks)
    yield case(z, loss, 'fm_s', 'fm_t', 'target')
