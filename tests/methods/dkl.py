"""How dkl.npz feeds kd_losses/dkl.py."""

import torch

from kd_losses.dkl import DKL, ClassPrior, _Table
from tests.methods.shared import case

MASKED = 'a class that the teacher rules out has weight 0, in both terms'
rows = {
    'dkl': {'masked_class': MASKED, 'no_labels': 'without a prior forward reads none'},
    'dkl_gkl': {
        'masked_class': MASKED,
        'class_by_class': 'the prior is a distribution of every class over the classes',
    },
}


def golden(z):
    hp = z.hp('alpha', 'beta', 'T', 'T2')
    ikl, gkl = DKL(**hp), DKL(**hp, **z.hp('gamma'), reduction='weights')
    prior = z.input('prior').detach()
    for loss, suffix in ((ikl, ''), (ikl, '_ikl'), (gkl, '_gkl')):
        yield case(z, loss, 'out_s', 'out_t', suffix=suffix)
    for loss, suffix in ((ikl, '_ikl_prior'), (gkl, '_gkl_prior')):
        yield case(
            z, loss, 'out_s', 'out_t', 'target', suffix=suffix, call=lambda k=loss, **x: k(**x, prior=prior)
        )
    out_s, out_t, target = z.input('out_s'), z.input('out_t'), z.input('target')
    wmse, sce = ikl.terms(out_s, out_t)
    z.compare('loss_ikl_mse', wmse)
    z.compare('loss_sce', sce)
    z.compare('loss_gkl_mse', gkl.terms(out_s, out_t)[0])

    table = ClassPrior(out_s.shape[1]).double()
    assert table.prior[0, 0] == 1 / out_s.shape[1], 'rounded'
    first = table.prior.clone()
    table.update(out_t, target, hp['T2'])
    z.compare('out_prior_sum', table.sums)
    after = table.close()
    assert not table.sums.any()
    seen = torch.isin(torch.arange(len(after)), target)
    torch.testing.assert_close(after.sum(dim=1), torch.ones(len(after)).double())
    trainer = _Table(len(after)).double()  # closes by itself when another epoch begins
    for epoch, wanted in ((0, first), (0, first), (1, after), (1, after)):
        assert torch.equal(trainer.at(epoch), wanted)
        if epoch == 0 and not trainer.sums.any():
            trainer.update(out_t, target, hp['T2'])
    assert not trainer.sums.any()
    assert torch.equal(after[~seen], first[~seen]) and not torch.equal(after[seen], first[seen])
