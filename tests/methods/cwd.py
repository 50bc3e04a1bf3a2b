"""How cwd.npz feeds kd_losses/cwd.py, and how it is called on random tensors."""

from kd_losses.cwd import CWD
from kd_losses.st import SoftTarget
from tests.methods.shared import case, parameters

cases = {
    'cwd': """
loss = m.CWD()
inputs = {'fm_s': S(n, 5, 4, 3), 'fm_t': T(n, 5, 4, 3)}
""",
    'cwd_connector': """
loss = m.CWD(4, 6, tau=1.0)
inputs = {'fm_s': S(n, 4, 5, 3), 'fm_t': T(n, 6, 5, 3)}
""",
}
rows = {'cwd': {}, 'cwd_connector': {'layers': 'the connector'}}


def golden(z):
    loss = CWD(**z.hp('tau'))
    yield case(z, loss, 'out_s', 'out_t', call=lambda out_s, out_t: loss(out_s, out_t))
    # the authors' option 'spatial' is soft targets per pixel
    pixels = (z.input(f'out_{side}').movedim(1, -1).flatten(0, 2) for side in 'st')
    z.compare('loss_spatial', SoftTarget(T=loss.tau)(*pixels))
    loss = CWD(z.shape('in_fm_s')[1], z.shape('in_fm_t')[1], **z.hp('tau'))
    roles = {'conv_w': 'connector.0.weight', 'bn_w': 'connector.1.weight', 'bn_b': 'connector.1.bias'}
    made = case(z, loss, 'fm_s', 'fm_t', suffix='_fm', more=parameters(z, loss, roles))
    made.grads['grad_fm_s'] = made.inputs['fm_s']
    yield made
