"""How fastdfkd.npz feeds dfkd_losses/fastdfkd.py, and how it is called on random tensors."""

import torch

from dfkd_losses.fastdfkd import MomentumBNStatistics

cases = {
    'fastdfkd': """
loss = torch.nn.Identity()
call = m.masked_adversarial
inputs = {'out_s': S(n, K), 'out_t': S(n, K)}
""",
}


def golden(z):
    norm = torch.nn.BatchNorm2d(z.shape('in_bn_mean')[0]).double().eval().requires_grad_(False)
    norm.running_mean.copy_(z.input('bn_mean').detach())
    norm.running_var.copy_(z.input('bn_var').detach())
    loss, call = MomentumBNStatistics(norm, z.hp('bn_mmt')['bn_mmt']), 0
    while f'in_x{call}_0' in z:
        step = 0
        while f'in_x{call}_{step}' in z:
            x = z.input(f'x{call}_{step}')
            norm(x)
            value = loss.loss()
            z.compare(f'loss{call}_{step}', value)
            value.backward()
            z.compare(f'grad_x{call}_{step}', x.grad)
            step += 1
        loss.update()
        call += 1
    z.compare('loss', value)
    z.compare('out_mmt_mean', loss.mean0)
    z.compare('out_mmt_var', loss.var0)
    return ()
