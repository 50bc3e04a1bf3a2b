"""How radio.npz feeds kd_losses/radio.py, and how it is called on random tensors."""

import torch

from kd_losses.radio import PHIS, RADIO
from tests.methods.shared import Case, fill

cases = {
    'radio': """
loss = m.RADIO(4, 5, [3, 6], [4, 12], hidden=7, inner=1)
g = torch.Generator().manual_seed(0)
loss.calibrate([torch.randn(50, 4, 3, 2, generator=g), torch.randn(50, 12, 2, 2, generator=g)])
loss.fit()
inputs = {'feat_s': S(n, 4), 'fm_s': S(n, 5, 4, 3), 'feats_t': [T(n, 3), T(n, 6)],
          'fms_t': [T(n, 4, 4, 3), T(n, 12, 3, 5)]}
""",
    'radio_mse': """
loss = m.RADIO(4, 5, [3, 6], [4, 8], hidden=7, feature='mse', w_summary=[1.0, 0.5])
g = torch.Generator().manual_seed(0)
loss.calibrate([torch.randn(50, 4, 3, 2, generator=g), torch.randn(50, 8, 2, 2, generator=g)])
loss.fit()
inputs = {'feat_s': S(n, 4), 'fm_s': S(n, 5, 4, 3), 'feats_t': [T(n, 3), T(n, 6)],
          'fms_t': [T(n, 4, 4, 3), T(n, 8, 3, 5)]}
""",
}
SIZES = {'fm_s': 'maps are brought to one size', 'fms_t.0': 'the same', 'fms_t.1': 'the same'}
exceptions = {'layers': 'the heads', 'any_size': SIZES}


def golden(z):
    hp = z.hp('teachers', 'hidden', 'inner', 'w_l1')
    assert z.hp('l1_beta') == {'l1_beta': 2.0}
    T = range(hp.pop('teachers'))
    dims, channels = ([z.shape(f'in_{x}_t_{i}')[1] for i in T] for x in ('feat', 'fm'))
    feats_t, fms_t = ([z.input(f'{x}_t_{i}').detach() for i in T] for x in ('feat', 'fm'))
    for feature, suffix in (('balanced', ''), ('mse', '_mse')):
        widths = z.shape('in_feat_s')[1], z.shape('in_fm_s')[1], dims, channels
        loss = RADIO(*widths, feature=feature, **hp).double()
        for k in (0, 1):
            loss.calibrate([z.input(f'calib_{i}_{k}').detach() for i in T])
        loss.fit()
        for i in T:
            phis, z_i = loss.phis[i], loss.phis[i](fms_t[i])
            rows = z_i.movedim(1, -1).flatten(0, -2)[:20]
            z.compare(f'out_gram_{i}', rows @ rows.T)
            z.compare(f'out_mean_{i}', phis.mean)
            z.compare(f'out_cov_{i}', phis.cov)
            z.compare(f'out_alpha_{i}', phis.alpha)
            z.compare(f'out_hadamard_{i}', PHIS.hadamard(channels[i]))
            torch.testing.assert_close(phis.inverse(z_i), fms_t[i])
            phis.whiten.copy_(z.param(f'whiten_{i}'))
            z.compare(f'out_phis_{i}', phis(fms_t[i]))
        roles = {}
        for role in (key.removeprefix('param_') for key in z.arrays if key.startswith('param_')):
            kind, i, *rest = role.split('_')
            if kind != 'whiten':
                folder = {'summary': 'summary', 'feature': 'features'}[kind]
                roles[role] = '.'.join([folder, i, *rest])
        params = fill(loss, {path: z.param(role) for role, path in roles.items()})
        inputs = {name: z.input(name) for name in ('feat_s', 'fm_s')}
        if not suffix:
            z.compare('out_head_summary_0', loss.summary[0](inputs['feat_s']))
            z.compare('out_head_feature_0', loss.features[0](inputs['fm_s'].flatten(2).mT))
        summaries, features = loss.terms(**inputs, feats_t=feats_t, fms_t=fms_t)
        for i in T:
            z.compare(f'loss_summary_{i}', summaries[i])
            z.compare(f'loss_feature{suffix}_{i}', features[i])
        grads = {f'grad_{name}{suffix}': x for name, x in inputs.items()}
        if not suffix:
            grads |= {f'gradparam_{role}': params[path] for role, path in roles.items()}
        yield Case(lambda f=loss, **x: f(**x, feats_t=feats_t, fms_t=fms_t), inputs, f'loss{suffix}', grads)
