"""How skds.npz feeds kd_losses/skds.py, and how it is called on random tensors."""

from kd_losses.skds import Holistic, PairWise, PixelWise
from tests.methods.shared import case

cases = {
    'skds': """
loss = m.PixelWise()
inputs = {'out_s': S(n, K, 4, 3), 'out_t': T(n, K, 4, 3)}
""",
    'skds_kl': """
loss = m.PixelWise(normalize=True)
inputs = {'out_s': S(n, K, 4, 3), 'out_t': T(n, K, 4, 3)}
""",
    'skds_pair': """
loss = m.PairWise()
inputs = {'fm_s': S(n, 4, 5, 3), 'fm_t': T(n, 6, 5, 3)}
""",
}
rows = {
    'skds': {},
    'skds_kl': {},
    'skds_pair': {'no_gradcheck': 'the lengths are constants by definition'},
}


def golden(z):
    loss = PixelWise()
    yield case(z, loss, 'out_s', 'out_t')
    yield case(z, loss, 'out_s', 'out_t', suffix='_pixel')
    kl = PixelWise(normalize=True)
    yield case(z, kl, 'out_s', 'out_t', suffix='_pixel_kl', call=kl.double().forward)
    pair = PairWise(**z.hp('scale'))
    yield case(z, pair, 'fm_s', 'fm_t', suffix='_pair', call=pair.forward)
    made = case(z, pair, 'fm_s', 'fm_t', suffix='_pair')
    made.grads = {'grad_fm_s': made.inputs['fm_s']}
    yield made
    d_s, d_t = z.input('d_s'), z.input('d_t')
    z.compare('loss_d_wgan', Holistic().d_loss(d_s, d_t))
    z.compare('loss_d_hinge', Holistic('hinge').d_loss(d_s, d_t))
    z.compare('loss_g', Holistic()(d_s))


def one_logit(inputs):
    return {key: x[:, :1] for key, x in inputs.items()}
