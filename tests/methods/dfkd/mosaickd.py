"""How mosaickd.npz feeds dfkd_losses/mosaickd.py, and how it is called on random tensors."""

from dfkd_losses.mosaickd import MosaicKD

cases = {
    'mosaickd': """
loss = m.MosaicKD()
inputs = {'out_s': S(n, K), 'out_t': S(n, K), 'd_fake': S(n, 1, 4, 3)}
""",
    'mosaickd_discriminator': """
loss = m.MosaicKD()
call = loss.discriminator_loss
inputs = {'d_fake': S(n, 1, 4, 3), 'd_real': S(n, 1, 4, 3)}
""",
}
rows = {'mosaickd': {'any_size': {'d_fake': 'any number of patches'}}}


def golden(z):
    loss = MosaicKD(**z.hp('adv', 'align', 'local', 'balance'))
    x = {name: z.input(name) for name in ('out_s', 'out_t', 'd_fake')}
    value = loss(**x)
    z.compare('loss', value)
    z.compare('loss_g', value)
    value.backward()
    for name, tensor in x.items():
        z.compare(f'grad_{name}', tensor.grad)
    for name, term in loss.terms(**x).items():
        z.compare(f'loss_{name}', term)
    x = {name: z.input(name) for name in ('d_fake', 'd_real')}
    value = loss.discriminator_loss(**x)
    z.compare('loss_d', value)
    value.backward()
    for name, tensor in x.items():
        z.compare(f'gradd_{name}', tensor.grad)
    return ()


def one_logit(inputs):
    return inputs | {name: inputs[name][:, :1] for name in ('out_s', 'out_t')}
