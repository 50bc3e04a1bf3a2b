"""How crosskd.npz feeds kd_losses/crosskd.py, and how it is called on random tensors."""

import functools

import torch

from kd_losses.crosskd import CrossKD, align, decode, giou, quality_focal
from tests.methods.shared import case

ANCHORS = 'torch.tensor([[0.0, 1, 8, 5], [4, 4, 9, 12]]).repeat(n, 1)[:n]'
cases = {
    'crosskd': f"""
import functools
loss = m.CrossKD()
loss.forward = functools.partial(loss.forward, avg_factor=2.0)
inputs = {{'out_s': S(n, K), 'out_t': T(n, K), 'reg_s': S(n, 4), 'reg_t': T(n, 4),
          'label_weight': (torch.arange(n) % 4 != 1).float(), 'anchors': {ANCHORS}}}
""",
    'crosskd_edges': """
import functools
loss = m.CrossKD(beta=2.0, T=2.0, w_reg=4.0)
loss.forward = functools.partial(loss.forward, avg_factor=2.0)
inputs = {'out_s': S(n, K), 'out_t': T(n, K), 'reg_s': S(4 * n, 6), 'reg_t': T(4 * n, 6),
          'label_weight': (torch.arange(n) % 4 != 1).float()}
""",
}
exceptions = {'empty_is_legal': 'there may be no anchor', 'one_logit': 'sigmoids, one per class'}


def golden(z):
    hp = z.hp('avg_factor')
    loss = CrossKD(**z.hp('beta', 'T'))
    weight, anchors = z.input('label_weight').detach(), z.input('anchors').detach()
    whole = {'label_weight': weight, 'anchors': anchors, **hp}
    yield case(z, loss, 'out_s', 'out_t', 'reg_s', 'reg_t', call=functools.partial(loss, **whole))
    cls = functools.partial(quality_focal, weight=weight, **hp, **z.hp('beta'))
    made = case(z, loss, 'out_s', 'out_t', suffix='_cls', call=cls)
    made.grads = {'grad_out_s': made.inputs['out_s']}
    yield made
    boxes = {side: decode(anchors, z.input(f'reg_{side}')) for side in 'st'}
    z.compare('out_boxes_s', boxes['s'])
    w = torch.where(weight == 0, 0.0, z.input('out_t').detach().amax(dim=1).sigmoid())
    z.compare('out_reg_weight', w)
    z.compare('loss_giou', (w * (1 - giou(boxes['s'], boxes['t']))).sum() / (hp['avg_factor'] + 2.0**-23))
    m = z.shape('in_dist_s')[0] // 4
    out = [z.input(f'out_{side}')[:m] for side in 'st']
    made = case(
        z, loss, 'dist_s', 'dist_t', suffix='_kl',
        call=lambda dist_s, dist_t: loss.terms(*out, dist_s, dist_t, weight[:m], **hp)[1],
    )  # fmt: skip
    made.grads = {'grad_dist_s': made.inputs['dist_s']}
    yield made
    fm_s = z.input('fm_s')
    aligned = align(fm_s, z.input('fm_t'))
    z.compare('out_aligned', aligned)
    (aligned * z.input('probe').detach()).sum().backward()
    z.compare('grad_fm_s', fm_s.grad)
