"""How maskd.npz feeds kd_losses/maskd.py, and how it is called on random tensors."""

from kd_losses.maskd import MasKD
from tests.methods.shared import case, fill

cases = {
    'maskd': """
loss = m.MasKD(4, 5, tokens=3)
inputs = {'fm_s': S(n, 4, 4, 3), 'fm_t': T(n, 5, 4, 3)}
""",
    'maskd_half': """
loss = m.MasKD(None, 5, tokens=3, weighted=False, half=True)
inputs = {'fm_s': S(n, 5, 4, 3), 'fm_t': T(n, 5, 4, 3)}
""",
}
rows = {'maskd': {'layers': 'align and prob'}, 'maskd_half': {}}
PATHS = {'token': 'token', 'prob_conv_w': 'prob.0.weight', 'prob_conv_b': 'prob.0.bias',
         'prob_out_w': 'prob.2.weight', 'prob_out_b': 'prob.2.bias'}  # fmt: skip


def golden(z):
    C = z.shape('in_fm_t')[1]
    loss = MasKD(None, C, **z.hp('tokens'))
    plain, half = (MasKD(None, C, **z.hp('tokens'), weighted=False, half=half) for half in (False, True))
    values = {path: z.param(role) for role, path in PATHS.items()}
    params = fill(loss, values)
    for other in (plain, half):
        fill(other, {'token': values['token']})
    yield case(z, loss, 'fm_s', 'fm_t')
    yield case(z, loss, 'fm_s', 'fm_t', suffix='_custom', call=lambda **x: loss(**x, customise=True))
    yield case(z, plain, 'fm_s', 'fm_t', suffix='_unweighted')
    yield case(z, half, 'fm_s', 'fm_t', suffix='_seg')
    fm_t = z.input('fm_t').detach()
    z.compare('out_mask', loss.masks(fm_t))
    z.compare('out_prob', loss.prob(fm_t).flatten(1).softmax(dim=1))
    z.compare('out_masked_seg', plain.learn(fm_t)[0])
    masked, dice = loss.learn(fm_t)
    z.compare('out_masked', masked)
    z.compare('loss_dice', dice)
    ((masked * z.input('probe').detach()).sum() + dice).backward()
    for role, path in PATHS.items():
        z.compare(f'gradparam_{role}', params[path].grad)
