"""How fgd.npz feeds kd_losses/fgd.py, and how it is called on random tensors."""

from kd_losses.fgd import FGD, masks
from tests.methods.shared import case, parameters, roles_of

cases = {
    'fgd': """
loss = m.FGD(4, 6, alpha=0.1, beta=0.2, gamma=0.3, lambd=0.4)
boxes = [torch.tensor([[3.0, 1.0, 20.0, 22.0], [10.0, 8.0, 39.0, 60.0]]), torch.zeros(1, 4)] * 3
inputs = {'fm_s': S(n, 4, 5, 3), 'fm_t': T(n, 6, 5, 3), 'boxes': boxes[:n],
          'image_size': torch.tensor([[40.0, 60.0]]).repeat(n, 1)}
""",
}
exceptions = {'layers': 'align and the context blocks'}
PATHS = {'conv1': '0', 'ln': '1', 'conv2': '3'}


def path_of(role: str) -> str:
    *part, kind = role.split('_')
    layer = f'channel_{part[0]}.{PATHS[part[1]]}' if part[0] in 'st' else '_'.join(part)
    return f'{layer}.{"weight" if kind == "w" else "bias"}'


def golden(z):
    hp = z.hp('temp', 'alpha', 'beta', 'gamma', 'lambd')
    loss = FGD(z.shape('in_fm_s')[1], z.shape('in_fm_t')[1], **hp)
    more = parameters(z, loss, {role: path_of(role) for role in roles_of(z)})
    boxes = z.input('boxes').detach().split(z.input('counts').tolist())
    given = boxes, z.input('image_size').detach()
    fg, bg = masks(*given, z.shape('in_fm_s')[2:])
    z.compare('out_mask_fg', fg)
    z.compare('out_mask_bg', bg)
    fm_s, fm_t = z.input('fm_s').detach(), z.input('fm_t').detach()
    for side, fm in (('s', fm_s if loss.align is None else loss.align(fm_s)), ('t', fm_t)):
        positions, channels = loss.attention(fm)
        z.compare(f'out_attention_{side}', positions)
        z.compare(f'out_channel_{side}', channels)
    for name, term in zip(('fg', 'bg', 'mask', 'relation'), loss.terms(fm_s, fm_t, *given)):
        z.compare(f'loss_{name}', term)
    yield case(
        z, loss, 'fm_s', 'fm_t', call=lambda **x: loss(**x, boxes=given[0], image_size=given[1]), more=more
    )
