"""How recombination.npz feeds ka_losses/recombination.py, and how it is called on random tensors."""

import torch
from torch import nn

from ka_losses.recombination import RangeQuantizer, SoftFocal, combine_bns, combine_convs
from tests.methods.shared import fill, listed, many

cases = {
    'recombination': """
loss = m.SoftFocal(gamma=2.0)
inputs = {'out_s': S(n, K, 3, 4), 'out_t': T(n, K, 3, 4)}
""",
}


def golden(z):
    inputs = [z.input(name).detach() for name in many(z, 'x_')]
    convs, bns = [], []
    for i in range(len(inputs)):
        weight = z.param(f'conv{i}_weight')
        conv = nn.Conv2d(weight.shape[1], weight.shape[0], weight.shape[2:], padding=1)
        fill(conv, {'weight': weight, 'bias': z.param(f'conv{i}_bias')})
        bn = nn.BatchNorm2d(len(weight)).eval()
        fill(bn, {'weight': z.param(f'bn{i}_weight'), 'bias': z.param(f'bn{i}_bias')})
        bn.running_mean.copy_(z.param(f'bn{i}_mean'))
        bn.running_var.copy_(z.param(f'bn{i}_var'))
        convs.append(conv)
        bns.append(bn)
    joined = combine_convs(convs)
    z.compare('out_conv_weight', joined.weight)
    z.compare('out_y', combine_bns(bns).eval()(joined(torch.cat(inputs, dim=1))))
    x = z.input('quant_x')
    symbols = RangeQuantizer(**{'levels': z.hp('quant_levels')['quant_levels']})(x)
    z.compare('out_quant_symbols', symbols.detach().round())
    z.compare('out_quant', symbols)
    (symbols * z.input('quant_cotangent').detach()).sum().backward()
    z.compare('grad_quant_x', x.grad)
    for gamma, key, suffix in ((0.0, 'loss', ''), (2.0, 'loss_soft_focal_g2', '_g2')):
        loss = SoftFocal(gamma)
        made = listed(z, loss, lambda x, a=loss: a(x['seg_s'], x['seg_t']), ['seg_s', 'seg_t'], suffix=suffix)
        made.loss = key
        yield made


def one_logit(inputs):
    one = inputs['out_s'][:, :1]
    return inputs | {'out_s': one, 'out_t': one}
