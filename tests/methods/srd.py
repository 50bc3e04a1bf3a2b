"""How srd.npz feeds kd_losses/srd.py."""

from kd_losses.srd import SRD
from tests.methods.shared import Case, parameters

exceptions = {
    'own_order': 'its page fixes the order of the arguments',
    'masked_class': 'the divergence is weighed by probabilities, a class of probability 0 counts nothing',
    'layers': 'the projector',
    'no_batch_of_one': ('batch norm', 'feat_s must have 2 samples or more'),
}


def golden(z):
    hp, dims = z.hp('power', 'eps', 'w_feat'), (z.shape('in_feat_s')[1], z.shape('in_feat_t')[1])
    roles = {'embed_w': 'embed.weight', 'embed_b': 'embed.bias'}
    loss = SRD(*dims, **hp)
    learnt = parameters(z, loss, roles)
    names = ('fm_s', 'fm_t', 'out_s', 'out_t')
    inputs = {name: z.input(name) for name in names}
    grads = {f'grad_{name}': inputs[name] for name in ('fm_s', 'out_s')} | learnt
    yield Case(lambda **x: loss(*x.values()), inputs, grads=grads)

    feat_s, feat_t = z.input('feat_s'), z.input('feat_t')
    feature, logit = loss.terms(feat_s, feat_t, inputs['out_s'], inputs['out_t'])
    z.compare('loss_feat', feature)
    z.compare('loss_logit', logit)
    loss(feat_s, feat_t).backward()
    z.compare('grad_feat_s', feat_s.grad)

    corr = SRD(*dims, mode='corr', power=hp['power'], w_feat=1.0)
    learnt = {f'{key}_corr': p for key, p in parameters(z, corr, roles).items()}
    inputs = {name: z.input(name) for name in ('feat_s', 'feat_t')}
    yield Case(
        lambda **x: corr(*x.values()), inputs, 'loss_corr', {'grad_feat_s_corr': inputs['feat_s']} | learnt
    )
