"""How dml.npz feeds kd_losses/dml.py."""

import torch

from kd_losses.dml import DML
from tests.methods.shared import case

exceptions = {
    'gradient_not_of_value': 'each network is a constant for the others',
    'any_length': 'peers',
}


def golden(z):
    yield case(z, DML(), 'out_s', 'out_t', call=lambda out_s, out_t: DML()(out_s, out_t))
    outs = z.input('outs')
    for how in ('mean', 'sum'):
        loss = DML(how)
        rows = [loss(outs[k], [x for i, x in enumerate(outs) if i != k]) for k in range(len(outs))]
        z.compare(f'loss_peers_{how}', torch.stack(rows))
        if how == 'mean':
            (grad,) = torch.autograd.grad(sum(rows), outs)  # peers are detached: the rows do not mix
            z.compare('grad_outs_peers_mean', grad)
