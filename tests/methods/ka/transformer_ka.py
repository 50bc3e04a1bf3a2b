"""How transformer_ka.npz feeds ka_losses/transformer_ka.py, and how it is called on random tensors."""

import torch

from ka_losses.transformer_ka import SeqAgg, SeqHint, TaskAmalgamation, compress_tokens, detr_ce, giou
from tests.methods.shared import fill, listed, many, parameters, terms_of

cases = {
    'transformer_ka': """
loss = m.TaskAmalgamation([[0, 2], [1]], 3)
inputs = {'out_s': {'logits': S(n, 5, 4), 'boxes': S(n, 5, 4).sigmoid()},
          'outs_t': [{'logits': T(n, 5, 3), 'boxes': T(n, 5, 4).sigmoid()},
                     {'logits': T(n, 4, 2), 'boxes': T(n, 4, 4).sigmoid()}]}
""",
    'transformer_ka_hint': """
loss = m.SeqHint(2, 5)
inputs = {'seq_s': S(8, n, 5), 'seqs_t': [T(4, n, 5), T(4, n, 5)]}
""",
    'transformer_ka_agg': """
loss = m.SeqAgg(2, 5, norm='layer')
inputs = {'seq_s': S(4, n, 5), 'seqs_t': [T(4, n, 5), T(4, n, 5)]}
""",
}
rows = {
    'transformer_ka': {
        'one_logit': 'the background is a class',
        'no_gradcheck': 'its boxes are made of leaves before the call',
        'not_compiled': "scipy's assignment",
        'any_size': {'outs_t.boxes': "a teacher's boxes go with its logits"},
    },
    'transformer_ka_agg': {
        'layers': 'the projection',
    },
}


def golden(z):
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
