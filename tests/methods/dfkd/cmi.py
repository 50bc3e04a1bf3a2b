"""How cmi.npz feeds dfkd_losses/cmi.py, and how it is called on random tensors."""

from dfkd_losses.cmi import CMI, masked_adversarial
from tests.methods.shared import Case, case, parameters

ROLES = {f'fc{k}_{kind}': f'fc{k}.{kind}' for k in (1, 2) for kind in ('weight', 'bias')}
cases = {
    'cmi': """
loss = m.CMI(5, 4)
inputs = {'local': S(n, 5), 'global_': T(n, 5), 'bank': T(8, 10)}
""",
    'cmi_adversarial': """
loss = torch.nn.Identity()
call = m.masked_adversarial
inputs = {'out_s': S(n, K), 'out_t': S(n, K)}
""",
}
exceptions = {
    'any_size': {'bank': 'the bank may hold any number of rows'},
    'layers': "the head's layers round as the user has asked",
}


def golden(z):
    loss = CMI(z.shape('in_local')[1], z.shape('param_fc2_weight')[0], **z.hp('T')).double()
    more = parameters(z, loss, ROLES)

    def call(**x):
        value = loss(x['local'], x['global'], x.get('bank'))
        if 'bank' in x:
            z.compare('loss_cr', value)
        return value

    names = ('local', 'global', 'bank')
    full = case(z, loss, *names, call=call, more=more)
    grads = {key: x for key, x in full.grads.items() if key != 'grad_global'}
    full.grads = grads
    yield full
    assert full.inputs['global'].grad is None and not z.arrays['grad_global'].any()
    z.open.discard('grad_global')  # zeros there, none here
    loss.zero_grad()
    local, global_ = z.input('local'), z.input('global')
    yield Case(
        lambda local: loss(local, global_), {'local': local}, 'loss_cr_empty', {'grad_local_empty': local}
    )
    out_s, out_t = z.input('out_s'), z.input('out_t')
    value = masked_adversarial(out_s, out_t)
    z.compare('loss_adv', value)
    value.backward()
    z.compare('grad_adv_out_s', out_s.grad)
    z.compare('grad_adv_out_t', out_t.grad)
