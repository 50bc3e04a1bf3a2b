"""How sbm.npz feeds ka_losses/sbm.py, and how it is called on random tensors."""

from ka_losses.sbm import SBM, ChannelCoding
from tests.methods.shared import listed, parameters, terms_of

cases = {
    'sbm': """
loss = m.SBM()
inputs = {'outs_s': [S(n, 5, 3, 4), S(n, 1, 3, 4), S(n, 3, 3, 4)],
          'outs_t': [T(n, 5, 3, 4), T(n, 1, 3, 4), T(n, 3, 3, 4)]}
""",
    'sbm_2019': """
loss = m.SBM(('depth', 'seg'), seg='hard', depth='si', weights=[2, 1])
inputs = {'outs_s': [S(n, 1, 3, 4), S(n, 5, 3, 4)], 'outs_t': [T(n, 1, 3, 4), T(n, 5, 3, 4)]}
""",
}


def golden(z):
    channels = z.shape('in_coding_x')[1]
    hidden = z.shape('param_coding_w1')[0]
    coding = ChannelCoding(channels, min_hidden=hidden, reduction=channels)
    more = parameters(z, coding, {'coding_w1': 'w1.weight', 'coding_w2': 'w2.weight'})
    x = z.input('coding_x')
    out = coding(x)
    z.compare('out_coding', out)
    (out * z.input('coding_cotangent').detach()).sum().backward()
    z.compare('grad_coding_x', x.grad)
    for key, parameter in more.items():
        z.compare(key, parameter.grad)

    mask = z.input('normal_mask').detach()
    forms = {
        'seg_kl': ('seg', {}, 'seg_t', None),
        'seg_hard': ('seg', {'seg': 'hard'}, 'seg_t', None),
        'depth_l1': ('depth', {}, 'depth_t', None),
        'depth_si': ('depth', {'depth': 'si'}, 'depth_t', None),
        'depth_si_masked': ('depth', {'depth': 'si'}, 'depth_t_masked', None),
        'normal_cos': ('normal', {}, 'normal_t', mask),
    }
    for name, (task, options, teacher, valid) in forms.items():
        loss, student = SBM((task,), **options), f'{task}_s'
        made = listed(
            z, None, lambda x, a=loss, s=student, t=teacher, m=valid: a([x[s]], [x[t]], m), [student, teacher]
        )
        made.loss, made.grads = f'loss_{name}', {f'grad_{name}': made.inputs[student]}
        yield made
    tasks, loss = ('seg', 'depth', 'normal'), SBM()
    names = [f'{task}_{side}' for side in 'st' for task in tasks]

    def call(x, **options):
        return loss([x[f'{t}_s'] for t in tasks], [x[f'{t}_t'] for t in tasks], mask, **options)

    keys = {'seg': 'loss_seg_kl', 'depth': 'loss_depth_l1', 'normal': 'loss_normal_cos'}
    terms_of(z, loss, call, names, keys)
    made = listed(z, None, call, names)
    made.grads = {}
    yield made


def one_logit(inputs):
    return {key: [x[0][:, :1], *x[1:]] for key, x in inputs.items()}
