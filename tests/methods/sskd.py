"""How sskd.npz feeds kd_losses/sskd.py."""

import torch

from kd_losses.sskd import SSKD, SSHead, head_loss, similarities
from tests.methods.shared import Case, case, leaf, parameters

exceptions = {
    'coarse': 'the teacher looks at the turned images',
    'labels_in_part': 'soft targets of the upright images and similarities need no label',
    'layers': 'the teacher and its head',
    'masked_class': 'the divergence is weighed by probabilities, a class of probability 0 counts nothing',
    'no_meta': 'the teacher looks at the turned images',
    'resting': ('head_t', 'it learned before'),
}
image_size = (8, 8)
alone = """
loss = m.SSKD()
inputs = {'out_s': S(4 * n, 7), 'proj_s': S(4 * n, 5), 'out_t': T(4 * n, 7), 'proj_t': T(4 * n, 6),
          'target': torch.arange(n)}
"""


def golden(z):
    hp = {key.removeprefix('hp_'): x.item() for key, x in z.arrays.items() if key.startswith('hp_')}
    loss, names = SSKD(**hp), ('out_s', 'proj_s', 'out_t', 'proj_t', 'target')
    yield case(z, loss, *names)
    for i, term in enumerate(('ce', 'kd', 'tf', 'ss')):
        yield case(z, loss, *names, suffix=f'_{term}', call=lambda i=i, **x: loss.terms(**x)[i])
    out_t, proj_t, target = (z.input(name) for name in names[2:])
    for kept, name in zip(loss.kept(out_t, proj_t, target), ('tf', 'ss')):
        z.compare(f'out_index_{name}', kept.nonzero().squeeze(1).double())
    z.compare('out_similarity_t', similarities(proj_t))

    feat = z.input('feat_head')
    head = SSHead(feat.shape[1])
    roles = {f'head{i + 1}_{x[0]}': f'{2 * i}.{x}' for i in range(2) for x in ('weight', 'bias')}
    learnt = parameters(z, head, roles)
    yield Case(lambda feat_head: head_loss(head(feat_head)), {'feat_head': feat}, 'loss_head', learnt)
    z.compare('out_head', head(feat))
    check_what_is_kept()
    check_images_without_a_label(loss, *(z.input(name) for name in names))


def check_what_is_kept():
    """By hand: the wrong rows' ranks are 1, 2, 2, 3, of which int(4 * 0.5) stay, the earlier of a tie."""
    logits = torch.tensor(
        [[9.0, 0, 0, 0], [1, 2, 0, 0], [1, 2, 3, 0], [1, 3, 2, 0], [1, 4, 3, 2], [5, 1, 1, 1]]
    )
    out_t = torch.zeros(8, 4)
    out_t[[1, 2, 3, 5, 6, 7]] = logits
    kept = SSKD(ratio_tf=0.5).kept(out_t, torch.randn(8, 3), torch.tensor([0, 0]))[0]
    assert kept.tolist() == [True, True, True, False, False, True]
    out_t[6, 3] = torch.inf  # must not be cut away
    assert SSKD(ratio_tf=0.0).kept(out_t, torch.randn(8, 3), torch.tensor([0, 0]))[0][4]
    out_t = torch.zeros(8, 4)
    out_t[:, 3] = 1
    nothing = SSKD(ratio_tf=0.0).terms(
        out_t, torch.randn(8, 3), out_t, torch.randn(8, 3), torch.tensor([0, 0])
    )
    assert nothing[2] == 0


def check_images_without_a_label(loss, out_s, proj_s, out_t, proj_t, target):
    """Left out of ce and tf, as if they were not there; kd and ss keep them."""
    every = loss.terms(out_s, proj_s, out_t, proj_t, target)
    some = loss.terms(out_s, proj_s, out_t, proj_t, target.masked_fill(torch.arange(len(target)) == 1, -100))
    rest = [i for i in range(len(target)) if i != 1]
    four = [x.unflatten(0, (-1, 4))[rest].flatten(0, 1) for x in (out_s, proj_s, out_t, proj_t)]
    fewer = loss.terms(*four, target[rest])
    for i in (0, 2):
        torch.testing.assert_close(some[i], fewer[i])
    for i in (1, 3):
        assert torch.equal(some[i], every[i])


def extra(n, dtype, num_classes):
    """What its student hands out: logits and projections of the images and their turns."""
    return [leaf(4 * n, num_classes, dtype=dtype), leaf(4 * n, 7, dtype=dtype)]
