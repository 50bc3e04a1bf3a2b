"""How afdcd.npz feeds kd_losses/afdcd.py, and how it is called on random tensors."""

from kd_losses.afdcd import AfDCD
from tests.methods.shared import case, parameters, roles_of

MASK = "'mask': (torch.arange(24 * n).reshape(n, 1, 4, 6) % 3 != 1).float()"
cases = {
    'afdcd': f"""
loss = m.AfDCD(3, 4, T=0.5, groups=2, pool=2, patch=(1, 3), w_feature=0.1, w_contrast=1.0)
inputs = {{'fm_s': S(n, 3, 4, 6), 'fm_t': T(n, 4, 4, 6), {MASK}}}
""",
    'afdcd_enhanced': f"""
loss = m.AfDCD(4, 4, T=0.5, groups=2, pool=0, patch=(2, 2), enhanced=True, w_feature=0.1, w_contrast=1.0)
inputs = {{'fm_s': S(n, 4, 4, 6), 'fm_t': T(n, 4, 4, 6), {MASK}}}
""",
}
exceptions = {'layers': 'align and projector'}
PATHS = {'align': 'align', 'conv1': 'projector.0', 'conv2': 'projector.2', 'block1': 'projector.block1.0',
         'block2': 'projector.block2.0', 'out1': 'projector.out1', 'out2': 'projector.out2'}  # fmt: skip


def golden(z):
    hp = z.hp('T', 'groups', 'pool', 'mask_ratio', 'patch_h', 'patch_w', 'enhanced')
    hp['patch'], hp['enhanced'] = (hp.pop('patch_h'), hp.pop('patch_w')), bool(hp['enhanced'])
    loss = AfDCD(z.shape('in_fm_s')[1], z.shape('in_fm_t')[1], **hp)
    roles = {}
    for role in roles_of(z):
        layer, kind = role.split('_')
        roles[role] = f'{PATHS[layer]}.{"weight" if kind == "w" else "bias"}'
    more = parameters(z, loss, roles)
    inputs = ('fm_s', 'fm_t', 'mask')
    yield case(z, loss, *inputs)
    yield case(z, loss, *inputs, suffix='_feature', call=lambda **x: loss.terms(**x)[0])
    loss.zero_grad()
    yield case(z, loss, *inputs, suffix='_contrast', call=lambda **x: loss.terms(**x)[1], more=more)
