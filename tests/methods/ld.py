"""How ld.npz feeds kd_losses/ld.py, and how it is called on random tensors."""

import torch

from kd_losses.ld import LD, main_region, valuable_region
from tests.methods.shared import case

cases = {
    'ld': """
loss = m.LD()
inputs = {'out_s': S(n, K), 'out_t': T(n, K)}
""",
    'ld_weighted': """
loss = m.LD(T=2.0)
inputs = {'out_s': S(n, K), 'out_t': T(n, K), 'weight': torch.arange(n) / 4}
""",
}
exceptions = {'empty_is_legal': 'a level may have no anchor in the region'}


def golden(z):
    loss, cls = LD(**z.hp('T')), LD(*z.hp('T_cls').values())
    hp = z.hp('avg_factor')
    weight = z.input('weight')
    yield case(z, loss, 'out_s', 'out_t', call=lambda **x: loss(**x, weight=weight, **hp))
    z.compare('loss_mean', loss(z.input('out_s'), z.input('out_t')))
    made = case(
        z, cls, 'cls_s', 'cls_t', suffix='_cls',
        call=lambda cls_s, cls_t: cls(cls_s, cls_t, z.input('cls_weight'), len(cls_s)),
    )  # fmt: skip
    made.grads = {'grad_cls_s': made.inputs['cls_s']}
    yield made
    args = z.input('anchors').detach(), z.input('levels').tolist(), z.input('boxes').detach()
    main = main_region(*args, **z.hp('topk'))
    assert main.dtype == torch.int64
    z.compare('out_main', main.double())
    z.compare('out_vlr', valuable_region(*args, **z.hp('topk')))
    z.compare('out_vlr_diou', valuable_region(*args, **z.hp('topk'), diou=True))
