"""What the losses of several teachers, of graphs and of foundation models promise; slow second forms."""

import copy
import itertools
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from kd_losses import sakd, sdb
from kd_losses.aekd import AEKD
from kd_losses.c2kd import ESA, smoothed_ce
from kd_losses.camkd import CAMKD, FeatureAdapters
from kd_losses.deep_geometric_graphs import GraphKD
from kd_losses.ebkd import EBKD
from kd_losses.libs import LIBS, lcs_pairs
from kd_losses.lsp import LSP
from kd_losses.mkd_avg import MultiTeacherKD
from kd_losses.radio import PHIS, RADIO
from kd_losses.sakd import SAKD, SpotPolicy, attention_distance, select_and_scale
from kd_losses.sdb import SDB, SDBStudent
from kd_losses.skds import Holistic
from kd_losses.st import SoftTarget
from kd_losses.tdd import TDD, merge_classes
from kd_losses.unic import UNIC, TeacherNorm, momentum
from models import build


def rand(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def near(a, b, **kw):
    torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b, dtype=torch.as_tensor(a).dtype), **kw)


# -------------------------------------------------------------------------------------- several teachers


def test_one_teacher_or_equal_teachers_are_soft_targets():
    out, other = rand(5, 7), rand(5, 7, seed=1)
    expected = SoftTarget(T=4.0)(out, other)
    for mode in ('loss', 'prob', 'logit'):
        near(MultiTeacherKD(mode=mode)(out, [other] * 3), expected)
    near(AEKD()(out, [other]), expected)
    near(AEKD()(out, [other] * 3), expected)
    near(EBKD(normalize=True)(out, [other] * 3), expected)
    near(CAMKD()(out, [other] * 3, torch.arange(5)), expected / 3)  # the authors' division


def test_equal_teachers_weigh_the_same():
    grads = rand(4, 5, 7)
    grads[2] = grads[0]
    for C in (0.25, 0.3, 0.6, 1.0):
        w = AEKD.weights(grads, C)
        near(w[2], w[0], rtol=0, atol=1e-3)
        near(w.sum(), 1.0)
    near(AEKD.weights(grads[:1].expand(3, -1, -1), 1.0), torch.full((3,), 1 / 3), rtol=0, atol=1e-3)
    near(AEKD.weights(torch.zeros(3, 5, 7), 0.6, norm=True), torch.full((3,), 1 / 3), rtol=0, atol=1e-6)
    near(AEKD.weights(grads, 0.01), torch.full((4,), 0.25), rtol=0, atol=1e-9)  # plain average


@pytest.mark.parametrize('C', [0.35, 0.6, 1.0])
def test_the_common_gradient_is_the_shortest(C):
    """No mixture of a fine grid within the bounds is shorter."""
    grads = rand(3, 5, 7, seed=2) + torch.tensor([2.0, 0, -0.5])[:, None, None]
    w, v = AEKD.weights(grads, C), grads.mean(dim=1)
    assert w.min() >= 0 and w.max() <= C + 1e-9
    best = min(
        (torch.tensor([a, b, 100 - a - b]).double() / 100 @ v).norm()
        for a, b in itertools.product(range(101), repeat=2)
        if 0 <= 100 - a - b and max(a, b, 100 - a - b) <= 100 * C + 1e-9
    )
    assert (w @ v).norm() <= best + 1e-9


def test_whoever_knows_weighs_more():
    target = torch.arange(5)
    right, wrong = 5 * F.one_hot(target, 7).double(), 5 * F.one_hot(target + 1, 7).double()
    unsure = torch.zeros(5, 7, dtype=torch.float64)
    w = CAMKD.weights(torch.stack([right, wrong, unsure]), target)
    near(w.sum(dim=0), torch.ones(5))
    assert (w[0] > w[2]).all() and (w[2] > w[1]).all()
    w = EBKD.weights(torch.stack([right, wrong, unsure]))
    near(w.sum(dim=0), torch.full((5,), 2.0))
    near(w[0], w[1])
    assert (w[0] > w[2]).all()
    near(EBKD.weights(1e4 * torch.stack([right, wrong])), torch.full((2, 5), 0.5))  # no entropy at all


def test_adapters_make_every_size():
    adapters = FeatureAdapters(3, [4, 5, 6])
    maps = adapters(torch.randn(2, 3, 8, 8), [(4, 4), (8, 8), (16, 12)])
    assert [tuple(x.shape) for x in maps] == [(2, 4, 4, 4), (2, 5, 8, 8), (2, 6, 16, 12)]
    with pytest.raises(ValueError, match='sizes must hold 3 pairs, got 1: one per teacher'):
        adapters(torch.randn(2, 3, 8, 8), [(4, 4)])


def test_too_many_teachers_are_named():
    with pytest.raises(ValueError, match='outs_t must hold 1 to 6 teachers, got 7'):
        AEKD()(rand(2, 3), [rand(2, 3)] * 7)


# ----------------------------------------------------------------------------------- graphs and structure


def test_a_graph_does_not_see_scale_nor_samples_without_a_label():
    fms_s, fms_t = [rand(6, 4, 3, 3).abs()], [rand(6, 5, 2, 2, seed=1).abs()]
    target = torch.tensor([0, 1, 0, -100, 1, 0])
    some = torch.tensor([0, 1, 2, 4, 5])
    for options in ({}, {'k': 2}, {'edges': 'intra'}, {'power': 2, 'k': 3}):
        loss = GraphKD(**options)
        near(loss([3 * fms_s[0]], fms_t, target), loss(fms_s, fms_t, target))
        near(loss(fms_s, fms_t, target), loss([fms_s[0][some]], [fms_t[0][some]], target[some]))
    near(GraphKD()([fms_s[0][:2]], [fms_t[0][:2]]), 0.0)  # two samples: one graph


def test_lsp_is_a_divergence_per_node():
    feat_s, feat_t = rand(5, 3), rand(5, 4, seed=1)
    edges = torch.tensor([[0, 1, 2, 3, 4, 0, 1], [1, 2, 1, 2, 3, 3, 3]])
    for kernel in ('l1exp', 'rbf'):
        loss, total = LSP(kernel, gamma=0.3, sigma=2.0), 0
        for node in range(5):
            into = edges[0][edges[1] == node]
            if len(into):
                p = []
                for feat in (feat_s, feat_t):
                    gap = feat[into] - feat[node]
                    e = -0.3 * gap.abs().sum(1) if kernel == 'l1exp' else -gap.square().sum(1) / 4
                    p.append(e.exp().log_softmax(dim=0))
                total = total + (p[1].exp() * (p[1] - p[0])).sum()
        near(loss(feat_s, feat_t, edges), total / 5)
    with pytest.raises(ValueError, match=r'edge_index must name nodes 0\.\.4, got 5'):
        LSP()(feat_s, feat_t, torch.tensor([[0], [5]]))


def test_a_discriminator_with_unit_slope_pays_no_penalty():
    x_s, x_t = rand(3, 2, 4, 4), rand(3, 2, 4, 4, seed=1)
    slope = rand(1, 2, 4, 4, seed=2)
    near(Holistic.gradient_penalty(lambda x: (x * slope / slope.norm()).sum(dim=(1, 2, 3)), x_s, x_t), 0.0)
    near(
        Holistic.gradient_penalty(lambda x: 3 * (x * slope / slope.norm()).sum(dim=(1, 2, 3)), x_s, x_t), 4.0
    )


def test_classes_that_a_layer_confuses_are_one_group():
    """Three clusters far apart, two of three classes each that overlap: their nodes are not split."""
    generator = torch.Generator().manual_seed(0)
    target = torch.arange(9).repeat_interleave(30)
    centre = torch.tensor([0, 0, 0, 50, 50, 50, -80, -60, -100.0])[target]
    feats = centre[:, None] + 0.1 * torch.randn(270, 4, generator=generator)
    groups = merge_classes(feats, target, k=20, threshold=0.2)
    assert sorted(sum(groups, [])) == list(range(9))
    assert all([c] in groups for c in (6, 7, 8))
    assert merge_classes(feats, target, threshold=1.1) == [list(range(9))]  # no node is good enough
    everything = merge_classes(feats, target, threshold=0.0)
    assert everything == [[c] for c in range(9)]


def test_a_level_with_one_group_says_nothing():
    loss = TDD([[0, 0, 0], [0, 1, 2]], [4, 4]).double()
    fms = [rand(5, 4, 2, 2).requires_grad_() for _ in range(2)]
    levels = loss.levels(fms, torch.tensor([0, 1, 2, 0, 1]))
    near(levels[0], 0.0)
    levels[0].backward()
    assert not fms[0].grad.any()


# -------------------------------------------------------------------------------- policies, boxes, sequences


def test_spots_of_a_batch_are_those_of_its_chosen_samples():
    fms_s, fms_t, out_s, out_t = (
        [rand(6, 4, 3, 3)],
        [rand(6, 5, 3, 3, seed=1)],
        rand(6, 7),
        rand(6, 7, seed=2),
    )
    mask = torch.tensor([[1, 0], [1, 1], [0, 1], [0, 0], [1, 0], [0, 0.0]])
    loss = SAKD(3, 3, [4], [5], beta=10.0)
    spots = select_and_scale(lambda x, y: attention_distance(x, y).mean(), mask[:, 0], fms_s[0], fms_t[0])
    soft = select_and_scale(SoftTarget(T=4.0), mask[:, 1], out_s, out_t)
    near(loss(fms_s, out_s, fms_t, out_t, mask), 10 * spots + soft)
    near(loss(fms_s, out_s, fms_t, out_t, 0 * mask), 0.0)
    near(select_and_scale(SoftTarget(T=4.0), 0 * mask[:, 1], out_s, out_t), 0.0)


def test_a_policy_of_one_family_begins_with_distilling():
    feat = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    for homo, share in ((True, (0.8, 1)), (False, (0.3, 0.7))):
        policy = SpotPolicy(8, 8, 4, homo)
        chosen = policy(feat, feat, generator=torch.Generator().manual_seed(1)).detach().mean()
        assert share[0] <= chosen <= share[1]


def test_the_adapters_of_a_policy_learn_and_the_student_does_not_learn_from_it():
    """One backward pass: the policy's part reaches no weight of the student."""
    net_s, net_t = build('resnet8', 10).train(), build('resnet8', 10).eval().requires_grad_(False)
    img, target = torch.randn(4, 3, 16, 16), torch.arange(4)
    s, t = net_s(img, True), net_t(img, True)
    kd = sakd.build(SAKD, SimpleNamespace(s=s, t=t, net_s=net_s, net_t=net_t), alpha=0.0, beta=0.0)
    generator = torch.Generator().manual_seed(0)
    batch = SimpleNamespace(net_s=net_s, net_t=net_t, target=target, generator=generator)
    before = {name: b.clone() for name, b in net_s.named_buffers()}
    sakd.feed(kd, s, t, batch).backward()
    assert all(p.grad is None or not p.grad.any() for p in net_s.parameters()) and net_s.training
    assert all(torch.equal(b, before[name]) for name, b in net_s.named_buffers())
    assert all(p.grad is not None for p in kd.parameters())
    assert any(p.grad.any() for p in kd.hints.parameters()) and kd.policy.linear.weight.grad.any()


def test_the_key_of_a_box_is_its_number():
    images = torch.zeros(4, 3, 5, 7)
    data = SimpleNamespace(
        mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.3), test_batches=lambda n: iter([(images,)])
    )
    probe = SimpleNamespace(train_set=data)
    keys = [sdb.build_student(SDBStudent, probe, key=number).key for number in (7, 7, 8)]
    assert torch.equal(keys[0], keys[1]) and not torch.equal(keys[0], keys[2])
    pixels = keys[0] * torch.tensor([0.2, 0.2, 0.3])[:, None, None]
    pixels = (pixels + torch.tensor([0.5, 0.4, 0.3])[:, None, None]) * 255
    near(pixels.round(), pixels, rtol=0, atol=1e-3)
    assert pixels.min() >= -0.01 and pixels.max() < 254.5 and keys[0].shape == (3, 5, 7)


def test_a_box_sees_both_kinds_of_images_in_one_pass():
    """Or its running statistics, which it is used with, are those of neither."""
    torch.manual_seed(0)
    net, key, img = build('resnet8', 5), torch.randn(3, 16, 16), torch.randn(4, 3, 16, 16)
    alone, box = copy.deepcopy(net), sdb.student(net, SimpleNamespace(key=key), None)
    f = box(img, True)
    both = alone(torch.cat([img, 0.9 * img + 0.1 * key]), True)
    assert torch.equal(f.out, both.out[:4]) and torch.equal(f.extra, both.out[4:])
    assert torch.equal(f.fms[-1], both.fms[-1][:4]) and len(f.feat) == 4
    assert all(torch.equal(a, b) for a, b in zip(net.buffers(), alone.buffers()))
    assert box.deployed() is net and torch.equal(box.eval()(img), alone.eval()(img))


def test_a_bounded_disturbance():
    out = [rand(5, 7, seed=k) for k in range(4)]
    target = torch.arange(5)
    ce, disturb, keep, random = SDB().terms(*out, target)
    near(SDB(max_disturb=0.01)(*out, target), ce - 0.01 + keep - 0.01 * random)
    assert disturb > 0.01


def test_common_subsequences():
    assert len(lcs_pairs('kitten', 'sitting')) == 4 and lcs_pairs('', 'a') == []
    for i, j in [*lcs_pairs('kitten', 'sitting')]:
        assert 'sitting'[i] == 'kitten'[j]
    assert lcs_pairs('abc', 'abc') == [(0, 0), (1, 1), (2, 2)]


def test_libs_of_equal_networks_is_zero_and_padding_says_nothing():
    loss = LIBS(4, 4).double()
    with torch.no_grad():
        for layer in (loss.t_seq, loss.t_ctx, loss.t_frm):
            layer.weight.copy_(torch.eye(4))
            layer.bias.zero_()
    seq, ctx, frm = rand(2, 4), rand(2, 3, 4), 50 * torch.eye(4, dtype=torch.float64).expand(2, 4, 4)
    pairs = [[(0, 0), (2, 2)], [(1, 1)]]
    for term in loss.terms(seq, seq, ctx, ctx, frm, frm, pairs):
        near(term, 0.0)
    loss = LIBS(4, 5).double()
    frm_s, frm_t = rand(2, 6, 4), rand(2, 7, 5, seed=1)
    mask_s, mask_t = torch.arange(6) < torch.tensor([[4], [6]]), torch.arange(7) < torch.tensor([[7], [3]])
    seq_t, ctx_t = rand(2, 5), rand(2, 3, 5)
    value = loss(seq, seq_t, ctx, ctx_t, frm_s, frm_t, pairs, mask_s, mask_t)
    other_s = torch.where(mask_s[:, :, None], frm_s, 9.0)
    other_t = torch.where(mask_t[:, :, None], frm_t, -9.0)
    near(loss(seq, seq_t, ctx, ctx_t, other_s, other_t, pairs, mask_s, mask_t), value)
    # slowly: frame by frame, pair by pair
    _, context, frame = loss.terms(seq, seq_t, ctx, ctx_t, frm_s, frm_t, pairs, mask_s, mask_t)
    total = []
    for n, (J, length) in enumerate(((4, 7), (6, 3))):
        q, known = loss.t_frm(frm_s[n, :J]), frm_t[n, :length]
        total.append((q - (q @ known.T).softmax(dim=1) @ known).square().sum(dim=1).mean())
    near(frame, sum(total) / 2)
    gaps = [ctx_t[n, i] - loss.t_ctx(ctx[n, j]) for n, found in enumerate(pairs) for j, i in found]
    near(context, sum(gap.square().sum() for gap in gaps) / 3)
    near(loss.terms(seq, seq_t, ctx, ctx_t, frm_s, frm_t, [[], []])[1], 0.0)


def test_attention_beyond_the_lengths_says_nothing():
    enc_s, enc_t, cross_s, cross_t = rand(2, 2, 4, 4), rand(2, 2, 6, 6), rand(2, 2, 3, 4), rand(2, 2, 3, 6)
    lengths = torch.tensor([2, 4]), torch.tensor([6, 3]), torch.tensor([3, 2])
    value = ESA()(enc_s, cross_s, enc_t, cross_t, *lengths)
    near(ESA(gamma=2.0)(enc_s, cross_s, enc_t, cross_t, *lengths, err=0.5), value / math.e)
    logits, gold = rand(2, 3, 5), torch.tensor([[0, 4, -1], [2, -1, -1]])
    near(
        smoothed_ce(logits, gold, 0.0), F.cross_entropy(logits.flatten(0, 1), gold.flatten(), ignore_index=-1)
    )
    near(smoothed_ce(logits, torch.full_like(gold, -1)), 0.0)


# ------------------------------------------------------------------------------------- foundation models


@pytest.mark.parametrize('n', [1, 2, 4, 12, 20, 28, 36, 48, 52, 64, 7])
def test_hadamard(n):
    H = PHIS.hadamard(n)
    near(H @ H.T, torch.eye(n), rtol=0, atol=1e-12)
    if n not in (52, 7):  # a random rotation there
        near(H.abs() * math.sqrt(n), torch.ones(n, n))


def test_phis_makes_every_channel_alike_and_keeps_distances():
    fm = rand(40, 4, 3, 2) * torch.tensor([10.0, 1, 0.1, 0])[:, None, None] + 5
    phis = PHIS(4).double()
    for part in fm.split((7, 30, 3)):
        phis.update(part)
    with pytest.raises(ValueError, match='update with some batches'):
        phis(fm)
    phis.fit()
    rows = phis(fm).movedim(1, -1).flatten(0, -2)
    near(rows.mean(dim=0), torch.zeros(4), rtol=0, atol=1e-9)
    near(rows.var(dim=0), torch.ones(4))
    near(phis.inverse(phis(fm)), fm)
    other = copy.deepcopy(PHIS(4).double())
    other.load_state_dict(phis.state_dict())
    near(other(fm), phis(fm))
    fitted = phis(fm)
    phis.update(fm + 3)
    near(phis(fm), fitted)  # what was fitted stays until the next fit
    phis.forget()
    near(phis(fm), fitted)
    near(phis.inverse(fitted), fm)
    with pytest.raises(ValueError, match='two positions'):
        PHIS(4).fit()


def test_a_teacher_may_lack_a_summary():
    loss = RADIO(4, 4, [6, None], [None, 8], hidden=8)
    feats, fms = [torch.randn(5, 6), None], [None, torch.randn(5, 8, 4, 4)]
    loss.calibrate(fms)
    loss.fit()
    summaries, features = loss.terms(torch.randn(5, 4), torch.randn(5, 4, 6, 6), feats, fms)
    assert [x is None for x in summaries] == [False, True] and [x is None for x in features] == [True, False]
    with pytest.raises(ValueError, match='leave the teacher out'):
        loss(torch.randn(5, 4), torch.randn(5, 4, 6, 6), [None, None], fms)


def test_the_statistics_of_a_teacher_follow_it():
    norm, x = TeacherNorm(3).double(), 4 * rand(50, 3) + 7
    near(norm(x, momentum=1.0), x / (1 + 1e-6))  # the first batch as it is
    near(norm(x, momentum=0.0).std(dim=0), torch.ones(3), rtol=1e-4, atol=0)
    kept = norm.mean.clone()
    norm(x[:1], 1.0)  # one value has no deviation
    norm(torch.full_like(x, torch.nan), 1.0)
    norm.eval()(2 * x, 1.0)
    assert torch.equal(norm.mean, kept)
    assert momentum(0, 10) == 1.0 and momentum(10, 10) == pytest.approx(0.001)


def test_the_worst_teacher_of_an_image_is_never_dropped():
    loss, each = UNIC([4], [3, 3, 3], 4, 4, drop=1.0), torch.tensor([[1.0, 5, 2], [3, 4, 2], [2, 1, 1]])
    keep = loss.select(each, torch.Generator().manual_seed(0))
    assert keep.tolist() == [[0, 1, 1], [1, 0, 0], [0, 0, 0]]
    assert loss.eval().select(each).min() == 1
    loss.train().drop = 0.5
    drawn = torch.stack([loss.select(each, torch.Generator().manual_seed(k)) for k in range(200)]).mean(dim=0)
    assert drawn[1, 0] == 1 and 0.4 < drawn[0, 0] < 0.6


def test_a_teacher_of_camkd_that_excludes_the_right_class_weighs_nothing():
    outs = torch.randn(3, 2, 5)
    outs[1, 0, 4] = -torch.inf
    w = CAMKD.weights(outs, torch.tensor([4, 0]))
    assert w[1, 0] == 0 and torch.isfinite(w).all()
    near(w.sum(0), torch.ones(2))


def test_libs_where_the_teacher_has_no_frame():
    torch.manual_seed(0)
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[1] = False
    seq, frm_s = torch.randn(2, 4), torch.randn(2, 3, 4, requires_grad=True)
    args = (seq, torch.randn(2, 5), torch.randn(2, 3, 4), torch.randn(2, 4, 5), frm_s, torch.randn(2, 6, 5))
    frame = LIBS(4, 5).terms(*args, [[], []], None, mask)[2]
    frame.backward()
    assert torch.isfinite(frame) and frm_s.grad[0].norm() > 0 and frm_s.grad[1].norm() == 0
