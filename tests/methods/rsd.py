"""How rsd.npz feeds kd_losses/rsd.py."""

from kd_losses.rsd import RSD
from tests.methods.shared import case, parameters

exceptions = {
    'layers': 'a projector',
    'no_batch_of_one': ('batch norm', 'two samples or more'),
}
ROLES = {
    'expand_w': 'projector.0.weight',
    'bn_w': 'projector.1.weight',
    'bn_b': 'projector.1.bias',
    'adapt_w': 'projector.3.weight',
}


def golden(z):
    dims = (z.shape('in_feat_s')[1], z.shape('in_feat_t')[1])
    loss = RSD(*dims, **z.hp('kappa', 'expansion'))
    yield case(z, loss, 'feat_s', 'feat_t', more=parameters(z, loss, ROLES))
    z.compare('out_projected', loss.projector(z.input('feat_s')))
    invariance = RSD(*dims, kappa=0.0, **z.hp('expansion'))
    parameters(z, invariance, ROLES)
    yield case(z, invariance, 'feat_s', 'feat_t', suffix='_invariance')
    bare = RSD(dims[1], dims[1], **z.hp('kappa'), projector=False)
    plain = case(z, bare, 'feat_s', 'feat_t', suffix='_no_projector', rename={'feat_s': 'out_s'}, more={})
    plain.grads = {'grad_out_s': plain.inputs['feat_s']}
    yield plain
