"""How sakd.npz feeds kd_losses/sakd.py."""

import torch

from kd_losses.sakd import SAKD, choose, select_and_scale
from kd_losses.st import SoftTarget
from tests.methods.shared import Case

exceptions = {
    'gradient_not_of_value': 'the choice of spots is a constant for the student, with a softened gradient',
    'labels_in_part': 'soft targets need no label',
    'layers': 'the policy, the adapters and the networks',
    'masked_class': 'the divergence is weighed by probabilities, a class of probability 0 counts nothing',
    'no_meta': 'draws on the generator of the batch',
    'not_compiled': 'it runs the networks in eval mode in between',
}
alone = """
loss = m.SAKD(4, 6, [4, 8], [6, 8])
inputs = {'fms_s': [S(n, 4, 6, 6), S(n, 8, 3, 3)], 'out_s': S(n, 7), 'out_t': T(n, 7),
          'fms_t': [T(n, 6, 6, 6), T(n, 8, 3, 3)], 'mask': torch.ones(n, 3)}
"""


def golden(z):
    tau, T, gamma = z.hp('tau', 'T', 'gamma').values()
    policy = z.input('policy')
    action, soft = choose(policy, z.input('gumbel'), tau)
    z.compare('out_action', action)
    z.compare('out_soft', soft)
    (grad,) = torch.autograd.grad((action[:, :, 0] * z.input('w')).sum(), policy, retain_graph=True)
    z.compare('grad_policy', grad)

    last, out_t = action[:, -1, 0], z.input('out_t').detach()
    whole = SAKD(1, 1, [], [], T=T)
    for call in (
        lambda out_s: select_and_scale(SoftTarget(T=T), last, out_s, out_t),
        lambda out_s: whole([], out_s, [], out_t, last[:, None]),
    ):
        for key in ('loss', 'loss_div'):
            inputs = {'out_s': z.input('out_s')}
            yield Case(call, inputs, key, {'grad_out_s': inputs['out_s']})

    for kind in ('low', 'high'):
        policy, s, t = z.input('policy'), z.input('graft_s'), z.input('graft_t')
        last = choose(policy, z.input('gumbel'), tau)[0][:, -1, 0]
        logit = (1 - last[:, None]) * s + last[:, None] * t
        if kind == 'low':
            z.compare('out_graft_logit', logit)
        own = z.input(f'student_ce_{kind}').detach()
        value = SAKD.policy_objective(logit, z.input('target'), own, last, gamma)
        z.compare(f'loss_policy_{kind}', value)
        if kind == 'low':
            value.backward()
            for name, x in (('policy', policy), ('graft_s', s), ('graft_t', t)):
                z.compare(f'grad_{name}_low', x.grad)
