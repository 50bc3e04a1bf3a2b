"""How fedka.npz feeds ka_losses/fedka.py, and how it is called on random tensors."""

from ka_losses.fedka import FedKA, fed_average, selection_prob, transferability
from tests.methods.shared import listed, parameters, roles_of

cases = {
    'fedka': """
loss = m.FedKA(4, 6)
inputs = {'fm_s': S(n, 4, 3, 5), 'fm_t': T(n, 6, 3, 5)}
""",
}


def golden(z):
    k = z.hp('k')['k']
    loss = FedKA(z.shape('in_fm_s')[1], round(z.shape('in_fm_t')[1] / k), k)
    roles = {role: f'translator.{role.replace("_", ".")}' for role in roles_of(z)}
    more = parameters(z, loss, roles)
    z.compare('out_translated', loss.translator(z.input('fm_s')))
    tr = transferability(z.input('saliency_student').detach(), z.input('saliency_teachers').detach())
    z.compare('out_transferability', tr)
    z.compare('out_select_prob', selection_prob(tr))
    states = [{'w': w} for w in z.input('fedavg_w').detach()]
    z.compare('out_fedavg', fed_average(states, z.input('fedavg_a').detach())['w'])
    yield listed(z, loss, lambda x: loss(x['fm_s'], x['fm_t']), ['fm_s', 'fm_t'], more=more)
