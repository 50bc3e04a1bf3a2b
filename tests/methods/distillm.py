"""How distillm.npz feeds kd_losses/distillm.py."""

import torch

from kd_losses.distillm import DistiLLM, SampleSchedule
from tests.methods.shared import case

exceptions = {'no_labels': 'every image counts, a label masks a position of a text only'}
cases = {
    'distillm': """
loss = m.DistiLLM()
y = torch.arange(n * 5).reshape(n, 5) % K
y[:, 2] = -100
inputs = {'out_s': S(n, 5, K), 'out_t': T(n, 5, K), 'target': y}
""",
    'distillm_reverse': """
loss = m.DistiLLM(reverse=True)
y = torch.arange(n * 5).reshape(n, 5) % K
y[:, 2] = -100
inputs = {'out_s': S(n, 5, K), 'out_t': T(n, 5, K), 'target': y}
""",
}


def golden(z):
    args, hp = ('out_s', 'out_t', 'target'), z.hp('alpha')
    first = case(z, DistiLLM(**hp), *args)
    yield first
    yield case(z, DistiLLM(**hp, reverse=True), *args, suffix='_reverse')
    yield case(z, DistiLLM(0.0), *args, suffix='_alpha0')
    yield case(z, DistiLLM(0.0, reverse=True), *args, suffix='_reverse_alpha0')

    # the authors' own value has the teacher's entropy in it
    log_p = z.input('out_t').log_softmax(dim=-1)[z.input('target') != -100]
    entropy = -(log_p.exp() * log_p).sum(dim=-1).mean()
    z.compare('out_entropy_t', entropy)
    with torch.no_grad():
        z.compare('loss_ce', DistiLLM(**hp)(*first.inputs.values()) + entropy)

    schedule = SampleSchedule(eps=z.hp('loss_eps')['loss_eps'])
    thresholds = [schedule.update(loss) for loss in z.input('val_losses').tolist()]
    z.compare('out_threshold', torch.tensor(thresholds, dtype=torch.float64))
