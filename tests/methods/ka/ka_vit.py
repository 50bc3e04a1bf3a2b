"""How ka_vit.npz feeds ka_losses/ka_vit.py, and how it is called on random tensors."""

from ka_losses.ka_vit import TokenAmalgamation, TokenExpand
from tests.methods.shared import fill, listed, many

cases = {
    'ka_vit': """
loss = m.TokenAmalgamation()
inputs = {'toks_s': [S(n, 8, 5), S(n, 8, 5)], 'toks_t': [[T(n, 4, 5), T(n, 4, 5)], [T(n, 4, 5), T(n, 4, 5)]]}
""",
    'ka_vit_layer': """
loss = m.TokenAmalgamation('layer')
inputs = {'toks_s': [S(n, 8, 5)], 'toks_t': [[T(n, 5, 5)], [T(n, 3, 5)]]}
""",
}
exceptions = {
    'any_length': 'any number of teachers: what is missing are their tokens',
}


def golden(z):
    students = many(z, 'tok_s_')
    teachers = []
    while many(z, f'tok_t{len(teachers)}_'):
        teachers.append(many(z, f'tok_t{len(teachers)}_'))
    expand_x = z.input('expand_x')
    length = expand_x.shape[1]
    expand = TokenExpand(length, z.shape('param_expand_weight')[0] // length)
    fill(expand, {'linear.weight': z.param('expand_weight'), 'linear.bias': z.param('expand_bias')})
    z.compare('out_expand', expand(expand_x))
    names = [*students, *(name for levels in teachers for name in levels)]
    made = listed(
        z,
        None,
        lambda x: TokenAmalgamation()([x[n] for n in students], [[x[n] for n in ls] for ls in teachers]),
        names,
    )
    yield made
    assert all(x.grad is None for name, x in made.inputs.items() if name not in students)
