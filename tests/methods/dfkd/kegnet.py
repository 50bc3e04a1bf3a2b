"""How kegnet.npz feeds dfkd_losses/kegnet.py, and how it is called on random tensors."""

from dfkd_losses.kegnet import KegNet

cases = {
    'kegnet': """
loss = m.KegNet()
inputs = {'out_t': S(n, K), 'label': torch.arange(n) % K, 'z_hat': S(n, 4), 'z': C(n, 4),
          'images': S(n, 3, 4, 4)}
""",
    'kegnet_l2': """
loss = m.KegNet(metric='l2')
inputs = {'out_t': S(n, K), 'label': torch.arange(n) % K, 'z_hat': S(n, 4), 'z': C(n, 4),
          'images': S(n, 3, 4, 4)}
""",
    'kegnet_cosine': """
loss = m.KegNet(metric='cosine')
inputs = {'out_t': S(n, K), 'label': C(n, K).softmax(1), 'z_hat': S(n, 4), 'z': C(n, 4),
          'images': S(n, 3, 4, 4)}
""",
}
exceptions = {
    'any_size': {
        'images': 'only pixels are compared, of any images',
        'out_t': 'labels do not tell how many classes there are',
    },
    'any_rank': {'images': 'only pixels are compared, of any images'},
}


def golden(z):
    names = ('out_t', 'label', 'z_hat', 'z', 'images')
    x = {name: z.input(name) for name in names}
    loss = KegNet(**z.hp('alpha', 'beta'))
    value = loss(**x)
    z.compare('loss', value)
    value.backward()
    for name in ('out_t', 'z_hat', 'images'):
        z.compare(f'grad_{name}', x[name].grad)
    for name, term in loss.terms(**x).items():
        z.compare(f'loss_{name}', term)
    for metric, suffix in (('l1', ''), ('l2', '_l2'), ('cosine', '_cosine')):
        x = {name: z.input(name) for name in names}
        div = KegNet(metric=metric).terms(**x)['div']
        z.compare(f'loss_div{suffix}', div)
        div.backward()
        z.compare(f'grad_images_div{suffix}', x['images'].grad)
    return ()


def one_logit(inputs):
    return inputs | {'out_t': inputs['out_t'][:, :1]}
