"""How subtask.npz feeds ka_losses/subtask.py, and how it is called on random tensors."""

from ka_losses.subtask import SubTask
from tests.methods.shared import listed, terms_of

exceptions = {'one_logit': 'its constructor refuses it, which test_ka_contract.py tests'}
cases = {
    'subtask': """
loss = m.SubTask([0, 3], K)
inputs = {'out_s': S(n, 2), 'out_adv': S(n, K - 2), 'out_t': T(n, K)}
""",
}


def golden(z):
    loss = SubTask(z.arrays['hp_sub_classes'].tolist(), z.shape('in_out_t')[1], **z.hp('lambda_adv', 'T'))
    names = ['out_s', 'out_adv', 'out_t']

    def call(x, **options):
        return loss(x['out_s'], x['out_adv'], x['out_t'], **options)

    terms_of(z, loss, call, names, {'sub': 'loss_sub', 'adv': 'loss_adv_kl'})
    made = listed(z, loss, call, names)
    made.grads['grad_out_adv_main'] = made.inputs['out_adv']
    yield made
    head = listed(z, loss, lambda x: loss.adv_loss(x['out_adv'], x['out_t']), ['out_adv', 'out_t'])
    head.loss, head.grads = 'loss_adv', {'grad_out_adv_head': head.inputs['out_adv']}
    yield head
