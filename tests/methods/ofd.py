"""How ofd.npz feeds kd_losses/ofd.py."""

from kd_losses.ofd import OFD
from tests.methods.shared import case, fill


def golden(z):
    c_s, c_t = z.shape('in_fm_s')[1], z.shape('in_fm_t')[1]
    margin = OFD.margin_from_bn(z.input('bn_weight'), z.input('bn_bias'))
    z.compare('out_margin', margin)
    roles = {'conv_w': 'connector.0.weight', 'bn_w': 'connector.1.weight', 'bn_b': 'connector.1.bias'}

    def build(margin, reduction):
        loss = OFD(c_s, c_t, margin, reduction)
        return loss, fill(loss, {path: z.param(role) for role, path in roles.items()})

    loss, parameters = build(margin, 'batchmean')
    more = {f'gradparam_{role}': parameters[path] for role, path in roles.items()}
    yield case(z, loss, 'fm_s', 'fm_t', more=more)
    yield case(z, loss, 'fm_s', 'fm_t', suffix='_sum', call=lambda fm_s, fm_t: loss(fm_s, fm_t) * len(fm_s))
    yield case(z, build(margin, 'mean')[0], 'fm_s', 'fm_t', suffix='_mean')
    yield case(z, build(None, 'batchmean')[0], 'fm_s', 'fm_t', suffix='_margin_batch')
    yield case(z, build(None, 'mean')[0], 'fm_s', 'fm_t', suffix='_mean_margin_batch')
    z.compare('out_margin_batch', OFD.margin_from_batch(z.input('fm_t')).flatten())
