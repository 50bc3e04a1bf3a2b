"""How clipkd.npz feeds kd_losses/clipkd.py."""

import torch

from kd_losses import clipkd
from kd_losses.clipkd import CLIPKD
from tests.methods.shared import case, parameters

exceptions = {
    'coarse': 'the teacher on the second view',
    'layers': 'the teacher on the second view',
    'no_meta': 'runs networks',
}
alone = """
loss = m.CLIPKD(4, 6, w_cross_kd=1.0, w_gd=1.0, w_afd=1.0)
inputs = {'img_s': S(n, 4), 'txt_s': S(n, 4), 'scale_s': 14.3, 'scale_t': torch.tensor(100.0)}
inputs |= {name: torch.nn.functional.normalize(T(n, 6)) for name in ('img_t', 'txt_t')}
"""
INPUTS = ('img_s', 'txt_s', 'scale_s', 'img_t', 'txt_t', 'scale_t')


def golden(z):
    # the file says ckd where the paper and our file say crd
    weights = {f'w_{name}': z.hp(f'w_{file}')[f'w_{file}'] for name, file in TERMS.items()}
    loss = CLIPKD(z.shape('in_img_s')[1], z.shape('in_img_t')[1], **weights)
    roles = {name.replace('.', '_'): name for name, _ in loss.named_parameters()}
    yield case(z, loss, *INPUTS, more=parameters(z, loss, roles))
    stored = {key.removeprefix('param_') for key in z.arrays if key.startswith('param_')}
    for role in stored - roles.keys():  # of a term without weight: not built
        z.compare(f'gradparam_{role}', torch.zeros_like(z.param(role)))
    built = ['task', *(name for name, w in weights.items() if w)]
    for name in (name.removeprefix('w_') for name in built):
        suffix = f'_{TERMS.get(name, name)}'
        term = case(z, loss, *INPUTS, suffix=suffix, call=lambda name=name, **x: loss.terms(**x)[name])
        if 'scale' not in USES.get(name, 'scale'):  # autograd leaves None where the file has 0
            term.inputs['scale_s'].grad = torch.zeros((), dtype=torch.float64)
        yield term
    functions(z, loss)


TERMS = {'crd': 'ckd', 'icl': 'icl', 'cross_kd': 'cross_kd', 'fd': 'fd', 'gd': 'gd', 'afd': 'afd'}
USES = {'icl': 'c', 'cross_kd': 'c', 'fd': '', 'afd': ''}


def functions(z, loss) -> None:
    """The terms of the file, from the functions."""
    raw, (scale_s, scale_t) = [z.input(name) for name in INPUTS], (z.input('scale_s'), z.input('scale_t'))
    unit = torch.nn.functional.normalize
    a0, b0, u, v = unit(raw[0]), unit(raw[1]), raw[3], raw[4]
    a, b = (unit(loss.proj_img(raw[0])), unit(loss.proj_txt(raw[1]))) if loss.projected else (a0, b0)
    found = {
        'task': lambda: clipkd.clip_loss(a0, b0, scale_s),
        'crd': lambda: clipkd.crd(a0, b0, scale_s, u, v, scale_t),
        'icl': lambda: clipkd.icl(a, b, u, v, loss.cross_scale),
        'cross_kd': lambda: clipkd.cross_kd(a, b, u, v, loss.cross_scale, scale_t),
        'fd': lambda: clipkd.fd(a, b, u, v),
        'gd': lambda: clipkd.gd(a, b, scale_s, u, v, scale_t),
    }
    for name in found.keys() & loss.terms(*raw).keys():
        z.compare(f'loss_{TERMS.get(name, name)}', found[name]())
    # the gradients that gd compares are those of clip_loss: between equal scales the exact form says so
    p, k = a.detach().requires_grad_(), b.detach().requires_grad_()
    clipkd.clip_loss(p, k, scale_s).mul(2).backward()
    mine = clipkd._gradients(p, k, p @ k.T, 1 / scale_s)
    for grad, parts in ((p.grad, (mine[0], mine[3])), (k.grad, (mine[1], mine[2]))):
        assert torch.allclose(grad, sum(parts), rtol=1e-9, atol=1e-12)
