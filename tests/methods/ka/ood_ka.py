"""How ood_ka.npz feeds ka_losses/ood_ka.py, and how it is called on random tensors."""

from ka_losses.ood_ka import OODKAGenerator, disc_loss
from tests.methods.shared import Case, many, terms_of

cases = {
    'ood_ka': """
loss = m.OODKAGenerator()
inputs = {'out_s': S(n, K), 'outs_t': [S(n, 3), S(n, K - 3)],
          'fms_t': [[S(n, 5, 3, 5), S(n, 2, 2, 2)], [S(n, 6, 3, 5), S(n, 3, 2, 2)]],
          'd_fake': S(n, 1, 2, 2), 'bn_stats': [(S(n, 5, 3, 5), torch.zeros(5), torch.ones(5))]}
""",
}
exceptions = {
    'any_size': {'bn_stats': 'statistics of any layer', 'd_fake': 'any number of patches'},
}


def golden(z):
    names = {side: many(z, f'fm_{side}_') for side in ('t0', 't1')}
    weights = {key.removeprefix('hp_'): z.arrays[key].item() for key in z.arrays if key.startswith('hp_w_')}
    loss = OODKAGenerator(**weights)
    outs = many(z, 'out_t_')
    inputs = ['out_s', *outs, *names['t0'], *names['t1'], 'd_fake', 'bn_x']
    running = z.input('bn_mean').detach(), z.input('bn_var').detach()

    def call(x, **options):
        fms = [[x[n] for n in names[side]] for side in ('t0', 't1')]
        stats = [(x['bn_x'], *running)]
        return loss(x['out_s'], [x[n] for n in outs], fms, x['d_fake'], stats, **options)

    terms = ('adv', 'local', 'balance', 'bn', 'oh', 'sim')
    terms_of(z, loss, call, inputs, {term: f'loss_{term}' for term in terms})
    z.compare('loss_d', disc_loss(z.input('d_real'), z.input('d_fake')) * weights.get('w_local', 1))
    yield Case(  # the gradient reaches the teachers here: their names must not look like constants
        lambda **x: call({key.replace('teacher', '_t'): value for key, value in x.items()}),
        {name.replace('_t', 'teacher'): z.input(name) for name in inputs},
        'loss',
    )
    values = {name: z.input(name) for name in inputs}
    call(values).backward()
    for name, value in values.items():
        if f'grad_{name}' in z:
            z.compare(f'grad_{name}', value.grad)


def one_logit(inputs):
    return inputs | {'out_s': inputs['out_s'][:, :1]}


def to_float64(inputs):
    """The running statistics follow."""
    x, mean, var = inputs['bn_stats'][0]
    return inputs | {'bn_stats': [(x, mean.double(), var.double())]}
