"""How uld.npz feeds kd_losses/uld.py."""

from kd_losses.uld import ULD
from tests.methods.shared import case

alone = """
loss = m.ULD()
y = torch.ones(n, 5).long()
inputs = {'out_s': S(n, 5, 7), 'out_t': T(n, 4, 9), 'target': y, 'target_t': y[:, :4]}
"""


def golden(z):
    loss = ULD(**z.hp('T_s', 'T_t', 'skip_eos_s', 'skip_eos_t'))
    args = ('out_s', 'out_t', 'target', 'target_t')
    yield case(z, loss, *args)
    z.compare('out_sample', loss.per_sample(*(z.input(name) for name in args)))
