"""How wkd.npz feeds kd_losses/wkd.py."""

import torch
import torch.nn.functional as F

from kd_losses.wkd import WKDFeature, WKDLogit, cka_cost, prototype_cost, sinkhorn
from tests.methods.shared import Case, case, parameters

rows = {
    'wkd': {
        'masked_class': 'a class of probability 0 is moved nowhere',
        'class_by_class': 'what it costs to move one class to another is its definition',
    },
    'wkd_feature': {'layers': 'the projector'},
}
alone = """
loss = m.WKDLogit(m.prototype_cost(T(7, 5)))
inputs = {'out_s': S(n, 7), 'out_t': T(n, 7), 'target': torch.arange(n)}
"""


def golden(z):
    hp, sharpen = z.hp('gamma', 'T', 'reg', 'iters'), z.hp('sharpen')['sharpen']
    feats, fc = z.input('class_feats').detach(), z.input('fc').detach()
    cost = cka_cost(feats, sharpen)
    z.compare('out_cost_cka', cka_cost(feats, sharpen=0))
    z.compare('out_cost', cost)
    z.compare('out_cost_fc', prototype_cost(fc, sharpen))
    for D in (1, 3 * feats.shape[1]):  # fewer and more dimensions than samples: two ways to the same
        x = F.pad(feats, (0, max(D - feats.shape[2], 0)))[..., :D]
        slow = torch.stack([torch.stack([alike(a, b) for b in x]) for a in x])
        torch.testing.assert_close(cka_cost(x, sharpen=0), 1 - slow)
    dead = feats.clone()
    dead[1] = 2.0
    assert cka_cost(dead, 0)[1, 0] == 1 and cka_cost(dead, 0)[1, 1] == 0

    loss, names = WKDLogit(cost, **hp), ('out_s', 'out_t', 'target')
    yield case(z, loss, *names)
    for i, term in enumerate(('target', 'wd')):
        yield case(z, loss, *names, suffix=f'_{term}', call=lambda i=i, **x: loss.terms(**x)[i])
    yield case(z, WKDLogit(prototype_cost(fc, sharpen), **hp), *names, suffix='_fc')

    D = cost.clamp(min=0) + 1e-8
    G = (-D / hp['reg']).exp()

    def plan(out_s, out_t):
        p, q = F.softmax(out_s / hp['T'], dim=1), F.softmax(out_t.detach() / hp['T'], dim=1)
        u, v = sinkhorn(p, q, torch.full_like(p, 1 / p.shape[1]), D, hp['reg'], hp['iters'])
        return u[:, :, None] * G * v[:, None]

    def no_class_taken_out(out_s, out_t):
        return (plan(out_s, out_t) * D).sum(dim=(1, 2)).mean()

    yield case(z, loss, 'out_s', 'out_t', suffix='_wd_all', call=no_class_taken_out)
    z.compare('out_flow', plan(z.input('out_s'), z.input('out_t')))

    hp = z.hp('grid', 'mean_ratio', 'eps', 'bottleneck')
    hp['bottleneck'] = hp['bottleneck'] or None
    feature = WKDFeature(z.shape('in_fm_s')[1], z.shape('in_fm_t')[1], **hp)
    convolutions = ('conv1', 'conv2', 'conv3') if hp['bottleneck'] else ('conv',)
    layers = dict(enumerate((*convolutions, 'bn')))
    roles = {f'{role}_{x[0]}': f'projector.{i}.{x}' for i, role in layers.items() for x in ('weight', 'bias')}
    learnt = parameters(z, feature, roles)
    inputs = {name: z.input(name) for name in ('fm_s', 'fm_t')}
    yield Case(feature.forward, inputs, 'loss_feat', {'grad_fm_s': inputs['fm_s']} | learnt)
    for i, term in enumerate(('mean', 'std')):
        z.compare(f'loss_feat_{term}', feature.terms(**inputs)[i])
    z.compare('out_projected', feature.projector(inputs['fm_s']))
    uneven(feature)


def alike(a, b):
    a, b = a - a.mean(dim=0), b - b.mean(dim=0)
    return (b.T @ a).norm() ** 2 / ((a.T @ a).norm() * (b.T @ b).norm())


def uneven(loss):
    """Cells as adaptive pooling has them, also where they overlap."""
    for size, grid in (((7, 8), 3), ((6, 8), 2)):
        loss.grid, fm = grid, torch.randn(2, 3, *size, dtype=torch.float64)
        pooled = F.adaptive_avg_pool2d(fm, grid)
        torch.testing.assert_close(loss.statistics(fm)[0].flatten(2), pooled.flatten(2))


def arguments(w):
    """Of forward: the trainer weighs the terms itself."""
    return w.s.out, w.t.out, w.b.target


def before(kd, t, dtype):
    """A cost that is not symmetric in looks only: of other features than the classifier's."""
    K = len(getattr(kd, 'cost', []))
    if K:
        kd.cost.copy_(cka_cost(torch.randn(K, 7, 4, dtype=dtype)))
