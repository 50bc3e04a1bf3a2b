"""What the losses of dense predictions promise beyond the common contract (test_ka_contract.py has that one).

Pictures without boxes or labels, marks of unlabelled pixels, odd sizes, and slow second forms.
"""

import pytest
import torch
import torch.nn.functional as F
from torchvision.ops import box_iou, generalized_box_iou

from kd_losses.afdcd import AfDCD
from kd_losses.cirkd import CIRKD
from kd_losses.crosskd import CrossKD, align, decode, giou
from kd_losses.cwd import CWD
from kd_losses.dsd import DSD
from kd_losses.fgd import FGD, masks
from kd_losses.fgfi import FGFI, imitation_mask
from kd_losses.freekd import FreeKD, haar, inverse
from kd_losses.ifvd import IFVD
from kd_losses.ld import LD, main_region, valuable_region
from kd_losses.maskd import MasKD
from kd_losses.pkd import PKD
from kd_losses.skds import Holistic, PairWise

NONE = torch.zeros(0, 4)


def rand(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def some_boxes(n, size=64.0, seed=0):
    corner = torch.rand(n, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * size
    return torch.cat(
        [torch.minimum(corner[:, :2], corner[:, 2:]), torch.maximum(corner[:, :2], corner[:, 2:])], 1
    )


def near(a, b, **kw):
    torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b, dtype=torch.as_tensor(a).dtype), **kw)


def healthy(value, *learnt):
    value.backward()
    assert torch.isfinite(value) and all(torch.isfinite(x.grad).all() for x in learnt)
    return value


# ----------------------------------------------------------------------------- labels that pixels do not have

LABELLED = {
    'ifvd': lambda ignore: IFVD(3, ignore),
    'cirkd': lambda ignore: CIRKD(4, 5, 3, pixel_memory=6, region_memory=6, ignore=ignore),
}


def labelled(name, ignore=-1):
    torch.default_generator.manual_seed(0)
    target = torch.arange(2 * 48).reshape(2, 6, 8) % 4 % 3
    return (
        LABELLED[name](ignore).double(),
        rand(2, 4, 3, 4).requires_grad_(),
        rand(2, 5, 3, 4, seed=1),
        target,
    )


@pytest.mark.parametrize('name', LABELLED)
def test_marks_of_unlabelled_pixels_are_equal(name):
    seen = []
    for ignore, mark in ((-1, -1), (-1, -100), (255, 255), (255, -100)):
        loss, fm_s, fm_t, target = labelled(name, ignore)
        target[:, :2] = mark
        target[1, 4, 4] = mark
        seen.append(loss(fm_s, fm_t, target, **({'generator': torch.Generator()} if name == 'cirkd' else {})))
    assert all(torch.equal(x, seen[0]) for x in seen)
    loss, fm_s, fm_t, target = labelled(name)
    assert not torch.equal(loss(fm_s, fm_t, target), seen[0])


@pytest.mark.parametrize('name', LABELLED)
def test_other_labels_are_refused(name):
    for bad in (3, -2, 255):
        loss, fm_s, fm_t, target = labelled(name)
        target[1, 5, 7] = bad  # also where nearest neighbour does not look
        with pytest.raises(ValueError, match=f'target must be in 0..2, or -1 or -100 .* got {bad}'):
            loss(fm_s, fm_t, target)
    with pytest.raises(ValueError, match='must be of integers, got torch.float64: target.long'):
        loss(fm_s, fm_t, target.double())
    for wrong in (target[:, None], target[:1], target.flatten()):
        with pytest.raises(ValueError, match='target must be .* got .*: '):
            loss(fm_s, fm_t, wrong)


@pytest.mark.parametrize('name', LABELLED)
def test_no_label_at_all(name):
    loss, fm_s, fm_t, target = labelled(name)
    target[:] = -1
    if name == 'ifvd':
        assert healthy(loss(fm_s, fm_t, target), fm_s) == 0
    else:
        value = healthy(loss(fm_s, fm_t, target), fm_s)
        near(value, loss.batch_loss(fm_s, fm_t))
        assert not loss.pixel_ptr.any() and not loss.region_ptr.any()


def test_unlabelled_pixels_do_not_move_centres_but_count_in_the_mean():
    loss, fm_s, fm_t, target = labelled('ifvd')
    target[:, :2] = -1  # the first row of the map
    value = loss(fm_s, fm_t, target)
    with torch.no_grad():
        fm_s[:, :, 0] += 5
    near(loss(fm_s, fm_t, target), value)
    near(loss(fm_s[:, :, 1:], fm_t[:, :, 1:], target[:, 2:]) * 2 / 3, value)


def test_labels_are_brought_to_the_map_by_nearest_neighbour():
    """Odd sizes: the integer rule, as F.interpolate has it where it does not round."""
    fm_s, fm_t = rand(1, 4, 3, 5), rand(1, 5, 3, 5, seed=1)
    target = torch.arange(7 * 11).reshape(1, 7, 11) % 3
    small = target[:, [0, 2, 4]][:, :, [0, 2, 4, 6, 8]]
    near(IFVD(3)(fm_s, fm_t, target), IFVD(3)(fm_s, fm_t, small))


def test_a_vector_of_zeros_has_no_gradient():
    loss, fm_s, fm_t, target = labelled('ifvd')
    with torch.no_grad():
        fm_s[:, :, 0] = 0
    healthy(loss(fm_s, fm_t, target), fm_s)
    assert fm_s.grad.abs().max() < 100


# ---------------------------------------------------------------------------------------------------- cirkd


def test_cirkd_batch_term_in_its_slow_form():
    loss, fm_s, fm_t, _ = labelled('cirkd')
    s, t = (F.normalize(x.flatten(2), dim=1) for x in (fm_s, fm_t))
    terms = []
    for i in range(2):
        for j in range(2):
            p, q = ((x[i].T @ x[j] / 0.1).softmax(dim=1) for x in (t, s))
            terms.append((p * (p / q).log()).sum(dim=1).mean())
    near(loss.batch_loss(fm_s, fm_t), sum(terms) / 4)


def test_cirkd_queues_hold_pixels_of_their_class_and_wrap():
    torch.default_generator.manual_seed(0)
    loss = CIRKD(4, 3, 3, pixel_memory=5, region_memory=2, update=3)
    start = loss.pixel_queue.clone()
    target = torch.tensor([[[2, 2, 2, 2], [0, 0, 0, 0]]])
    for step in range(4):
        fm_t = torch.zeros(1, 3, 2, 4)
        fm_t[:, 2, 0] = 1.0 + step  # class 2 looks along the last axis, class 0 along the first
        fm_t[:, 0, 1] = 1.0 + step
        loss.enqueue(fm_t, target, torch.Generator().manual_seed(step))
    assert torch.equal(loss.pixel_queue[2], torch.tensor([0.0, 0, 1]).expand(5, 3))
    assert torch.equal(loss.pixel_queue[0], torch.tensor([1.0, 0, 0]).expand(5, 3))
    assert torch.equal(loss.pixel_queue[1], start[1])
    assert loss.pixel_ptr.tolist() == [0, 0, 0] and loss.region_ptr.tolist() == [0, 0, 0]
    assert torch.equal(loss.region_queue[2], torch.tensor([0.0, 0, 1]).expand(2, 3))


def test_cirkd_draws_from_the_generator_and_evaluation_leaves_the_queues():
    def run(seed, train=True):
        _, fm_s, fm_t, target = labelled('cirkd')
        torch.default_generator.manual_seed(0)
        loss = (
            CIRKD(4, 5, 3, pixel_memory=40, region_memory=6, pixel_contrast=9, update=2).double().train(train)
        )
        before = loss.pixel_queue.clone()
        value = loss(fm_s, fm_t, target, torch.Generator().manual_seed(seed))
        return value, torch.equal(before, loss.pixel_queue)

    assert torch.equal(run(0)[0], run(0)[0]) and not torch.equal(run(0)[0], run(1)[0])
    assert run(0)[1] is False and run(0, train=False)[1] is True


# ----------------------------------------------------------------------------------------------------- boxes


def test_no_boxes_at_all():
    fm_s, fm_t = rand(2, 4, 5, 7).requires_grad_(), rand(2, 6, 5, 7, seed=1)
    fg, bg, mask, relation = FGD(4, 6).double().terms(fm_s, fm_t, [NONE, NONE], (40, 56))
    assert fg == 0
    healthy(fg + bg + mask + relation, fm_s)
    near(masks([NONE, NONE], (40, 56), (5, 7))[1], torch.full((2, 5, 7), 1 / 35))
    assert not imitation_mask(torch.zeros(3, 2, 1, 4), NONE).any()
    fm_s.grad = None
    loss = FGFI(4, 6).double()
    assert healthy(loss(fm_s, fm_t, torch.zeros(2, 5, 7, dtype=torch.bool)), fm_s) == 0
    anchors = some_boxes(12)
    assert main_region(anchors, [8, 4], NONE.double()).tolist() == [0] * 12
    assert valuable_region(anchors, [8, 4], NONE.double()).tolist() == [0.0] * 12


def test_boxes_that_no_anchor_meets_are_not_imitated():
    anchors = some_boxes(6).view(3, 2, 1, 4)
    assert not imitation_mask(anchors, torch.tensor([[500.0, 500, 510, 510]]), pixel=0.0).any()


def test_imitation_mask_in_its_slow_form():
    anchors, boxes = some_boxes(3 * 4 * 2).view(3, 4, 2, 4), some_boxes(3, seed=1)
    mask = torch.zeros(3, 4, dtype=torch.bool)
    for box in boxes:
        overlap = box_iou(anchors.view(-1, 4), box[None]).view(3, 4, 2)
        mask |= (overlap > 0.5 * overlap.max()).any(dim=2)
    assert torch.equal(imitation_mask(anchors, boxes, pixel=0.0), mask) and 0 < mask.sum() < 12


def test_fgd_masks_in_their_slow_form():
    """Painted cell by cell; boxes over the border, outside and without area among them."""
    boxes = some_boxes(5, 80.0) - 10
    strange = [
        [-30.0, 5, -2, 9],
        [5, 5, 5, 9],
        [9, 9, 5, 5],
        [70, 5, 90, 9],
        [-9, -9, 3, 3],
        [40, 20, 99, 99],
    ]
    boxes = torch.cat([boxes, torch.tensor(strange)])
    fg, bg = masks([boxes, NONE], [(48, 64), (40, 30)], (5, 7))
    slow = torch.zeros(5, 7, dtype=torch.float64)
    for x1, y1, x2, y2 in boxes.tolist():
        if x2 <= x1 or y2 <= y1 or x2 <= 0 or y2 <= 0 or x1 >= 64 or y1 >= 48:
            continue
        left, top = x1 / 64 * 7 // 1, y1 / 48 * 5 // 1
        right, bottom = -(-x2 / 64 * 7 // 1), -(-y2 / 48 * 5 // 1)
        for r in range(5):
            for c in range(7):
                if left <= c <= right and top <= r <= bottom:
                    slow[r, c] = max(slow[r, c], 1 / (right + 1 - left) / (bottom + 1 - top))
    near(fg[0], slow)
    near(bg[0], (slow == 0) / max((slow == 0).sum(), 1))
    assert not fg[1].any() and (slow == 0).any()
    assert not masks([torch.tensor([[0.0, 0, 64, 48]])], (48, 64), (5, 7))[1].any()  # nothing is outside


def test_fgd_says_what_boxes_must_be():
    loss, fm_s, fm_t = FGD(4, 6).double(), rand(2, 4, 5, 7), rand(2, 6, 5, 7)
    for boxes, size in (([NONE], (9, 9)), ([NONE, torch.ones(4)], (9, 9)), ([NONE, torch.ones(2, 5)], (9, 9)),
                        ([NONE, NONE], (9, 9, 9)), ([NONE, NONE], [(9, 9)] * 3)):  # fmt: skip
        with pytest.raises(ValueError, match='FGD: (boxes|image_size).* must be .* got .*: '):
            loss(fm_s, fm_t, boxes, size)
    pair = loss(fm_s, fm_t, [some_boxes(2), NONE], (64, 48))
    near(pair, loss(fm_s, fm_t, [some_boxes(2), NONE], torch.tensor([[64, 48], [64, 48]])))


def test_regions_with_few_anchors():
    anchors, boxes = some_boxes(3), some_boxes(2, seed=1)
    for levels in ([3], [1, 2], [2, 1]):
        assert main_region(anchors, levels, boxes).shape == (3,)
        assert torch.isfinite(valuable_region(anchors, levels, boxes)).all()
    one = torch.tensor([[0.0, 0, 10, 10]])
    assert main_region(one, [1], one + 0.1).tolist() == [1]  # a deviation of one value is 0
    for bad in (lambda: main_region(anchors, [2], boxes), lambda: main_region(anchors[:, :2], [3], boxes),
                lambda: valuable_region(anchors, [3], boxes[0])):  # fmt: skip
        with pytest.raises(ValueError, match='LD: .* must .* got .*: '):
            bad()


def test_main_region_takes_the_best_box_and_the_first_of_equals():
    anchors = torch.tensor([[0.0, 0, 10, 10], [30, 30, 40, 40], [60, 60, 70, 70]])
    box = torch.tensor([0.0, 0, 10, 10])
    assert main_region(anchors, [3], torch.stack([box + 2, box, box]), topk=1).tolist() == [2, 0, 0]


def test_no_rows_are_nothing_with_a_graph():
    x, y = torch.zeros(0, 5, requires_grad=True), torch.zeros(0, 5)
    assert healthy(LD()(x, y), x) == 0
    assert healthy(LD()(x, y, torch.zeros(0), avg_factor=0.0), x) == 0
    reg = torch.zeros(0, 4, requires_grad=True)
    assert healthy(CrossKD()(x, y, reg, NONE, torch.zeros(0), 0, NONE), x, reg) == 0
    assert healthy(CrossKD()(x, y, x, y, torch.zeros(0), 0), x) == 0
    with pytest.raises(ValueError, match='LD: out_t must be'):
        LD()(x, torch.zeros(3, 5))
    with pytest.raises(ValueError, match='CrossKD: label_weight must be'):
        CrossKD()(x, y, reg, NONE, torch.zeros(2), 0, NONE)


# --------------------------------------------------------------------------------------------------- crosskd


def test_crosskd_leaves_ignored_anchors_out_and_never_divides_by_zero():
    args = [rand(6, 3), rand(6, 3, seed=1), rand(6, 4, seed=2), rand(6, 4, seed=3)]
    weight, anchors = torch.tensor([1.0, 0, 1, 1, 0, 1]), some_boxes(6)
    rest = weight != 0
    some = CrossKD()(*(x[rest] for x in args), weight[rest], 3, anchors[rest])
    near(CrossKD()(*args, weight, 3, anchors), some)
    near(CrossKD()(*args, weight, torch.tensor(0), anchors), 3 * some, rtol=1e-6, atol=0)
    assert CrossKD()(*args, 0 * weight, 3, anchors) == 0
    edges = rand(24, 5).requires_grad_()
    assert healthy(CrossKD()(*args[:2], edges, rand(24, 5, seed=1), 0 * weight, 3), edges) == 0
    masked = args[1].clone()
    masked[0, 1] = -torch.inf  # a class that the teacher excludes
    assert torch.isfinite(CrossKD()(args[0], masked, *args[2:], weight, 3, anchors))


def test_boxes_and_their_overlap():
    a, b = some_boxes(20), some_boxes(20, seed=1)
    near(giou(a, b), generalized_box_iou(a, b).diagonal())
    near(decode(a, torch.zeros_like(a)), a)
    wide = decode(torch.tensor([[0.0, 0, 8, 8]]), torch.tensor([[0.5, 0, 99.0, -99.0]]))
    near(wide, [[8 - 250, 4 - 0.064, 8 + 250, 4 + 0.064]])


def test_aligned_maps_have_the_moments_of_the_teachers():
    fm_s, fm_t = rand(3, 4, 5, 7).requires_grad_(), rand(3, 4, 5, 7, seed=1) * 3 + 2
    aligned = align(fm_s, fm_t)
    near(aligned.mean(dim=(0, 2, 3)), fm_t.mean(dim=(0, 2, 3)))
    near(aligned.std(dim=(0, 2, 3)), fm_t.std(dim=(0, 2, 3)), rtol=1e-5, atol=0)
    flat = torch.ones(2, 4, 3, 3, requires_grad=True)
    (align(flat, rand(2, 4, 3, 3)) * rand(2, 4, 3, 3, seed=1)).sum().backward()
    assert torch.isfinite(flat.grad).all()
    with pytest.raises(ValueError, match='two values per channel, got'):
        align(torch.ones(1, 4, 1, 1), torch.ones(1, 4, 1, 1))


# ------------------------------------------------------------------------------------------------------ maps


def test_cwd_of_wide_channels_and_single_positions():
    fm = torch.zeros(1, 2, 3, 3)
    fm[0, 0, 0, 0] = 1e4
    x = fm.clone().requires_grad_()
    assert healthy(CWD(tau=1.0)(x, fm), x) == 0
    masked = fm.clone()
    masked[0, 1, 1] = -torch.inf
    assert torch.isfinite(CWD()(x, masked))
    assert healthy(CWD()(rand(2, 3, 1, 1).requires_grad_(), rand(2, 3, 1, 1, seed=1))) == 0
    for options in ({'tau': 0}, {'s_channels': 3}, {'t_channels': 3}):
        with pytest.raises(ValueError, match='CWD: .* got'):
            CWD(**options)


def test_pkd_is_the_correlation():
    x, y = rand(2, 3, 5, 7), rand(2, 3, 5, 7, seed=1)
    rows = [z.movedim(1, 0).flatten(1) for z in (x, y)]
    r = torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(*rows)])
    near(PKD()(x, y), (1 - r).mean() * 69 / 70, rtol=1e-5, atol=0)
    near(PKD()(3 * x + 2, y), PKD()(x, y), rtol=1e-5, atol=0)
    near(PKD()([x, y], [y, 2 * x]), 2 * PKD()(x, y), rtol=1e-5, atol=0)


def test_pkd_resizes_where_only_the_widths_differ_and_says_what_is_wrong():
    x, y = rand(2, 3, 4, 5), rand(2, 3, 4, 7, seed=1)
    for student in (True, False):
        a, b = (
            (F.interpolate(x, (4, 7), mode='bilinear'), y)
            if student
            else (x, F.interpolate(y, (4, 5), mode='bilinear'))
        )
        near(PKD(student)(x, y), PKD()(a, b))
    for bad in (([x], [y, y]), ([], []), (x[0], y), (x, y[:, :2]), (x[:1, :, :1, :1], y[:1, :, :1, :1])):
        with pytest.raises(ValueError, match=r'PKD: fms_.* must .* got .*: '):
            PKD()(*bad)


def test_a_constant_channel_has_no_gradient():
    x = rand(2, 3, 4, 5)
    x[:, 1] = 2.0
    x.requires_grad_()
    healthy(PKD()(x, rand(2, 3, 4, 5, seed=1)), x)
    assert not x.grad[:, 1].any() and x.grad[:, 0].any()


def test_dsd_where_layers_attend_alike_or_there_is_one_position():
    x = rand(2, 3, 5, 4).requires_grad_()
    maps = [rand(2, 6, 5, 4, seed=1), rand(2, 3, 5, 4, seed=2)]
    healthy(DSD()([x, x], maps), x)
    assert x.grad.abs().max() < 1e3
    assert DSD().terms([x[..., :1, :1]] * 2, [m[..., :1, :1] for m in maps])[0] == 0
    for bad in (([x], [x]), ([x, x], [x]), ([x, x[:, :2]], maps), ([x, x[..., :2]], maps)):
        with pytest.raises(ValueError, match=r'DSD: fms_.* must .* got .*: '):
            DSD()(*bad)


@pytest.mark.parametrize('size', [(1, 1), (3, 5), (8, 7), (16, 8)])
def test_haar_goes_there_and_back_for_any_size(size):
    fm = rand(2, 3, *size)
    low, highs = haar(fm, 3)
    near(inverse(low, highs)[..., : size[0], : size[1]], fm)
    near(low.square().sum() + sum(h.square().sum() for h in highs), fm.square().sum())
    masked, dice = FreeKD(None, 3).double().learn(fm)
    assert masked.shape == fm.shape and torch.isfinite(dice)


def test_freekd_in_its_slow_form():
    loss, x, y = FreeKD(None, 3, tokens=2, levels=2).double(), rand(2, 3, 5, 6), rand(2, 3, 5, 6, seed=1)
    slow = 0
    for j, (a, b) in enumerate(zip(haar(x, 2)[1], haar(y, 2)[1]), 1):
        m = torch.einsum('tc,nchw->nthw', loss.token[j], b.sum(dim=2)).sigmoid()
        slow += (m[:, :, None, None] * (a - b)[:, None]).abs().mean()
    near(loss(x, y), slow)


def test_a_region_of_zeros_has_no_gradient_of_its_own():
    fm_s = rand(2, 4, 8, 8).requires_grad_()
    with torch.no_grad():
        fm_s[0, :, :4, :4] = 0
    healthy(PairWise()(fm_s, rand(2, 4, 8, 8, seed=1)), fm_s)
    assert fm_s.grad[0, :, :4, :4].abs().max() == 0 and fm_s.grad.abs().max() < 1


def test_both_players_of_the_holistic_loss():
    d_s, d_t = rand(3, 1), rand(3, 1, seed=1)
    game = Holistic()
    assert game.g_loss(d_s) == game(d_s) == -d_s.mean()
    assert game.d_loss(d_s, d_t, 'hinge') == Holistic('hinge').d_loss(d_s, d_t) != game.d_loss(d_s, d_t)
    with pytest.raises(ValueError, match='hinge'):
        game.d_loss(d_s, d_t, 'least squares')


def test_one_mask_overlaps_with_nothing():
    for loss in (MasKD(None, 3, tokens=1), FreeKD(None, 3, tokens=1)):
        assert loss.double().learn(rand(2, 3, 5, 6))[1] == 0


def test_masks_learn_from_the_teacher_alone():
    for loss in (MasKD(4, 3, tokens=2), FreeKD(4, 3, tokens=2)):
        y = rand(2, 3, 5, 6, dtype=torch.float32).requires_grad_()
        masked, dice = loss.learn(y)
        (masked.sum() + dice).backward()
        learnt = {name.split('.')[0] for name, p in loss.named_parameters() if p.grad is not None}
        assert learnt == ({'token', 'prob'} if isinstance(loss, MasKD) else {'token'})
        assert y.grad is None
        loss.zero_grad()
        loss(rand(2, 4, 5, 6, dtype=torch.float32), y).backward()
        assert {name.split('.')[0] for name, p in loss.named_parameters() if p.grad is not None} == {'align'}


# ----------------------------------------------------------------------------------------------------- afdcd


@pytest.mark.parametrize('enhanced', [False, True])
def test_afdcd_in_its_slow_form(enhanced):
    loss = AfDCD(3, 6, T=0.5, groups=3, pool=2, patch=(2, 1), enhanced=enhanced).double()
    fm_s, fm_t, mask = rand(2, 3, 5, 4), rand(2, 6, 5, 4, seed=1), (rand(2, 1, 5, 4, seed=2) > 0).double()
    x, p = loss.align(fm_s) * mask, loss.projector
    if enhanced:
        b1 = F.relu(p.block1[0](x))
        g = (p.out1(b1) + p.out2(F.relu(p.block2[0](b1)))) / 2
    else:
        g = p[2](F.relu(p[0](x)))
    a, b = F.max_pool2d(g, 2), F.max_pool2d(fm_t, 2)  # 2 x 2 positions: a patch is a column of two
    total = 0
    for n in range(2):
        for column in range(2):
            for row in range(2):
                for m in range(3):
                    mine = a[n, 2 * m : 2 * m + 2, row, column]
                    distance = {
                        (r, k): (mine - b[n, 2 * k : 2 * k + 2, r, column]).abs().sum()
                        for r in range(2)
                        for k in range(3)
                    }
                    kept = [d for (r, k), d in distance.items() if k != m or r == row]
                    total += distance[row, m] / 0.5 + torch.stack([-d / 0.5 for d in kept]).logsumexp(dim=0)
    feature, contrast = loss.terms(fm_s, fm_t, mask)
    near(feature, (g - fm_t).square().sum() / 2)
    near(contrast, total / (2 * 2 * 2))


def test_afdcd_masks_and_what_does_not_divide():
    loss = AfDCD(3, 4, groups=1, pool=0, patch=(1, 1)).double()
    fm_s, fm_t = rand(2, 3, 5, 7), rand(2, 4, 5, 7, seed=1)
    assert loss.terms(fm_s, fm_t)[1] == 0  # one group: no other to tell it from
    assert torch.isfinite(loss(fm_s, fm_t, torch.zeros(2, 1, 5, 7)))
    first, again, other = (loss(fm_s, fm_t, generator=torch.Generator().manual_seed(i)) for i in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    for options in ({'pool': 4}, {'pool': 8}, {'pool': 0, 'patch': (5, 2)}):
        with pytest.raises(ValueError, match='AfDCD: fm_s must have a size .* got .*: take a smaller pool'):
            AfDCD(3, 4, groups=2, **options).double()(fm_s, fm_t)


def test_wrong_options_are_named():
    bad = [
        lambda: PKD()([], []),
        lambda: LD(T=0), lambda: CrossKD(beta=0.5), lambda: CrossKD(T=0), lambda: IFVD(0),
        lambda: AfDCD(3, 4, groups=3), lambda: AfDCD(3, 4, groups=2, mask_ratio=1), lambda: AfDCD(3, 4, T=0),
        lambda: CIRKD(3, 4, 0), lambda: CIRKD(3, 4, 2, T=0), lambda: CIRKD(3, 4, 2, update=0),
        lambda: FGD(4, 2), lambda: FGD(4, 4, temp=0), lambda: DSD(tau=0), lambda: MasKD(4, 4, tokens=0),
        lambda: MasKD(4, 4, half=True), lambda: FreeKD(4, 4, levels=0), lambda: FreeKD(4, 4, tokens=0),
        lambda: MasKD(None, 3, weighted=False, half=True)(rand(1, 3, 2, 2), rand(1, 3, 2, 2), customise=True),
    ]  # fmt: skip
    for build in bad:
        with pytest.raises(ValueError, match='got'):
            build()
