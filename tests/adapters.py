"""How a golden file feeds a loss: one small generator of cases per method, driven by the file's keys."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from kd_losses import (
    AFD,
    AT,
    CC,
    CD,
    CRD,
    DIST,
    DKD,
    EEL,
    ICKD,
    IKD,
    IRG,
    KDSVD,
    LSKD,
    MGD,
    MLKD,
    NKD,
    NST,
    OFAKD,
    OFD,
    PAD,
    PKT,
    RKD,
    SDD,
    SP,
    SRRL,
    TTM,
    VID,
    WSLD,
    FitNet,
    Logits,
    ReviewKD,
    SoftTarget,
)
from kd_losses.cd import GKD
from kd_losses.lskd import standardize
from kd_losses.reviewkd import HCL
from kd_losses.sdd import local_logits


@dataclass
class Case:
    """Call the loss, compare the value under `loss`, then the gradients under `grads` and `gradparams`."""

    call: Callable
    inputs: dict  # argument name in the file -> tensor
    loss: str = 'loss'
    grads: dict = field(default_factory=dict)  # key in the file -> tensor whose .grad is meant

    def check(self, vector) -> None:
        value = self.call(**self.inputs)
        assert value.shape == (), f'{vector.name}: the loss is not a scalar'
        vector.compare(self.loss, value)
        present = {key: tensor for key, tensor in self.grads.items() if key in vector}
        if present:
            value.backward()
        for key, tensor in present.items():
            assert tensor.grad is not None, f'{vector.name}: no gradient for {key}'
            vector.compare(key, tensor.grad)
        for name, tensor in self.inputs.items():
            assert not (teacher(name) and tensor.grad is not None), f'{vector.name}: gradient in {name}'


def teacher(name: str) -> bool:
    return name.endswith('_t') or '_t_' in name


def case(z, module, *names, suffix='', rename=None, call=None, more=None) -> Case:
    """The common case: inputs in_<name>, value loss<suffix>, gradients grad_<name><suffix>.

    rename: {argument: name in the file} where the file has another map for the same argument.
    more: further expected gradients {key: tensor}.
    """
    inputs = {name: z.input((rename or {}).get(name, name)) for name in names}
    grads = {
        f'grad_{name}{suffix}': x for name, x in inputs.items() if x.requires_grad and not name.endswith('_t')
    }
    return Case(call or module.double().forward, inputs, f'loss{suffix}', grads | (more or {}))


def parameters(z, module, roles: dict) -> dict:
    """Set parameters from param_<role>; returns the expected gradients {gradparam_<role>: parameter}."""
    filled = fill(module, {path: z.param(role) for role, path in roles.items()})
    return {f'gradparam_{role}': filled[path] for role, path in roles.items()}


def fill(module, values: dict) -> dict:
    """Set parameters by path; returns {path: parameter}, in float64."""
    module.double()
    parameters = {path: module.get_parameter(path) for path in values}
    with torch.no_grad():
        for path, value in values.items():
            parameters[path].copy_(value)
    return parameters


def afd(z):
    channels = z.shape('in_fm_t')[1]
    loss = AFD(channels, channels, **z.hp('att_f'))
    roles = {
        'conv1_w': 'attention.0.weight',
        'conv1_b': 'attention.0.bias',
        'conv2_w': 'attention.2.weight',
        'conv2_b': 'attention.2.bias',
    }
    more = parameters(z, loss, roles)
    yield case(z, loss, 'fm_s', 'fm_t', more=more)
    z.compare('out_rho', loss.attention_of(z.input('fm_t')))


def at(z) -> Iterator[Case]:
    yield case(z, AT(**z.hp('p')), 'fm_s', 'fm_t')
    yield case(z, AT(p=2.0), 'fm_s', 'fm_t', suffix='_p2')
    yield case(z, AT(**z.hp('p')), 'fm_s', 'fm_t', suffix='_big', rename={'fm_s': 'fm_s_big'})


def cc(z):
    yield case(z, CC(**z.hp('gamma', 'P_order')), 'feat_s', 'feat_t')
    for kernel in ('rbf_taylor', 'rbf', 'bilinear', 'mmd'):
        yield case(z, CC(**z.hp('gamma', 'P_order'), kernel=kernel), 'feat_s', 'feat_t', suffix=f'_{kernel}')


def cd(z):
    loss = CD(z.shape('in_fm_s')[1], z.shape('in_fm_t')[1])
    roles = {
        'conv_weight': 'connector.0.weight',
        'bn_weight': 'connector.1.weight',
        'bn_bias': 'connector.1.bias',
    }
    yield case(z, loss, 'fm_s', 'fm_t', more=parameters(z, loss, roles))
    guided = case(z, GKD(**z.hp('T')), 'out_s', 'out_t', 'target', suffix='_gkd')
    guided.grads = {'grad_out_s': guided.inputs['out_s']}
    yield guided


def crd(z):
    hp = z.hp('n_data', 'feat_dim', 'nce_n', 'nce_t', 'nce_mom')
    loss = CRD(z.shape('in_feat_s_1')[1], z.shape('in_feat_t_1')[1], **hp)
    roles = {f'embed_{side}_{x[0]}': f'embed_{side}.{x}' for side in 'st' for x in ('weight', 'bias')}
    embeds = parameters(z, loss, roles)
    for side in 'st':
        loss.get_buffer(f'memory_{side}').copy_(z.param(f'memory_{side}'))
    untouched = copy.deepcopy(loss)  # two consecutive calls, by value and then by term, from the same memory
    for k in (1, 2):
        names = ('feat_s', 'feat_t', 'idx', 'sample_idx')
        inputs = {name: z.input(f'{name}_{k}') for name in names}
        grads = {f'grad_feat_s_{k}': inputs['feat_s']} | {f'{key}_{k}': p for key, p in embeds.items()}
        for p in loss.parameters():
            p.grad = None
        yield Case(
            lambda feat_s, feat_t, idx, sample_idx: loss(feat_s, feat_t, idx, sample_idx),
            inputs,
            f'loss_{k}',
            grads,
        )
        for side in 'st':
            z.compare(f'out_memory_{side}_{k}', loss.get_buffer(f'memory_{side}'))
            if k == 1:
                z.compare(f'out_z_{side}', loss.get_buffer(f'z_{side}'))
        with torch.enable_grad():
            for side, term in zip('st', untouched.terms(*inputs.values())):
                z.compare(f'loss_{side}_{k}', term)
        if k == 1:
            z.compare('loss', CRD.forward(copy_with_memory(z, loss), *inputs.values()))


def copy_with_memory(z, loss) -> CRD:
    """The module as it was before the first call."""
    fresh = copy.deepcopy(loss)
    for side in 'st':
        fresh.get_buffer(f'memory_{side}').copy_(z.param(f'memory_{side}'))
        fresh.get_buffer(f'z_{side}').fill_(-1)
    return fresh


def dist(z):
    loss = DIST(**z.hp('beta', 'gamma', 'tau'))
    yield case(z, loss, 'out_s', 'out_t')
    yield case(z, loss, 'out_s', 'out_t', suffix='_inter', call=lambda **x: loss.terms(**x)[0])
    yield case(z, loss, 'out_s', 'out_t', suffix='_intra', call=lambda **x: loss.terms(**x)[1])


def dkd(z):
    loss = DKD(**z.hp('alpha', 'beta', 'T'))
    yield case(z, loss, 'out_s', 'out_t', 'target')
    yield case(z, loss, 'out_s', 'out_t', 'target', suffix='_tckd', call=lambda **x: loss.terms(**x)[0])
    yield case(z, loss, 'out_s', 'out_t', 'target', suffix='_nckd', call=lambda **x: loss.terms(**x)[1])


def eel(z):
    widths = z.shape('in_feat_s')[1], z.shape('in_feat_t')[1]
    yield case(z, EEL(*widths, **z.hp('angle')), 'feat_s', 'feat_t', 'target')


def fitnet(z):
    yield case(z, FitNet(), 'fm_s', 'fm_t')
    loss = FitNet(z.shape('in_fm_s_reg')[1], z.shape('in_fm_t')[1])
    roles = {
        'conv_weight': 'regressor.0.weight',
        'conv_bias': 'regressor.0.bias',
        'bn_weight': 'regressor.1.weight',
        'bn_bias': 'regressor.1.bias',
    }
    more = parameters(z, loss, roles)
    yield case(z, loss, 'fm_s', 'fm_t', suffix='_reg', rename={'fm_s': 'fm_s_reg'}, more=more)


def ickd(z):
    loss = ICKD(z.shape('in_fm_s')[1], z.shape('in_fm_t')[1])
    roles = {'conv_w': 'embed_s.0.weight', 'bn_w': 'embed_s.1.weight', 'bn_b': 'embed_s.1.bias'}
    yield case(z, loss, 'fm_s', 'fm_t', more=parameters(z, loss, roles))


def ikd(z):
    loss = IKD(z.shape('in_fm_s')[1], z.shape('in_fm_t')[1])
    fill(loss, {'projection.weight': z.param('proj_weight')[:, :, None, None]})
    yield case(z, loss, 'fm_s', 'fm_t')
    z.compare('gradparam_proj_weight', loss.projection.weight.grad[:, :, 0, 0])


def irg(z):
    loss = IRG(*(z.hp(f'w_{term}')[f'w_{term}'] for term in ('vert', 'edge', 'tran')))
    names = [f'{x}_{side}' for side in 'st' for x in ('fm1', 'fm2', 'feat', 'out')]
    yield case(z, loss, *names, call=lambda **x: loss(*graphs(x)))
    for i, term in enumerate(('vert', 'edge', 'tran')):
        yield case(z, loss, *names, suffix=f'_{term}', call=lambda i=i, **x: loss.terms(*graphs(x))[i])


def graphs(x: dict) -> list[list]:
    return [[x[f'{name}_{side}'] for name in ('fm1', 'fm2', 'feat', 'out')] for side in 'st']


def kdsvd(z):
    levels = range(z.hp('levels')['levels'])
    loss = KDSVD(**z.hp('k'))
    names = [f'fm_{side}_{i}' for side in 'st' for i in levels]

    def lists(x):
        return [[x[f'fm_{side}_{i}'] for i in levels] for side in 'st']

    z.loosen('grad_', 1e-6)  # its page: the gradients pass through gaps between eigenvalues
    yield case(z, loss, *names, call=lambda **x: loss(*lists(x)))
    terms = loss.terms(*lists({name: z.input(name) for name in names}))
    z.compare('loss_terms', torch.stack(terms))


def logits(z):
    yield case(z, Logits(), 'out_s', 'out_t')


def lskd(z):
    yield case(z, LSKD(**z.hp('T')), 'out_s', 'out_t')
    decoupled = LSKD(DKD(**z.hp('alpha', 'beta', 'T')))
    yield case(
        z,
        decoupled,
        'out_s',
        'out_t',
        'target',
        suffix='_dkd',
        call=lambda out_s, out_t, target: decoupled(out_s, out_t, target),
    )
    z.compare('out_standardized_s', standardize(z.input('out_s')))


def mgd(z):
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


def mlkd(z):
    temps = tuple(z.arrays['hp_temps'].tolist())
    names = ('out_s', 'out_t', 'out_s_strong', 'out_t_strong')
    two = MLKD(temps, two_view=True)
    both = case(z, two, *names)
    both.grads['grad_out_s_strong'] = both.inputs['out_s_strong']
    yield both
    for i, term in enumerate(('kd', 'bc', 'cc')):
        yield case(z, two, *names, suffix=f'_{term}', call=lambda i=i, **x: two.terms(**x)[i])
    one = MLKD(temps)
    yield case(z, one, 'out_s', 'out_t', suffix='_paper')
    for i, term in enumerate(('instance', 'batch', 'class')):
        yield case(z, one, 'out_s', 'out_t', suffix=f'_paper_{term}', call=lambda i=i, **x: one.terms(**x)[i])


def nkd(z):
    loss = NKD(**z.hp('gamma', 'T'))
    yield case(z, loss, 'out_s', 'out_t', 'target')
    yield case(z, loss, 'out_s', 'out_t', 'target', suffix='_target', call=lambda **x: loss.terms(**x)[0])
    yield case(z, loss, 'out_s', 'out_t', 'target', suffix='_nontarget', call=lambda **x: loss.terms(**x)[1])


def nst(z):
    yield case(z, NST(), 'fm_s', 'fm_t')
    yield case(z, NST('linear'), 'fm_s', 'fm_t', suffix='_linear')
    yield case(z, NST('gaussian'), 'fm_s', 'fm_t', suffix='_gaussian')
    yield case(z, NST('poly', d=2, c=0.5), 'fm_s', 'fm_t', suffix='_poly_c05')


def ofakd(z):
    yield case(z, OFAKD(**z.hp('eps', 'T')), 'out_s', 'out_t', 'target')


def ofd(z):
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


def pad(z):
    loss = PAD(z.shape('in_feat_s')[1], z.shape('in_feat_t')[1], **z.hp('eps'))
    roles = {
        'var_weight': 'variance.weight',
        'var_bias': 'variance.bias',
        'var_bn_weight': 'norm.weight',
        'var_bn_bias': 'norm.bias',
    }
    yield case(z, loss, 'feat_s', 'feat_t', more=parameters(z, loss, roles))


def pkt(z):
    yield case(z, PKT(**z.hp('eps')), 'feat_s', 'feat_t')
    yield case(z, PKT(eps=1e-6), 'feat_s', 'feat_t', suffix='_eps1em6')


def reviewkd(z):
    levels = range(z.hp('levels')['levels'])
    channels = [[z.shape(f'in_fm_{side}_{i}')[1] for i in levels] for side in 'st']
    loss = ReviewKD(*channels, **z.hp('mid_channels'))
    paths = {
        'conv1_w': 'conv1.0.weight',
        'bn1_w': 'conv1.1.weight',
        'bn1_b': 'conv1.1.bias',
        'conv2_w': 'conv2.0.weight',
        'bn2_w': 'conv2.1.weight',
        'bn2_b': 'conv2.1.bias',
        'att_w': 'att_conv.0.weight',
        'att_b': 'att_conv.0.bias',
    }
    roles = {
        f'{i}_{role}': f'abfs.{i}.{path}'
        for i in levels
        for role, path in paths.items()
        if f'param_{i}_{role}' in z
    }
    names = [f'fm_{side}_{i}' for side in 'st' for i in levels]

    def lists(x):
        return [[x[f'fm_{side}_{i}'] for i in levels] for side in 'st']

    yield case(z, loss, *names, more=parameters(z, loss, roles), call=lambda **x: loss(*lists(x)))
    x = lists({name: z.input(name) for name in names})
    z.compare('loss_terms', torch.stack(loss.terms(*x)))
    for i, out in enumerate(loss.fuse(*x)):
        z.compare(f'out_abf_{i}', out)
    alone = case(z, HCL(), 'fm_s', 'fm_t', suffix='_hcl', rename={'fm_s': 'hcl_fm_s', 'fm_t': 'hcl_fm_t'})
    alone.grads = {'grad_hcl_fm_s': alone.inputs['fm_s']}
    yield alone


def rkd(z):
    loss = RKD(**z.hp('w_dist', 'w_angle'))
    yield case(z, loss, 'feat_s', 'feat_t')
    yield case(z, loss, 'feat_s', 'feat_t', suffix='_dist', call=loss.distance)
    yield case(z, loss, 'feat_s', 'feat_t', suffix='_angle', call=loss.angle)


def sdd(z):
    names = ('patch_s', 'patch_t', 'target')
    yield case(z, SDD(**z.hp('T')), *names)
    yield case(z, SDD('dkd', **z.hp('T', 'alpha', 'beta')), *names, suffix='_dkd')
    fc = z.param('fc_weight'), z.param('fc_bias')
    z.compare('out_patch', local_logits(z.input('fm'), fc, tuple(z.arrays['hp_M'].tolist())))


def sp(z):
    yield case(z, SP(), 'fm_s', 'fm_t')


def srrl(z):
    loss = SRRL(z.shape('in_fm_s')[1], z.shape('in_fm_t')[1], **z.hp('sr_weight'))
    roles = {
        'conv_weight': 'connector.0.weight',
        'bn_weight': 'connector.1.weight',
        'bn_bias': 'connector.1.bias',
    }
    classifier = z.input('cls_weight'), z.input('cls_bias')
    names = ('fm_s', 'fm_t', 'out_t')
    yield case(
        z, loss, *names, more=parameters(z, loss, roles), call=lambda **x: loss(**x, classifier=classifier)
    )
    for i, term in enumerate(('fm', 'sr')):
        yield case(
            z,
            loss,
            *names,
            suffix=f'_{term}',
            call=lambda i=i, **x: loss.terms(**x, classifier=classifier)[i],
        )
    assert all(x.grad is None for x in classifier), 'the classifier must not be trained'


def st(z):
    yield case(z, SoftTarget(**z.hp('T')), 'out_s', 'out_t')


def ttm(z):
    yield case(z, TTM(**z.hp('l')), 'out_s', 'out_t')
    weighted = case(z, TTM(**z.hp('l'), weighted=True), 'out_s', 'out_t', suffix='_wttm')
    weighted.grads = {'grad_out_s_w': weighted.inputs['out_s']}
    yield weighted


def vid(z):
    loss = VID(z.shape('in_fm_s')[1], z.shape('in_fm_t')[1], **z.hp('mid_channels', 'eps', 'init_var'))
    # the constructor works in float32, the vector in float64
    torch.testing.assert_close(
        loss.alpha.detach().double(), torch.from_numpy(z.arrays['out_alpha_init']), rtol=1e-6, atol=0
    )
    z.open.discard('out_alpha_init')
    roles = {
        'conv1_w': 'regressor.0.weight',
        'conv2_w': 'regressor.2.weight',
        'conv3_w': 'regressor.4.weight',
    }
    roles['alpha'] = 'alpha'
    more = parameters(z, loss, roles)
    yield case(z, loss, 'fm_s', 'fm_t', more=more)


def wsld(z):
    yield case(z, WSLD(**z.hp('T')), 'out_s', 'out_t', 'target')


ADAPTERS = {
    'afd': afd,
    'at': at,
    'cc': cc,
    'cd': cd,
    'crd': crd,
    'dist': dist,
    'dkd': dkd,
    'eel': eel,
    'fitnet': fitnet,
    'ickd': ickd,
    'ikd': ikd,
    'irg': irg,
    'kdsvd': kdsvd,
    'logits': logits,
    'lskd': lskd,
    'mgd': mgd,
    'mlkd': mlkd,
    'nkd': nkd,
    'nst': nst,
    'ofakd': ofakd,
    'ofd': ofd,
    'pad': pad,
    'pkt': pkt,
    'reviewkd': reviewkd,
    'rkd': rkd,
    'sdd': sdd,
    'sp': sp,
    'srrl': srrl,
    'st': st,
    'ttm': ttm,
    'vid': vid,
    'wsld': wsld,
}
