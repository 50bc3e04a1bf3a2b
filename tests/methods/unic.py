"""How unic.npz feeds kd_losses/unic.py, and how it is called on random tensors."""

import copy

import torch

from kd_losses.unic import UNIC
from tests.methods.shared import Case, fill

cases = {
    'unic': """
loss = m.UNIC([4, 5], [3, 7], hidden=6, last_hidden=8).eval()
inputs = {'clss_s': [S(n, 4), S(n, 5)], 'patches_s': [S(n, 6, 4), S(n, 6, 5)],
          'clss_t': [T(n, 3), T(n, 7)], 'patches_t': [T(n, 6, 3), T(n, 6, 7)]}
""",
}
exceptions = {'layers': 'the projectors'}


def golden(z):
    hp = z.hp('teachers', 'blocks', 'hidden', 'last_hidden', 'lam_cos', 'lam_sl1', 'drop', 'momentum')
    T, B = range(hp.pop('teachers')), range(hp.pop('blocks'))
    momentum, drop = hp.pop('momentum'), hp['drop']
    loss = UNIC(
        [z.shape(f'in_cls_s_{b}')[1] for b in B], [z.shape(f'in_cls_t_{i}')[1] for i in T], **hp
    ).double()
    kinds = ('cls', 'patch')
    roles = {
        f'{kind}_{i}_{b}_fc{k}_{x}': f'ladders.{kind}.{i}.{b}.{2 * k - 2}.{x}'
        for kind in kinds
        for i in T
        for b in B
        for k in (1, 2)
        for x in ('weight', 'bias')
    }
    params = fill(loss, {path: z.param(role) for role, path in roles.items()})
    for kind in kinds:
        for i in T:
            for x in ('mean', 'std'):
                getattr(loss.norms[kind][i], x).copy_(z.input(f'{x}_{kind}_{i}').detach())
    untouched = copy.deepcopy(loss)
    names = [f'{kind}_s_{b}' for kind in kinds for b in B]
    teachers = {kind: [z.input(f'{kind}_t_{i}').detach() for i in T] for kind in kinds}

    def call(loss, keep=None, **x):
        clss, patches = ([x[f'{kind}_s_{b}'] for b in B] for kind in kinds)
        return loss(clss, patches, teachers['cls'], teachers['patch'], momentum, keep=keep)

    inputs = {name: z.input(name) for name in names}
    students = {kind: [inputs[f'{kind}_s_{b}'] for b in B] for kind in kinds}
    quiet = copy.deepcopy(untouched).eval()
    for kind in kinds:
        for i, (out, x) in enumerate(zip(quiet.project(kind, students[kind]), teachers[kind])):
            z.compare(f'out_{kind}_s_{i}', out)
            z.compare(f'out_norm_{kind}_{i}', quiet.norms[kind][i](x, momentum))
        for name, term in zip(('cos', 'sl1'), quiet.terms(kind, students[kind], teachers[kind])):
            for i in T:
                z.compare(f'loss_{kind}_{name}_{i}', term[i].mean())
    each = quiet.losses(students['cls'], students['patch'], teachers['cls'], teachers['patch'])
    z.compare('out_loss_each', each)
    z.compare('loss_nodrop', call(quiet, **inputs))
    u = z.input('u').detach()
    worst = torch.zeros_like(u).scatter_(0, each.argmax(dim=0, keepdim=True), 1.0)
    keep = torch.maximum(worst, (u >= drop).double())
    z.compare('out_coeff', keep.sum(dim=1) / keep.sum())
    grads = {f'grad_{name}': x for name, x in inputs.items()}
    grads |= {f'gradparam_{role}': params[path] for role, path in roles.items()}
    yield Case(lambda **x: call(loss, keep, **x), inputs, 'loss', grads)
    for kind in kinds:
        for i in T:
            for x in ('mean', 'std'):
                z.compare(f'out_{x}_{kind}_{i}', getattr(loss.norms[kind][i], x))
