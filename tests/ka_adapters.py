"""How a golden file feeds an amalgamation loss, as adapters.py does for distillation."""

import torch
from torch import nn

from ka_losses.afk import AFK, Filter
from ka_losses.cfl import CFL, mmd
from ka_losses.concat_kd import ConcatKD
from ka_losses.customize import Customize, entropies, select_teacher
from ka_losses.fedka import FedKA, fed_average, selection_prob, transferability
from ka_losses.ka_vit import TokenAmalgamation, TokenExpand
from ka_losses.layerwise import LayerwiseKA
from ka_losses.ood_ka import OODKAGenerator, disc_loss
from ka_losses.recombination import RangeQuantizer, SoftFocal, combine_bns, combine_convs
from ka_losses.sbm import SBM, ChannelCoding
from ka_losses.soka import GradNorm, SOKAFeature
from ka_losses.subtask import SubTask
from ka_losses.transformer_ka import SeqAgg, SeqHint, TaskAmalgamation, compress_tokens, detr_ce, giou
from tests.adapters import Case, fill, parameters


def many(z, stem: str) -> list[str]:
    """The names stem0, stem1, ... of the file's inputs."""
    names = []
    while f'in_{stem}{len(names)}' in z:
        names.append(f'{stem}{len(names)}')
    return names


def listed(z, module, call, inputs: list[str], suffix='', key='loss', more=None) -> Case:
    """A case with inputs taken by name: call({name: value}) -> loss, gradients grad_<name><suffix>."""
    values = {name: z.input(name) for name in inputs}
    if module is not None:
        module.double()
    grads = {f'grad_{name}{suffix}': x for name, x in values.items() if x.requires_grad}
    return Case(lambda **x: call(x), values, f'{key}{suffix}', grads | (more or {}))


def roles_of(z) -> list[str]:
    return [key.removeprefix('param_') for key in z.arrays if key.startswith('param_')]


def terms_of(z, module, call, inputs, names) -> None:
    """Compare return_terms with the file's loss_<term>; call(values, **options)."""
    values = {name: z.input(name) for name in inputs}
    loss, terms = call(values, return_terms=True)
    assert torch.equal(loss, call(values)) and set(terms) == set(names)
    for term, key in names.items():
        if key:
            z.compare(key, terms[term])


def layerwise(z):
    teachers = many(z, 'fm_t_')
    loss = LayerwiseKA(
        z.shape('in_fm_s')[1], [z.shape(f'in_{t}')[1] for t in teachers], **z.hp('w_amal', 'w_recons')
    )
    more = parameters(z, loss, {role: role.replace('_', '.') for role in roles_of(z)})

    def call(x, **options):
        return loss(x['fm_s'], [x[t] for t in teachers], **options)

    terms_of(z, loss, call, ['fm_s', *teachers], {'amal': 'loss_amal', 'recons': 'loss_recons'})
    yield listed(z, loss, call, ['fm_s', *teachers], more=more)


def cfl_block(z, stem: str, block: str):
    student, teachers = f'{stem}_s', many(z, f'{stem}_t_')
    hp = z.hp('h_channels', 'normalized', 'beta') | {'sigmas': tuple(z.arrays['hp_sigmas'].tolist())}
    channels = [z.shape(f'in_{name}')[1] for name in (student, *teachers)]
    loss = CFL(channels[0], channels[1:], **hp, block=block)
    kinds = ('conv1_', 'conv2_', 'downsample_')

    def path(role: str) -> str:
        head, _, kind = role.rpartition('_')
        for word in kinds:  # extractor_0_conv1 -> extractor.0.conv1
            head = head.replace(f'_{word[:-1]}', f'.{word[:-1]}')
        for word in ('align_s', 'align_t', 'dec_t', 'extractor'):
            if head.startswith(word):
                head = word + head.removeprefix(word).replace('_', '.')
        return f'{head}.{kind}'

    more = parameters(z, loss, {role: path(role) for role in roles_of(z)})

    def call(x, **options):
        return loss(x[student], [x[t] for t in teachers], **options)

    names = [student, *teachers]
    terms_of(z, loss, call, names, {'mmd': 'loss_mmd', 'recons': 'loss_recons'})
    values = {name: z.input(name) for name in names}
    h_s, h_ts = loss.common(values[student], [values[t] for t in teachers])
    z.compare('out_hs', h_s)
    for i, h_t in enumerate(h_ts):
        z.compare(f'out_ht_{i}', h_t)
    if 'loss_mmd_each' in z:
        each = [mmd(h_s, h_t, loss.sigmas, loss.normalized) for h_t in h_ts]
        z.compare('loss_mmd_each', torch.stack(each))
    yield listed(z, loss, call, names, more=more)


def cfl(z):
    yield from cfl_block(z, 'fm', 'conv')


def cfl_fc(z):
    yield from cfl_block(z, 'feat', 'fc')


def sbm(z):
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


def customize(z):
    students, teachers = many(z, 'fm_s_'), many(z, 'fm_t_')
    h = [z.shape(f'param_s_conv{i}_weight')[0] for i in range(len(students))]
    loss = Customize([z.shape(f'in_{n}')[1] for n in students], [z.shape(f'in_{n}')[1] for n in teachers], h)
    roles = {'s_m': 'm'} | {
        f'{side}_conv{i}_{kind}': f'bridge_{side}.{i}.{kind}'
        for side in 'st'
        for i in range(len(h))
        for kind in ('weight', 'bias')
    }
    more = parameters(z, loss, roles)
    names = [*students, *teachers, 'out_s', 'out_t']

    def call(x, **options):
        return loss([x[n] for n in students], [x[n] for n in teachers], x['out_s'], x['out_t'], **options)

    terms_of(z, loss, call, names, {'feat': '', 'soft': 'loss_soft', 'wn': 'loss_wn'})
    levels, penalties = [], []
    for i in range(len(h)):
        part = Customize([loss.s_channels[i]], [loss.t_channels[i]], [h[i]])
        values = {
            f'bridge_{side}.0.{kind}': z.param(f'{side}_conv{i}_{kind}')
            for side in 'st'
            for kind in ('weight', 'bias')
        }
        fill(part, values)
        x = [[z.input(students[i])], [z.input(teachers[i])], z.input('out_s'), z.input('out_t')]
        _, terms = part(*x, return_terms=True)
        levels.append(terms['feat'])
        penalties.append(terms['wn'])
    z.compare('loss_feat', torch.stack(levels))
    z.compare('loss_wn_each', torch.stack(penalties))
    sources = [z.input(name) for name in many(z, 'sel_out_t_')]
    z.compare('out_entropy', entropies(sources))
    z.compare('out_select', select_teacher(sources).double())
    yield listed(z, loss, call, names, more=more)


def soka(z):
    levels = {}
    for level in ('fea', 'rep'):
        teachers = many(z, f'{level}_t_')
        loss = SOKAFeature(len(teachers), z.shape(f'param_{level}_weight')[1:])
        more = parameters(z, loss, {f'{level}_weight': 'weight'})
        levels[level] = loss, teachers
        yield listed(
            z,
            loss,
            lambda x, a=loss, s=f'{level}_s', ts=teachers: a(x[s], [x[t] for t in ts]),
            [f'{level}_s', *teachers],
            key=f'loss_{level}',
            more=more,
        )
    both = listed(
        z,
        None,
        lambda x: sum(a(x[f'{n}_s'], [x[t] for t in ts]) for n, (a, ts) in levels.items()),
        [name for n, (_, ts) in levels.items() for name in (f'{n}_s', *ts)],
    )
    both.grads = {}
    yield both

    norm = GradNorm(len(z.arrays['in_gn_weights']), z.hp('gn_alpha')['gn_alpha']).double()
    with torch.no_grad():
        norm.weights.copy_(z.input('gn_weights'))
        norm.init_losses.copy_(z.input('gn_init_loss'))
    value = norm.balance(z.input('gn_task_loss'), z.input('gn_grad_norm'))
    z.compare('loss_gradnorm', value)
    value.backward()
    z.compare('grad_gn_weights', norm.weights.grad)
    torch.optim.SGD(norm.parameters(), z.hp('gn_lr')['gn_lr']).step()
    norm.renormalise()
    z.compare('out_gn_weights', norm.weights)


def concat_kd(z):
    teachers = many(z, 'out_t_')
    for mode in ('kl', 'soft_ce', 'mse', 'parts'):
        loss = ConcatKD(**z.hp('T'), mode=mode)
        yield listed(
            z,
            loss,
            lambda x, a=loss: a(x['out_s'], [x[t] for t in teachers]),
            ['out_s', *teachers],
            suffix=f'_{mode}',
        )
    yield listed(
        z,
        None,
        lambda x: ConcatKD(**z.hp('T'))(x['out_s'], [x[t] for t in teachers]),
        ['out_s', *teachers],
    )


def afk(z):
    students, teachers = many(z, 'out_s_'), many(z, 'out_t_')
    values = [[z.input(n) for n in names] for names in (students, teachers)]
    _, terms = AFK()(*values, return_terms=True)
    z.compare('loss_each', torch.stack(list(terms.values())))
    mid = z.input('filter_mid')
    gate = Filter(mid.shape[1], z.shape('param_filter_w2')[0], min_hidden=z.shape('param_filter_w1')[0])
    fill(gate, {'w1.weight': z.param('filter_w1'), 'w2.weight': z.param('filter_w2')})
    residual, branch = z.input('filter_residual').detach(), z.input('filter_branch').detach()
    out = torch.relu(branch + residual * gate(mid))
    z.compare('out_filter', out)
    (out * z.input('filter_cotangent').detach()).sum().backward()
    z.compare('grad_filter_mid', mid.grad)
    yield listed(
        z, None, lambda x: AFK()([x[n] for n in students], [x[n] for n in teachers]), [*students, *teachers]
    )


def transformer_ka(z):
    teachers = many(z, 'seq_t_')
    dim = z.shape('in_seq_s')[2]
    norm = 'channel' if z.hp('channel_norm')['channel_norm'] else 'layer'
    hint = SeqHint(len(teachers), dim, norm)
    affine = {'norm.weight': z.param('norm_weight'), 'norm.bias': z.param('norm_bias')}
    fill(hint, affine)
    mask = torch.from_numpy(z.arrays['in_pad_mask'])
    for suffix, pad in (('', mask), ('_nomask', None)):
        made = listed(
            z,
            hint,
            lambda x, m=pad: hint(x['seq_s'], [x[t] for t in teachers], m),
            ['seq_s', *teachers],
            suffix=suffix,
        )
        made.loss = f'loss_seq_hint{suffix}'
        yield made
    sequences = [z.input(t).detach() for t in teachers]
    z.compare('out_sim_keep', compress_tokens(sequences).double())
    z.compare('out_sim_keep_norm', compress_tokens(sequences, cosine=True).double())
    if 'in_seq_s_agg' in z:
        agg = SeqAgg(len(teachers), dim, norm)
        fill(agg, affine)
        more = parameters(z, agg, {'proj_matrix': 'proj'})
        made = listed(
            z,
            agg,
            lambda x: agg(x['seq_s_agg'], [x[t] for t in teachers]),
            ['seq_s_agg', *teachers],
            more=more,
        )
        made.loss = 'loss_seq_agg'
        yield made

    tasks = [z.arrays[f'hp_task_{i}'].tolist() for i in range(len(many(z, 'logits_t_')))]
    hp = z.hp('threshold', 'n_max', 'eos') | {
        'T': z.hp('kd_T')['kd_T'],
        'cost': z.arrays['hp_costs'].tolist(),
    }
    loss = TaskAmalgamation(tasks, z.shape('in_logits_s')[2] - 1, **hp)
    outs_t = [
        {'logits': z.input(a), 'boxes': z.input(b)} for a, b in zip(many(z, 'logits_t_'), many(z, 'boxes_t_'))
    ]

    def call(x, **options):
        return loss({'logits': x['logits_s'], 'boxes': x['boxes_s_raw'].sigmoid()}, outs_t, **options)

    names = ['logits_s', 'boxes_s_raw']
    terms_of(z, loss, call, names, {'kd': 'loss_kd', 'bbox': 'loss_bbox', 'giou': 'loss_giou'})
    targets = loss.targets(outs_t)
    z.compare('out_n_targets', torch.tensor([len(t['labels']) for t in targets]).double())
    z.compare('out_labels', torch.cat([t['labels'] for t in targets]).double())
    z.compare('out_keep', torch.cat([t['keep'] for t in targets]).double())
    logits, boxes = z.input('logits_s').detach(), z.input('boxes_s_raw').detach().sigmoid()
    pairs = loss.match({'logits': logits, 'boxes': boxes}, targets)
    z.compare('out_match_src', torch.cat([source for source, _ in pairs]).double())
    z.compare('out_match_tgt', torch.cat([wanted for _, wanted in pairs]).double())
    labels = torch.zeros(logits.shape[:2], dtype=torch.long)
    for n, ((source, wanted), target) in enumerate(zip(pairs, targets)):
        labels[n, source] = target['labels'][wanted]
    z.compare('loss_ce', detr_ce(logits, labels, loss.eos))
    assert giou(boxes, boxes).sub(1).abs().max() < 1e-9
    yield listed(z, loss, call, names)


def ka_vit(z):
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


def fedka(z):
    k = z.hp('k')['k']
    loss = FedKA(z.shape('in_fm_s')[1], round(z.shape('in_fm_t')[1] / k), k)
    roles = {role: f'translator.{role.replace("_", ".")}' for role in roles_of(z)}
    more = parameters(z, loss, roles)
    z.compare('out_translated', loss.translator(z.input('fm_s')))
    tr = transferability(z.input('saliency_student').detach(), z.input('saliency_teachers').detach())
    z.compare('out_transferability', tr)
    z.compare('out_select_prob', selection_prob(tr))
    states = [{'w': w} for w in z.input('fedavg_w').detach()]
    z.compare('out_fedavg', fed_average(states, z.input('fedavg_a').detach())['w'])
    yield listed(z, loss, lambda x: loss(x['fm_s'], x['fm_t']), ['fm_s', 'fm_t'], more=more)


def subtask(z):
    loss = SubTask(z.arrays['hp_sub_classes'].tolist(), z.shape('in_out_t')[1], **z.hp('lambda_adv', 'T'))
    names = ['out_s', 'out_adv', 'out_t']

    def call(x, **options):
        return loss(x['out_s'], x['out_adv'], x['out_t'], **options)

    terms_of(z, loss, call, names, {'sub': 'loss_sub', 'adv': 'loss_adv_kl'})
    made = listed(z, loss, call, names)
    made.grads['grad_out_adv_main'] = made.inputs['out_adv']
    yield made
    head = listed(z, loss, lambda x: loss.adv_loss(x['out_adv'], x['out_t']), ['out_adv', 'out_t'])
    head.loss, head.grads = 'loss_adv', {'grad_out_adv_head': head.inputs['out_adv']}
    yield head


def recombination(z):
    inputs = [z.input(name).detach() for name in many(z, 'x_')]
    convs, bns = [], []
    for i in range(len(inputs)):
        weight = z.param(f'conv{i}_weight')
        conv = nn.Conv2d(weight.shape[1], weight.shape[0], weight.shape[2:], padding=1)
        fill(conv, {'weight': weight, 'bias': z.param(f'conv{i}_bias')})
        bn = nn.BatchNorm2d(len(weight)).eval()
        fill(bn, {'weight': z.param(f'bn{i}_weight'), 'bias': z.param(f'bn{i}_bias')})
        bn.running_mean.copy_(z.param(f'bn{i}_mean'))
        bn.running_var.copy_(z.param(f'bn{i}_var'))
        convs.append(conv)
        bns.append(bn)
    joined = combine_convs(convs)
    z.compare('out_conv_weight', joined.weight)
    z.compare('out_y', combine_bns(bns).eval()(joined(torch.cat(inputs, dim=1))))
    x = z.input('quant_x')
    symbols = RangeQuantizer(**{'levels': z.hp('quant_levels')['quant_levels']})(x)
    z.compare('out_quant_symbols', symbols.detach().round())
    z.compare('out_quant', symbols)
    (symbols * z.input('quant_cotangent').detach()).sum().backward()
    z.compare('grad_quant_x', x.grad)
    for gamma, key, suffix in ((0.0, 'loss', ''), (2.0, 'loss_soft_focal_g2', '_g2')):
        loss = SoftFocal(gamma)
        made = listed(z, loss, lambda x, a=loss: a(x['seg_s'], x['seg_t']), ['seg_s', 'seg_t'], suffix=suffix)
        made.loss = key
        yield made


def ood_ka(z):
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


KA_ADAPTERS = {
    'afk': afk,
    'cfl': cfl,
    'cfl_fc': cfl_fc,
    'concat_kd': concat_kd,
    'customize': customize,
    'fedka': fedka,
    'ka_vit': ka_vit,
    'layerwise': layerwise,
    'ood_ka': ood_ka,
    'recombination': recombination,
    'sbm': sbm,
    'soka': soka,
    'subtask': subtask,
    'transformer_ka': transformer_ka,
}
