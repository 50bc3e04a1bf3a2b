"""How deit.npz feeds kd_losses/deit.py."""

import torch

from kd_losses.deit import DeiT
from tests.methods.shared import case, leaf

exceptions = {
    'masked_class': 'the divergence is weighed by probabilities, a class of probability 0 counts nothing',
    'labels_in_part': 'the distillation head needs no label',
}
alone = """
loss = m.DeiT()
inputs = {'out_s': S(n, 7), 'out_dist': S(n, 7), 'out_t': T(n, 7), 'target': torch.arange(n)}
"""
VARIANTS = {
    '': {},
    '_hard': {},
    '_soft': {'mode': 'soft'},
    '_soft_batchmean': {'mode': 'soft', 'reduction': 'batchmean'},
    '_hard_mixup': {},
    '_soft_mixup': {'mode': 'soft'},
}


def golden(z):
    names = ('out_s', 'out_dist', 'out_t', 'target')
    for suffix, options in VARIANTS.items():
        loss = DeiT(**z.hp('alpha', 'tau'), **options)
        rename = {'target': 'target_soft'} if 'mixup' in suffix else None
        yield case(z, loss, *names, suffix=suffix, rename=rename)

    # a row of -100 is left out of base alone
    out_s, out_dist, out_t, target = (z.input(name) for name in names)
    base, dist = loss.terms(out_s, out_dist, out_t, target.masked_fill(torch.arange(len(target)) == 1, -100))
    rest = [i for i in range(len(target)) if i != 1]
    torch.testing.assert_close(base, loss.terms(*(x[rest] for x in (out_s, out_dist, out_t, target)))[0])
    assert torch.equal(dist, loss.terms(out_s, out_dist, out_t, target)[1])
    # in hard mode argmax must not hide what is not finite
    for bad in (torch.nan, torch.inf):
        assert loss_of_broken(bad).isnan()


def loss_of_broken(bad):
    out_t = torch.zeros(3, 4)
    out_t[1, 2] = bad
    return DeiT()(torch.zeros(3, 4), torch.zeros(3, 4), out_t, torch.arange(3))


def extra(n, dtype, num_classes):
    """What a transformer with two heads hands out: the logits of both."""
    return [leaf(n, num_classes, dtype=dtype) for _ in range(2)]
