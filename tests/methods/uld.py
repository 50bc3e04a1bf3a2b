"""How uld.npz feeds kd_losses/uld.py."""

from kd_losses.uld import ULD
from tests.methods.shared import case

cases = {
    'uld': """
loss = m.ULD(skip_eos_s=False)
y = torch.arange(n * 5).reshape(n, 5) % K
inputs = {'out_s': S(n, 5, K), 'out_t': T(n, 5, K + 2), 'target': y, 'target_t': y}
""",
}
exceptions = {'any_size': {'out_s': 'any vocabulary', 'out_t': 'any vocabulary'}}


def golden(z):
    loss = ULD(**z.hp('T_s', 'T_t', 'skip_eos_s', 'skip_eos_t'))
    args = ('out_s', 'out_t', 'target', 'target_t')
    yield case(z, loss, *args)
    z.compare('out_sample', loss.per_sample(*(z.input(name) for name in args)))
