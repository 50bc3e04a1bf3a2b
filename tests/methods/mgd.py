"""How mgd.npz feeds kd_losses/mgd.py."""

from kd_losses.mgd import MGD
from tests.methods.shared import case, parameters

exceptions = {
    'no_meta': 'draws on the generator of the batch',
}


def golden(z):
    flags = {'channel_mask': bool(z.hp('channel_mask')['channel_mask']), **z.hp('mask_ratio')}
    loss = MGD(z.shape('in_fm_s')[1], z.shape('in_fm_t')[1], **flags)
    roles = {
        'align_weight': 'align.weight',
        'align_bias': 'align.bias',
        'gen1_weight': 'generation.0.weight',
        'gen1_bias': 'generation.0.bias',
        'gen2_weight': 'generation.2.weight',
        'gen2_bias': 'generation.2.bias',
    }
    roles = {role: path for role, path in roles.items() if f'param_{role}' in z}
    yield case(z, loss, 'fm_s', 'fm_t', 'mask', more=parameters(z, loss, roles))
