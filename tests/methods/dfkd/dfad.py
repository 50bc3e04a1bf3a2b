"""How dfad.npz feeds dfkd_losses/dfad.py, and how it is called on random tensors."""

from dfkd_losses.dfad import DFAD
from tests.methods.shared import case

cases = {
    'dfad': """
loss = m.DFAD()
inputs = {'out_s': S(n, K), 'out_t': T(n, K)}
""",
    'dfad_generator': """
loss = m.DFAD()
call = loss.generator_loss
inputs = {'out_s': S(n, K), 'out_t': S(n, K)}
""",
    'dfad_generator_log': """
loss = m.DFAD(log=True)
call = loss.generator_loss
inputs = {'out_s': S(n, K), 'out_t': S(n, K)}
""",
}


def golden(z):
    loss = DFAD()
    yield case(z, loss, 'out_s', 'out_t')
    yield case(z, loss, 'out_s', 'out_t', suffix='_s')
    for key, module in (('g', DFAD()), ('glog', DFAD(log=True))):
        out_s, out_t = z.input('out_s'), z.input('out_t')
        value = module.generator_loss(out_s, out_t)
        z.compare({'g': 'loss_g', 'glog': 'loss_g_log'}[key], value)
        value.backward()
        z.compare(f'grad_{key}_out_s', out_s.grad)
        z.compare(f'grad_{key}_out_t', out_t.grad)


def one_logit(inputs):
    return {name: out[:, :1] for name, out in inputs.items()}
