"""How dafl.npz feeds dfkd_losses/dafl.py, and how it is called on random tensors."""

from dfkd_losses.dafl import DAFL
from tests.methods.shared import case

cases = {
    'dafl': """
loss = m.DAFL()
inputs = {'out_t': S(n, K), 'feat_t': S(n, 5)}
""",
    'dafl_student': """
loss = m.DAFL()
call = loss.student_loss
inputs = {'out_s': S(n, K), 'out_t': T(n, K)}
""",
}


exceptions = {
    'any_size': {'feat_t': 'an embedding may have any width', 'out_t': 'nothing else has classes'},
}


def golden(z):
    loss = DAFL(**z.hp('oh', 'ie', 'act'))
    out_t, feat_t = z.input('out_t'), z.input('feat_t')
    value = loss(out_t, feat_t)
    z.compare('loss', value)
    value.backward()
    z.compare('grad_out_t', out_t.grad)  # an image source learns through the teacher
    z.compare('grad_feat_t', feat_t.grad)
    for name, term in loss.terms(out_t, feat_t).items():
        z.compare(f'loss_{name}', term)
    kd = case(z, loss, 'out_s', 'out_t', call=loss.student_loss, suffix='_kd')
    kd.grads = {'grad_out_s': kd.inputs['out_s']}
    yield kd


def one_logit(inputs):
    return inputs | {'out_t': inputs['out_t'][:, :1]}
