"""How a golden file feeds a loss: one small generator of cases per method, driven by the file's keys."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from kd_losses.ab import AB
from kd_losses.adain import AdaINKD
from kd_losses.afd import AFD
from kd_losses.at import AT
from kd_losses.bss import BSS, BSSAttacker, sample_attack_class, select_base_samples
from kd_losses.byot import BYOT
from kd_losses.catkd import CATKD
from kd_losses.cc import CC
from kd_losses.cd import CD, GKD
from kd_losses.crd import CRD
from kd_losses.cskd import CSKD
from kd_losses.ctkd import CTKD
from kd_losses.dcm import DCM
from kd_losses.ddgsd import DDGSD
from kd_losses.dgkd import DGKD
from kd_losses.dist import DIST
from kd_losses.dkd import DKD
from kd_losses.dlb import DLB
from kd_losses.dml import DML
from kd_losses.dot import DOT
from kd_losses.eel import EEL
from kd_losses.fcfd import FCFD
from kd_losses.fitnet import FitNet
from kd_losses.fsp import FSP
from kd_losses.ft import FT, FactorTransfer
from kd_losses.ickd import ICKD
from kd_losses.ikd import IKD
from kd_losses.irg import IRG
from kd_losses.kdcl import KDCL
from kd_losses.kdsvd import KDSVD
from kd_losses.logits import Logits
from kd_losses.lskd import LSKD, standardize
from kd_losses.lwm import LwM, grad_cam
from kd_losses.mgd import MGD
from kd_losses.mlkd import MLKD
from kd_losses.nkd import NKD
from kd_losses.norm import NORM
from kd_losses.nst import NST
from kd_losses.ofakd import OFAKD
from kd_losses.ofd import OFD
from kd_losses.okddip import OKDDip
from kd_losses.onadvfd import OnAdvFD, d_loss, g_loss
from kd_losses.one import ONE
from kd_losses.pad import PAD
from kd_losses.pkt import PKT
from kd_losses.pskd import pskd_loss
from kd_losses.quest import QuEST
from kd_losses.reviewkd import HCL, ReviewKD
from kd_losses.rkd import RKD
from kd_losses.sad import SAD
from kd_losses.sdd import SDD, local_logits
from kd_losses.semckd import SemCKD
from kd_losses.simkd import SimKD
from kd_losses.sla import SLA
from kd_losses.sobolev import Sobolev, input_gradient
from kd_losses.sp import SP
from kd_losses.srrl import SRRL
from kd_losses.st import SoftTarget
from kd_losses.tfkd import TfKDReg, TfKDSelf
from kd_losses.ttm import TTM
from kd_losses.uskd import USKD
from kd_losses.vid import VID
from kd_losses.vkd import VkD
from kd_losses.wsld import WSLD


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


def tiny_net(z, side: str, img: torch.Tensor):
    """(h1, logits) of the two-convolution network that sobolev.md defines."""
    p = {key: z.param(f'{side}_{key}') for key in TINY}
    return tiny_forward(p, img)


TINY = [f'{layer}_{kind}' for layer in ('conv1', 'conv2', 'fc') for kind in 'wb']


def tiny_forward(p: dict, img: torch.Tensor):
    h1 = F.conv2d(img, p['conv1_w'], p['conv1_b'], padding=1).tanh()
    h2 = F.conv2d(h1, p['conv2_w'], p['conv2_b'], stride=2, padding=1).tanh()
    return h1, F.linear(h2.mean(dim=(2, 3)), p['fc_w'], p['fc_b'])


def tiny_pair(z):
    """Both networks on the same image, as leaves; the student's parameters by role."""
    img = z.input('img')
    p_s = {key: z.param(f's_{key}').requires_grad_() for key in TINY}
    p_t = {key: z.param(f't_{key}') for key in TINY}
    return img, p_s, tiny_forward(p_s, img), tiny_forward(p_t, img)


def tiny_grads(p_s: dict) -> dict:
    """Expected gradients; autograd leaves None where a parameter is not in the graph, the file has zeros."""
    for p in p_s.values():
        p.grad = torch.zeros_like(p)
    return {f'gradparam_s_{key}': p for key, p in p_s.items()}


def ab(z):
    yield case(z, AB(**z.hp('margin')), 'fm_s', 'fm_t')
    yield case(z, AB(**z.hp('margin'), reduction='batchmean'), 'fm_s', 'fm_t', suffix='_batchmean')
    loss = AB(z.shape('in_fm_s_conn')[1], z.shape('in_fm_t')[1], **z.hp('margin'))
    roles = {
        'conv_weight': 'connector.0.weight',
        'bn_weight': 'connector.1.weight',
        'bn_bias': 'connector.1.bias',
    }
    more = parameters(z, loss, roles)
    yield case(z, loss, 'fm_s', 'fm_t', suffix='_conn', rename={'fm_s': 'fm_s_conn'}, more=more)


def adain(z):
    loss = AdaINKD(**z.hp('eps'))
    weight, bias = z.input('cls_weight'), z.input('cls_bias')

    def tail(fm):
        return F.linear(fm.relu().mean(dim=(2, 3)), weight.detach(), bias.detach())

    names = ('fm_s', 'fm_t', 'out_t')
    yield case(z, loss, *names, call=lambda **x: loss(**x, teacher_tail=tail))
    for i, term in enumerate(('stat', 'adain')):
        yield case(
            z, loss, *names, suffix=f'_{term}', call=lambda i=i, **x: loss.terms(**x, teacher_tail=tail)[i]
        )


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


def bss(z):
    sample = z.hp('attack_size')['attack_size']
    out_s, out_t = tiny_net(z, 's', z.input('img'))[1], tiny_net(z, 't', z.input('img'))[1]
    z.compare('out_logits_s', out_s)
    z.compare('out_logits_t', out_t)
    target = z.input('target')
    index = select_base_samples(out_s, out_t, target, sample)
    assert index.tolist() == z.arrays['out_attack_idx'].tolist()
    classes = sample_attack_class(out_t, index, z.input('rand_u').detach())
    assert classes.tolist() == z.arrays['out_attack_class'].tolist()
    z.open -= {'out_attack_idx', 'out_attack_class'}
    for score, key in (('logit', 'out_attacked_img'), ('prob', 'out_attacked_img_prob')):
        attacker = BSSAttacker(**z.hp('step_alpha', 'num_steps', 'eps'), score=score)
        img = z.input('img').detach()[index]
        z.compare(key, attacker.attack(lambda x: tiny_net(z, 't', x)[1], img, target[index], classes))
    names = ('attacked_out_s', 'attacked_out_t')
    loss = BSS(**z.hp('T'))
    yield case(z, loss, *names)

    def cross_entropy(attacked_out_s, attacked_out_t):  # the authors' form: KL plus the teacher's entropy
        q = (attacked_out_t / loss.T).softmax(dim=1)
        return loss(attacked_out_s, attacked_out_t) - (q * q.log()).sum(dim=1).mean()

    yield case(z, loss, *names, suffix='_ce', call=cross_entropy)


def byot(z):
    loss_args = z.hp('T', 'alpha', 'beta')
    levels, _, width = z.shape('in_feats')

    def build(**kw):
        loss = BYOT([width] * levels, **loss_args, **kw).double()
        with torch.no_grad():
            for i, layer in enumerate(loss.adapt):
                layer.weight.copy_(z.param('adapt_weight')[i])
                layer.bias.copy_(z.param('adapt_bias')[i])
        return loss

    loss = build()
    names = ('outs', 'feats', 'target')
    yield case(z, loss, *names)
    for kind in ('weight', 'bias'):
        z.compare(f'gradparam_adapt_{kind}', torch.stack([getattr(layer, kind).grad for layer in loss.adapt]))
    for i, term in enumerate(('hard', 'soft', 'feat')):
        yield case(z, loss, *names, suffix=f'_{term}', call=lambda i=i, **x: loss.terms(**x)[i])
    yield case(z, build(skip=(1,)), *names, suffix='_code')


def catkd(z):
    yield case(z, CATKD(**z.hp('resolution')), 'cam_s', 'cam_t')
    yield case(z, CATKD(**z.hp('resolution'), normalize=False), 'cam_s', 'cam_t', suffix='_raw')


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


def cskd(z):
    yield case(z, CSKD(**z.hp('T')), 'out', 'out_pair')


def ctkd(z):
    hp = z.hp('t_start', 't_end', 'lambda')
    loss = CTKD(hp['t_start'], hp['t_end'])
    more = parameters(z, loss, {'theta': 'theta'})
    yield case(z, loss, 'out_s', 'out_t', more=more, call=lambda **x: loss(**x, lam=hp['lambda']))
    z.compare('out_temperature', loss.temperature)


def dcm(z):
    loss = DCM(**z.hp('eps'))
    names = ('outs_1', 'outs_2', 'target')
    yield case(z, loss, *names)
    yield case(z, loss, *names, suffix='_hard', call=lambda **x: loss.terms(**x)[0])
    yield case(z, loss, *names, suffix='_soft', call=lambda **x: loss.terms(**x)[1])


def ddgsd(z):
    hp = z.hp('T', 'lambda', 'mu')
    loss = DDGSD(hp['T'], hp['lambda'], hp['mu'])
    names = ('out_a', 'out_b', 'feat_a', 'feat_b', 'target')
    yield case(z, loss, *names)
    for i, term in enumerate(('ce', 'kl', 'mmd')):
        yield case(z, loss, *names, suffix=f'_{term}', call=lambda i=i, **x: loss.terms(**x)[i])


def dgkd(z):
    hp = z.hp('T', 'lambda')
    loss = DGKD(hp['T'], hp['lambda']).eval()
    yield case(z, loss, 'out_s', 'outs_t', 'target')
    keep = z.input('keep_mask').detach()
    yield case(z, loss, 'out_s', 'outs_t', 'target', suffix='_dropped', call=lambda **x: loss(**x, keep=keep))
    first = lambda out_s, outs_t, target: loss(out_s, outs_t[:1], target)  # noqa: E731
    yield case(z, loss, 'out_s', 'outs_t', 'target', suffix='_takd', call=first)

    def authors(out_s, outs_t, target):  # every divergence averaged over the classes as well
        ce = F.cross_entropy(out_s, target)
        return (1 - loss.lam) * ce + (loss(out_s, outs_t, target) - (1 - loss.lam) * ce) / out_s.shape[1]

    yield case(z, loss, 'out_s', 'outs_t', 'target', suffix='_code', call=authors)


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


def dlb(z):
    loss = DLB(**z.hp('T', 'alpha'))
    names = ('out', 'target', 'out_prev_now', 'out_prev_then', 'target_prev')
    yield case(z, loss, *names)
    yield case(z, loss, *names, suffix='_ce', call=lambda **x: loss.terms(**x)[0])
    yield case(z, loss, *names, suffix='_kd', call=lambda **x: loss.terms(**x)[1])


def dml(z):
    yield case(z, DML(), 'out_s', 'out_t', call=lambda out_s, out_t: DML()(out_s, out_t))
    outs = z.input('outs')
    for how in ('mean', 'sum'):
        loss = DML(how)
        rows = [loss(outs[k], [x for i, x in enumerate(outs) if i != k]) for k in range(len(outs))]
        z.compare(f'loss_peers_{how}', torch.stack(rows))
        if how == 'mean':
            (grad,) = torch.autograd.grad(sum(rows), outs)  # peers are detached: the rows do not mix
            z.compare('grad_outs_peers_mean', grad)


def dot(z):
    steps = z.hp('steps')['steps']
    p = [torch.nn.Parameter(z.param(f'p{i}')) for i in range(4)]
    optimiser = DOT(p, **z.hp('lr', 'momentum', 'delta', 'weight_decay', 'dampening'))
    paths = [[] for _ in p]

    def gradients(kind, step):
        for i, x in enumerate(p):
            key = f'grad_{kind}_p{i}'
            x.grad = z.input(key).detach()[step] if f'in_{key}' in z else None

    for step in range(steps):
        gradients('kd', step)
        optimiser.step_kd()
        gradients('task', step)
        optimiser.step()
        for path, x in zip(paths, p):
            path.append(x.detach().clone())
    for i, path in enumerate(paths):
        z.compare(f'out_p{i}', torch.stack(path))
    for key in [k for k in z.arrays if k.startswith('out_buf_')]:
        kind, i = key.split('_')[2:]
        name = {'task': 'momentum_buffer', 'kd': 'momentum_kd_buffer'}[kind]
        z.compare(key, optimiser.state[p[int(i[1:])]][name])
    yield from ()


def eel(z):
    widths = z.shape('in_feat_s')[1], z.shape('in_feat_t')[1]
    yield case(z, EEL(*widths, **z.hp('angle')), 'feat_s', 'feat_t', 'target')


def fcfd(z):
    loss = FCFD([1], [1], **z.hp('T', 'l2_weight'))
    names = ('fm_bridged', 'fm_t', 'out_s', 'out_mix', 'out_t')

    def whole(fm_bridged, fm_t, out_s, out_mix, out_t):
        return loss([[fm_bridged], [fm_bridged]], [fm_t, fm_t], out_s, out_t, [out_mix])

    yield case(z, loss, *names, call=whole)
    pair = ('fm_bridged', 'fm_t')
    for suffix, last in (('_app_mid', False), ('_app_final', True)):
        one = lambda fm_bridged, fm_t, last=last: loss.appearance([fm_bridged], fm_t, last)  # noqa: E731
        yield case(z, loss, *pair, suffix=suffix, call=one)
    for suffix, name in (('_kl_student', 'out_s'), ('_kl_mix', 'out_mix')):
        kl = lambda name=name, **x: loss.divergence(x[name], x['out_t'])  # noqa: E731
        yield case(z, loss, name, 'out_t', suffix=suffix, call=kl)


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


def fsp(z):
    names = ('fm_s1', 'fm_s2', 'fm_t1', 'fm_t2')
    for suffix, pool in (('', 'avg'), ('_max', 'max')):
        one = case(z, FSP(pool), *names, suffix=suffix)
        one.grads = {f'grad_{name}{suffix}': one.inputs[name] for name in names[:2]}
        yield one


def ft(z):
    yield case(z, FT(), 'factor_s', 'factor_t')
    c_s, c_t = z.shape('in_fm_s')[1], z.shape('in_fm_t')[1]

    def roles(side, prefix, part, layers):
        return {
            f'{side}_{part}{i}_{kind}': f'{prefix}.{2 * i}.{kind}'
            for i in layers
            for kind in ('weight', 'bias')
        }

    whole = FactorTransfer(c_s, c_t, **z.hp('k'))
    layers = range(3)
    learner = parameters(z, whole, roles('tran', 'translator.encoder', 'conv', layers))
    coder = roles('para', 'paraphraser.encoder', 'conv', layers)
    coder |= roles('para', 'paraphraser.decoder', 'deconv', layers)
    coder = parameters(z, whole, coder)
    factor, recon = whole.paraphraser(z.input('fm_t'))
    z.compare('out_factor_t', factor)
    z.compare('out_recon', recon)
    z.compare('out_factor_s', whole.translator(z.input('fm_s')))
    mse = {f'{key}_mse': p for key, p in coder.items()}
    z.compare('loss_recon_l1', F.l1_loss(recon, z.input('fm_t')))
    yield Case(whole.pretrain_loss, {'fm_t': z.input('fm_t')}, 'loss_recon_mse', mse)
    yield case(
        z, whole, 'fm_s', 'fm_t', suffix='_pipeline', more=learner | {'grad_fm_s': (x := z.input('fm_s'))},
        call=lambda fm_s, fm_t: whole(x, fm_t),
    )  # fmt: skip


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


def kdcl(z):
    hp = z.hp('T', 'lambda')
    for suffix, mode in (('', 'minlogit'), ('_naive', 'naive'), ('_general', 'general')):
        loss = KDCL(mode, hp['T'], hp['lambda'])
        weights = z.input('weights').detach() if mode == 'general' else None
        one = case(
            z, loss, 'outs', 'target', suffix=suffix, call=lambda m=loss, w=weights, **x: m(**x, weights=w)
        )
        yield one
        if mode != 'general':
            z.compare(f'out_{mode}', loss.combine(z.input('outs'), z.input('target')))
    hard = KDCL('minlogit', hp['T'], 0.0)
    yield case(z, hard, 'outs', 'target', suffix='_hard')


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


def lwm(z):
    img, p_s, (fm_s, out_s), (fm_t, out_t) = tiny_pair(z)
    target = z.input('target')
    for key, value in (('fm_s', fm_s), ('fm_t', fm_t), ('logits_s', out_s), ('logits_t', out_t)):
        z.compare(f'out_{key}', value)
    for side, fm, out in (('s', fm_s, out_s), ('t', fm_t, out_t)):
        cam = grad_cam(out, fm, target, side=side).flatten(1)
        z.compare(f'out_cam_{side}', F.normalize(cam, dim=1))
    value = LwM('sum')(out_s, fm_s, out_t, fm_t, target)
    z.compare('loss_sum', value)
    z.open.discard('loss_zoo_wrong_cam')  # the number of the seed zoo's bug
    value = LwM()(out_s, fm_s, out_t, fm_t, target)
    assert abs(value.item() / z.arrays['loss_zoo_wrong_cam'].item() - 1) > 1e-6
    yield Case(lambda: value, {}, 'loss', tiny_grads(p_s))


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


def norm(z):
    yield case(z, NORM(**z.hp('num_repeats')), 'fm_s', 'fm_t')


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


def okddip(z):
    D, width = z.shape('in_feats')[2], z.shape('param_query')[0]
    loss = OKDDip(D, **z.hp('T'), factor=D // width)
    kd_weight = z.hp('kd_weight')['kd_weight']
    names = ('outs', 'feats', 'out_leader', 'target')
    more = parameters(z, loss, {'query': 'query.weight', 'key': 'key.weight'})
    yield case(z, loss, *names, more=more, call=lambda **x: loss(**x, kd_weight=kd_weight))
    for i, term in enumerate(('hard', 'peer', 'leader')):
        yield case(z, loss, *names, suffix=f'_{term}', call=lambda i=i, **x: loss.terms(**x)[i])
    z.compare('out_attention', loss.attention(z.input('feats')))
    z.compare('out_peer_targets', loss.targets(z.input('outs'), z.input('feats')))


def onadvfd(z):
    loss = OnAdvFD(**z.hp('T'))
    names = ('out_1', 'out_2', 'target', 'score_g')

    def both(score_g, **x):
        return loss(**x) + g_loss(score_g)

    one = case(z, loss, *names, call=both)
    one.grads = {'grad_out_1': one.inputs['out_1'], 'grad_score_g': one.inputs['score_g']}
    yield one
    yield case(z, loss, *names[:3], suffix='_logit')
    yield case(z, loss, 'score_g', suffix='_g', call=lambda score_g: g_loss(score_g))
    scores = case(z, loss, 'score_d_real', 'score_d_fake', suffix='_d', call=lambda **x: d_loss(*x.values()))
    scores.grads = {f'grad_{name}': x for name, x in scores.inputs.items()}
    yield scores


def one(z):
    loss = ONE(z.shape('in_feat')[1], z.shape('in_outs')[0], **z.hp('T'))
    kd_weight = z.hp('kd_weight')['kd_weight']
    roles = {'gate_weight': 'gate.weight', 'gate_bias': 'gate.bias'}
    roles |= {'gate_bn_weight': 'norm.weight', 'gate_bn_bias': 'norm.bias'}
    names = ('outs', 'feat', 'target')
    more = parameters(z, loss, roles)
    yield case(z, loss, *names, more=more, call=lambda **x: loss(**x, kd_weight=kd_weight))
    z.compare('out_ensemble', loss.ensemble)
    yield case(z, loss, *names, suffix='_hard', call=lambda **x: loss.terms(**x)[0])
    yield case(z, loss, *names, suffix='_kd', call=lambda **x: loss.terms(**x)[1])


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


def pskd(z):
    alpha = z.hp('alpha')['alpha']
    yield case(z, None, 'out', 'prev_prob', 'target', call=lambda **x: pskd_loss(**x, alpha=alpha))


def quest(z):
    words = z.param('centroids')
    hp = z.hp('tau', 'scale_init')
    loss = QuEST(z.shape('in_fm_s')[1], words.shape[1], len(words), hp['tau'], hp['scale_init'], words)
    fill(loss, {'weight': z.param('weight')[:, :, 0, 0], 'scale': z.param('scale')})
    yield case(z, loss, 'fm_s', 'fm_t')
    z.compare('gradparam_weight', loss.weight.grad[:, :, None, None])
    z.compare('gradparam_scale', loss.scale.grad)


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


def sad(z):
    one = case(z, SAD(**z.hp('T')), 'fm', 'fm_next')
    yield one
    assert one.inputs['fm_next'].grad is None, 'a gradient in the deeper map'


def sdd(z):
    names = ('patch_s', 'patch_t', 'target')
    yield case(z, SDD(**z.hp('T')), *names)
    yield case(z, SDD('dkd', **z.hp('T', 'alpha', 'beta')), *names, suffix='_dkd')
    fc = z.param('fc_weight'), z.param('fc_bias')
    z.compare('out_patch', local_logits(z.input('fm'), fc, tuple(z.arrays['hp_M'].tolist())))


def semckd(z):
    hp = z.hp('batch_size', 'factor', 'n_s', 'n_t')
    S, T = range(hp['n_s']), range(hp['n_t'])
    channels = [z.shape(f'in_fm_s_{i}')[1] for i in S], [z.shape(f'in_fm_t_{j}')[1] for j in T]
    loss = SemCKD(*channels, hp['batch_size'], hp['factor'])
    parts = [('query', i) for i in S] + [('key', j) for j in T]
    roles = {
        f'{name}{i}_{layer}_{short}': f'{name}.{i}.{layer}.{kind}'
        for name, i in parts
        for layer in ('fc1', 'fc2')
        for short, kind in (('w', 'weight'), ('b', 'bias'))
    }
    layers = {'conv1_w': '0.weight', 'bn1_w': '1.weight', 'bn1_b': '1.bias', 'conv2_w': '3.weight'}
    layers |= {'bn2_w': '4.weight', 'bn2_b': '4.bias', 'conv3_w': '6.weight'}
    roles |= {
        f'reg_{i}_{j}_{role}': f'regressor.{i}.{j}.{path}'
        for i in S
        for j in T
        for role, path in layers.items()
    }
    names = [f'fm_s_{i}' for i in S] + [f'fm_t_{j}' for j in T]

    def lists(x):
        return [x[f'fm_s_{i}'] for i in S], [x[f'fm_t_{j}'] for j in T]

    more = parameters(z, loss, roles)
    both = case(z, loss, *names, more=more, call=lambda **x: loss(*lists(x)))
    both.grads = {key: x for key, x in both.grads.items() if '_t_' not in key}
    yield both
    w, m = loss.terms(*lists({name: z.input(name) for name in names}))
    z.compare('out_attention', w)
    z.compare('out_mse', m)


def simkd(z):
    loss = SimKD(z.shape('in_fm_s')[1], z.shape('in_fm_t')[1], **z.hp('factor'))
    roles = {f'conv{i + 1}_weight': f'projector.{3 * i}.weight' for i in range(3)}
    roles |= {f'bn{i + 1}_{x}': f'projector.{3 * i + 1}.{x}' for i in range(3) for x in ('weight', 'bias')}
    yield case(z, loss, 'fm_s', 'fm_t', more=parameters(z, loss, roles))
    z.compare('out_logits', loss.predict(z.input('fm_s'), (z.input('cls_weight'), z.input('cls_bias'))))


def sla(z):
    loss = SLA(**z.hp('num_transforms', 'T'))
    names = ('joint_out', 'out', 'target')
    yield case(z, loss, *names)
    for i, term in enumerate(('joint', 'single', 'kd')):
        yield case(z, loss, *names, suffix=f'_{term}', call=lambda i=i, **x: loss.terms(**x)[i])
    z.compare('out_agg', loss.aggregate(z.input('joint_out')))


def sobolev(z):
    img, p_s, (_, out_s), (_, out_t) = tiny_pair(z)
    target = z.input('target')
    z.compare('out_logits_s', out_s)
    z.compare('out_logits_t', out_t)
    z.compare('out_jac_s', input_gradient(out_s, img, target))
    jac_t = input_gradient(out_t, img, target)
    z.compare('out_jac_t', jac_t)
    loss = Sobolev()
    value = loss(out_s, out_t, img, target)
    assert torch.equal(value, loss(out_s, None, img, target, jac_t))
    yield Case(lambda: value, {}, 'loss', tiny_grads(p_s))


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


def tfkd(z):
    reg = z.hp('reg_T', 'reg_alpha', 'reg_multiplier', 'correct_prob')
    for suffix, variant in (('', 'code'), ('_regpaper', 'paper')):
        yield case(z, TfKDReg(*reg.values(), variant), 'out_s', 'target', suffix=suffix)
    yield case(z, TfKDSelf(**z.hp('T', 'alpha', 'multiplier')), 'out_s', 'out_t', 'target', suffix='_self')


def ttm(z):
    yield case(z, TTM(**z.hp('l')), 'out_s', 'out_t')
    weighted = case(z, TTM(**z.hp('l'), weighted=True), 'out_s', 'out_t', suffix='_wttm')
    weighted.grads = {'grad_out_s_w': weighted.inputs['out_s']}
    yield weighted


def uskd(z):
    hp = z.hp('alpha', 'beta', 'mu')
    K, width = z.shape('param_fc_weight')
    loss = USKD(width, K, **hp)
    roles = {'fc_weight': 'fc.weight', 'fc_bias': 'fc.bias'}
    names = ('feat_mid', 'out_s', 'target')
    yield case(z, loss, *names, more=parameters(z, loss, roles))
    for i, term in enumerate(('target', 'nontarget', 'weak')):
        yield case(z, loss, *names, suffix=f'_{term}', call=lambda i=i, **x: loss.terms(**x)[i])
    code = USKD(width, K, **hp, rank_on='logprob')
    parameters(z, code, roles)
    yield case(z, code, *names, suffix='_code')


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


def vkd(z):
    loss = VkD(z.shape('in_feat_s')[1], z.shape('in_feat_t')[1]).double()
    with torch.no_grad():
        loss.projection.weight = z.param('weight')
    yield case(z, loss, 'feat_s', 'feat_t')


def wsld(z):
    yield case(z, WSLD(**z.hp('T')), 'out_s', 'out_t', 'target')


ADAPTERS = {
    'ab': ab,
    'adain': adain,
    'afd': afd,
    'at': at,
    'bss': bss,
    'byot': byot,
    'catkd': catkd,
    'cc': cc,
    'cd': cd,
    'crd': crd,
    'cskd': cskd,
    'ctkd': ctkd,
    'dcm': dcm,
    'ddgsd': ddgsd,
    'dgkd': dgkd,
    'dist': dist,
    'dkd': dkd,
    'dlb': dlb,
    'dml': dml,
    'dot': dot,
    'eel': eel,
    'fcfd': fcfd,
    'fitnet': fitnet,
    'fsp': fsp,
    'ft': ft,
    'ickd': ickd,
    'ikd': ikd,
    'irg': irg,
    'kdcl': kdcl,
    'kdsvd': kdsvd,
    'logits': logits,
    'lskd': lskd,
    'lwm': lwm,
    'mgd': mgd,
    'mlkd': mlkd,
    'nkd': nkd,
    'norm': norm,
    'nst': nst,
    'ofakd': ofakd,
    'ofd': ofd,
    'okddip': okddip,
    'onadvfd': onadvfd,
    'one': one,
    'pad': pad,
    'pkt': pkt,
    'pskd': pskd,
    'quest': quest,
    'reviewkd': reviewkd,
    'rkd': rkd,
    'sad': sad,
    'sdd': sdd,
    'semckd': semckd,
    'simkd': simkd,
    'sla': sla,
    'sobolev': sobolev,
    'sp': sp,
    'srrl': srrl,
    'st': st,
    'tfkd': tfkd,
    'ttm': ttm,
    'uskd': uskd,
    'vid': vid,
    'vkd': vkd,
    'wsld': wsld,
}
