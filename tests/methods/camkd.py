"""How camkd.npz feeds kd_losses/camkd.py."""

import torch
import torch.nn.functional as F

from kd_losses.camkd import CAMKD
from tests.methods.shared import Case, case

exceptions = {
    'any_length': 'any number of teachers',
    'layers': "the adapters and the teachers' classifiers",
    'masked_class': 'the divergence is weighed by probabilities, a class of probability 0 counts nothing',
}


def golden(z):
    loss = CAMKD(**z.hp('T'))
    logits = lambda out_s, out_t, target: loss(out_s, out_t, target)  # noqa: E731
    yield case(z, loss, 'out_s', 'out_t', 'target', call=logits)
    yield Case(logits, {name: z.input(name) for name in ('out_s', 'out_t', 'target')}, 'loss_kd')
    target = z.input('target')
    z.compare('out_weight', loss.weights(z.input('out_t'), target))

    teachers = range(z.shape('in_out_t')[0])
    maps = {f'fm_s{m}': z.input(f'fm_s{m}') for m in teachers}
    fms_t = [z.input(f'fm_t{m}') for m in teachers]

    def outs_feat(maps):
        heads = [(z.input(f't_fc{m}_weight'), z.input(f't_fc{m}_bias')) for m in teachers]
        return [F.linear(fm.mean(dim=(2, 3)), *head) for fm, head in zip(maps.values(), heads)]

    z.compare('out_weight_feat', loss.weights(torch.stack(outs_feat(maps)), target))
    yield Case(
        lambda **x: loss.feature_loss(list(x.values()), fms_t, outs_feat(x), target),
        maps,
        'loss_feat',
        {f'grad_{name}': fm for name, fm in maps.items()},
    )
    assert all(fm.grad is None for fm in fms_t), 'a gradient reaches a teacher'
