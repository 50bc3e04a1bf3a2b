"""Inputs at the edge of what losses are defined for: opposite, equal, masked, alone, of unlike sizes."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from dfkd_losses import cmi, deepinversion, dfq, fastdfkd, mosaickd, zskt
from ka_losses import cfl, customize, fedka, ood_ka
from ka_losses import transformer_ka as tka
from kd_losses import crosskd, dot, fgd, ld, rrd, sla
from kd_losses.at import AT
from kd_losses.c2kd import smoothed_ce
from kd_losses.cc import CC
from kd_losses.ctkd import CTKD
from kd_losses.dcm import DCM
from kd_losses.dkd import DKD
from kd_losses.dot import DOT
from kd_losses.eel import EEL
from kd_losses.fcfd import FCFD
from kd_losses.irg import IRG
from kd_losses.kdcl import KDCL, general_weights
from kd_losses.ld import LD
from kd_losses.lsp import LSP
from kd_losses.mhgd import MHGD
from kd_losses.mlkd import MLKD
from kd_losses.nkd import NKD
from kd_losses.norm import NORM
from kd_losses.nst import NST
from kd_losses.pkt import PKT
from kd_losses.reviewkd import ReviewKD
from kd_losses.rrd import RRD
from kd_losses.sakd import SAKD, attention_distance, select_and_scale
from kd_losses.scalekd import ScaleKD
from kd_losses.sdd import SDD, local_logits
from kd_losses.semckd import _error
from kd_losses.simkd import SimKD
from kd_losses.sla import SLA
from kd_losses.srrl import SRRL
from kd_losses.tfkd import TfKDReg, TfKDSelf
from kd_losses.wkd import WKDLogit

INF, NAN = float('inf'), float('nan')
WIDE = SimpleNamespace(feat=torch.zeros(2, 4))
PROBE = SimpleNamespace(s=WIDE, t=WIDE, batch_size=8, delta=0.075)  # of a build


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def finite(loss, *inputs):
    """The value of loss(*inputs), of which value and gradient of the first are finite."""
    x = inputs[0].clone().requires_grad_()
    value = loss(x, *inputs[1:])
    value.backward()
    assert value.isfinite() and x.grad.isfinite().all(), value
    return value.detach()


@pytest.mark.parametrize('student', [(4, 8), (8, 2)])
def test_maps_that_are_not_square_are_averaged_never_repeated(student):
    """Each side of the two maps at the smaller of its two lengths."""
    fm_s, fm_t = draw(2, 3, *student), draw(2, 5, 4, 4)
    size = (4, min(student[1], 4))
    kd = SimKD(3, 5).train()
    assert kd.project(fm_s, (4, 4)).shape[2:] == size
    seen, regressor = [], nn.Conv2d(3, 5, 1)
    regressor.register_forward_hook(lambda *x: seen.append(x[2].shape[2:]))
    _error(fm_s, fm_t, regressor)
    assert seen == [size]


def test_pkt_of_opposite_embeddings():
    """Their probability is 0, and a rounding below it has no logarithm."""
    for seed in range(100):
        feat_s, feat_t = draw(2, 16, seed=seed), draw(2, 16, seed=seed + 1000)
        feat_s[1] = -feat_s[0]
        finite(PKT(), feat_s, feat_t)
        finite(PKT(), feat_t, feat_s)
    feat_s[0, 0] = NAN
    assert PKT()(feat_s, feat_t).isnan()


def test_nst_of_channels_that_are_alike():
    """All distances are roundings; the kernel's width is one, too."""
    for seed in range(50):
        fm = draw(2, 1, 3, 3, seed=seed)
        assert abs(finite(NST('gaussian'), fm, fm)) < 0.1
        flat = fm.abs().expand(-1, 8, -1, -1)
        finite(NST('gaussian'), flat, flat * torch.arange(1, 9)[:, None, None])
    assert NST('gaussian')(fm * NAN, fm).isnan()


def test_sakd_pools_maps_before_it_squares_them():
    """As AT does, of which this is the distance per image."""
    fm_s, fm_t = draw(4, 3, 8, 6), draw(4, 5, 4, 8, seed=1)
    torch.testing.assert_close(attention_distance(fm_s, fm_t).mean(), AT()(fm_s, fm_t))


def test_a_choice_hides_nothing():
    fms, outs = [draw(4, 3, 4, 4)], (draw(4, 10), draw(4, 10, seed=1))
    mask = torch.ones(4, 2)
    loss = SAKD(8, 8, [3], [3])
    assert loss(fms, outs[0], [fms[0] + 1], outs[1], mask).isfinite()
    mask[0, 0] = NAN
    assert loss(fms, outs[0], [fms[0] + 1], outs[1], mask).isnan()
    for action in (mask[:, 0], mask[:, 0] * 0):
        assert select_and_scale(nn.functional.mse_loss, action, *outs).isnan()


def test_sdd_keeps_its_weights_in_float64():
    s, t, target = (
        draw(6, 5, 5, dtype=torch.float64),
        draw(6, 5, 5, seed=1, dtype=torch.float64),
        torch.arange(6) % 5,
    )
    whole, none = (SDD(consistent=1.0, complementary=w)(s, t, target) for w in (1.0, 0.0))
    mixed = SDD(consistent=1.0, complementary=1.3)(s, t, target)
    torch.testing.assert_close(mixed, none + 1.3 * (whole - none), rtol=1e-12, atol=0)


@pytest.mark.parametrize('K', [2, 3])
def test_a_teacher_that_masks_every_class_but_the_label(K):
    """It says nothing about the others, and the sample counts with what it says of the label."""
    out_s, out_t, target = draw(4, K), draw(4, K, seed=1), torch.arange(4) % 2
    out_t[0, 1:] = -INF
    for loss in (DKD(), NKD(), WKDLogit(1 - torch.eye(K))):
        finite(loss, out_s, out_t, target)
        silent = loss.terms(out_s[:1], out_t[:1], target[:1])[1]
        assert silent == 0, 'nothing about the others'
        assert loss(out_s, out_t * NAN, target).isnan()
    patches = (out[:, :, None].expand(-1, -1, 5) for out in (out_s, out_t))
    finite(SDD('dkd'), *patches, target)


def test_kdcl_works_in_float32_inside_autocast():
    outs, target = [draw(8, 10, seed=i) for i in range(3)], torch.arange(8)
    probs = torch.stack(outs).softmax(dim=2)
    weights = general_weights(probs, nn.functional.one_hot(target, 10))
    for mode in ('linear', 'general'):
        loss = KDCL(mode)
        more = (weights,) if mode == 'general' else ()
        plain, wanted = loss.combine(outs, target, *more), loss(outs, target, *more)
        with torch.autocast('cpu', torch.bfloat16):
            torch.testing.assert_close(loss.combine(outs, target, *more), plain, rtol=0, atol=0)
            torch.testing.assert_close(loss(outs, target, *more), wanted)
            again = general_weights(probs, nn.functional.one_hot(target, 10))
        torch.testing.assert_close(again, weights, rtol=0, atol=0)


def test_cc_of_order_0_is_a_constant():
    """Whose gradient is 0, and in which NaN shows."""
    feat = draw(4, 6)
    assert finite(CC(P_order=0), feat, draw(4, 6, seed=1)) == 0
    assert CC(P_order=0)(feat * NAN, feat).isnan()


def test_lsp_of_nodes_without_edges():
    assert finite(LSP(), draw(4, 6), draw(4, 3), torch.zeros(2, 0, dtype=torch.int64)) == 0


def test_mlkd_counts_a_single_temperature_once_per_sum():
    outs = [draw(6, 4, seed=i) for i in range(4)]
    instance = MLKD((4.0,), two_view=True).terms(*outs)[0]
    loss = MLKD((4.0,))
    weak = loss.terms(*outs[:2])[0]
    confident = (instance / weak - 1).item()  # the share of samples that the first sum keeps
    assert 0 <= confident <= 1


def test_ld_takes_an_average_in_any_form():
    out_s, out_t, weight = draw(8, 17), draw(8, 17, seed=1), torch.rand(8)
    wanted = LD()(out_s, out_t, weight, 4.0)
    got = LD()(out_s, out_t, weight, torch.tensor([4.0], dtype=torch.float64))
    assert got.shape == () and got.dtype == torch.float32 and got == wanted


def test_labels_of_eight_bits_have_padding():
    gold = torch.tensor([[1, 255, 2]])
    logits = draw(1, 3, 5)
    assert smoothed_ce(logits, gold.to(torch.uint8), ignore=255) == smoothed_ce(logits, gold, ignore=255)


def test_a_masked_class_has_a_gradient_also_through_the_teacher():
    """A generator learns from what the teacher says of its images; 0 * -inf would be NaN."""
    out_s, mask = draw(6, 5), torch.zeros(5)
    mask[4] = -INF
    mosaic = mosaickd.MosaicKD()
    for loss in (
        lambda t: cmi.masked_adversarial(t.detach(), t),
        lambda t: fastdfkd.masked_adversarial(t.detach(), t),
        lambda t: dfq._kl(out_s, t),
        lambda t: mosaickd._kl(out_s, t),
        lambda t: zskt._kl(out_s, t),
        lambda t: ood_ka._kl(out_s, t),
        lambda t: mosaic.terms(out_s, t, draw(6, 1, 2, 2))['align'],
        lambda t: deepinversion._disagreement(out_s, t, 3.0, True).mean(),
    ):
        finite(lambda x, loss=loss: loss(x + mask), draw(6, 5, seed=1))
    for loss in (dfq._kl, zskt._kl, lambda s, t: deepinversion._disagreement(s, t, 3.0, True).mean()):
        finite(lambda x, loss=loss: loss(out_s + mask, x + mask), draw(6, 5, seed=1))  # both mask it
        finite(lambda x, loss=loss: loss(x + mask, out_s + mask), draw(6, 5, seed=1))


def test_classes_that_are_masked_for_every_anchor():
    out_s, out_t = draw(6, 5), draw(6, 5, seed=1)
    out_t[:, 2:4] = -INF
    finite(lambda x: crosskd.quality_focal(x, out_t, torch.ones(6), 6.0), out_s)
    out_t[0, 0] = INF
    assert crosskd.quality_focal(out_s, out_t, torch.ones(6), 6.0).isnan()


def test_masks_of_any_type():
    hint, s, seqs_t = tka.SeqHint(2, 4), draw(10, 3, 4), [draw(5, 3, 4, seed=i) for i in (1, 2)]
    mask = torch.tensor([[0, 0, 0, 1, 1], [0, 0, 0, 0, 0], [0, 1, 1, 1, 1]])
    wanted = hint(s, seqs_t, mask.bool())
    for dtype in (torch.int64, torch.uint8, torch.float32):
        assert hint(s, seqs_t, mask.to(dtype)) == wanted


def test_boxes_in_half_precision():
    """Areas of large boxes are beyond it."""
    anchors = torch.tensor([[0, 0, 300, 300], [10, 10, 310, 310], [400, 400, 700, 700]], dtype=torch.float32)
    boxes = torch.tensor([[5.0, 5.0, 305.0, 305.0]])
    for region in (ld.main_region, ld.valuable_region):
        torch.testing.assert_close(region(anchors.half(), [3], boxes.half()), region(anchors, [3], boxes))


def test_sizes_of_pictures_in_any_form():
    boxes, sizes = [torch.tensor([[0.0, 0.0, 8.0, 8.0]])] * 2, torch.tensor([[32, 32], [16, 32]])
    for form in (list(sizes), sizes.tolist(), tuple(map(tuple, sizes.tolist()))):
        for a, b in zip(fgd.masks(boxes, sizes, (4, 4)), fgd.masks(boxes, form, (4, 4))):
            assert torch.equal(a, b)


def test_mmd_is_float32_wherever_it_is_called():
    x, y = draw(8, 16), draw(8, 16, seed=1)
    wanted = cfl.mmd(x, y, (1.0,))
    with torch.autocast('cpu', torch.bfloat16):
        assert cfl.mmd(x, y, (1.0,)) == wanted
    assert cfl.mmd(x.bfloat16(), y.bfloat16(), (1.0,)).dtype == torch.float32


def test_images_without_neighbours():
    """Total variation without weight is left out, as its own message advises."""
    x, out_t, target, bn = draw(2, 3, 1, 8), draw(2, 5), torch.tensor([0, 1]), torch.tensor(1.0)
    finite(lambda x: deepinversion.DeepInversion(tv_l2=0.0)(x, out_t, target, bn), x)
    with pytest.raises(ValueError, match='leave total variation out'):
        deepinversion.DeepInversion(tv_l2=1e-4)(x, out_t, target, bn)


@pytest.mark.parametrize(
    'call, said',
    [
        (lambda: NORM(2)(draw(2, 8, 2, 1), draw(2, 4, 4, 1)), 'size of fm_s'),
        (lambda: SRRL(8, 16)(draw(2, 8, 4, 4), draw(2, 16, 4, 4), draw(2, 10), nn.Linear(12, 10)), 'V, 16'),
        (lambda: SimKD(8, 16).predict(draw(2, 8, 4, 4), nn.Linear(12, 10)), 'V, 16'),
        (lambda: local_logits(draw(2, 16), nn.Linear(16, 10)), r'\(N, 16, H, W\)'),
        (lambda: ReviewKD([4], [4])([], []), 'must hold 1 maps'),
        (lambda: IRG()([], []), 'must hold fm1'),
        (lambda: DCM()(draw(3, 8, 1), draw(3, 8, 1), torch.zeros(8).long()), 'zeros_like'),
        (lambda: DCM()(draw(3, 8, 5, 2), draw(3, 8, 5, 2), torch.zeros(8).long()), 'outs_1'),
        (lambda: FCFD([4, 8], [6, 12]).to_teacher(draw(2, 8, 4, 4), 0), 'count from 1'),
        (lambda: FCFD([4, 8], [6, 12]).to_student(draw(2, 6, 4, 4), 2), r'\(N, 12, H, W\)'),
        (lambda: ScaleKD(4, 8, (3, 2)).spatial(draw(2, 1, 8), draw(2, 8, 3, 2)), r'\(N, 6, 8\)'),
        (lambda: tka.compress_tokens([draw(3, 2, 4), draw(5, 2, 4)]), r'seqs_t\[1\]'),
        (lambda: tka.detr_ce(draw(4, 5), torch.zeros(5).long()), 'logits'),
        (lambda: customize.select_teacher([draw(3, 4), draw(5, 4)]), r'outs_t\[1\]'),
        (lambda: fedka.transferability(draw(1, 8), draw(2, 4, 8)), r'\(clients, 1, 8\)'),
        (lambda: fedka.fed_average([{}, {}], [1.0]), 'weights must hold 2'),
        (lambda: CTKD()(draw(2, 3), draw(2, 3), -1.0), "the authors' -1 is 1 here"),
        (lambda: MHGD([8, 8], drop=1.0), r'drop in \[0, 1\)'),
        (lambda: MHGD([8, 8], num_heads=0), 'num_heads must be >= 1'),
        (lambda: ReviewKD([4], [4], mid_channels=0), 'mid_channels must be 1 or more'),
        (lambda: ScaleKD(4, 8, (3, 2), scale=5), r'scale must be two numbers, \(spatial, frequency\), got 5'),
        (lambda: TfKDReg(alpha=2.0), r'alpha in \[0, 1\]'),
        (lambda: TfKDSelf(alpha=-1.0), r'alpha in \[0, 1\]'),
        (lambda: DOT([{'params': [draw(2)], 'momentum': 0.99}], lr=0.1), r'delta < 1 - momentum'),
        (lambda: rrd.build(RRD, PROBE, queue=4), 'queue must hold a batch of 8, got 4'),
        (lambda: sla.student(None, SLA(num_transforms=6), None), 'num_transforms must be 4'),
        (lambda: dot.optimiser(PROBE, [], SimpleNamespace(momentum=0.95)), 'momentum 0.95 and delta 0.075'),
        (lambda: EEL(64), 'together'),
        (lambda: EEL(64, 64)(draw(4, 32), draw(4, 32), torch.arange(4)), r'\(N, 64\)'),
    ],
)
def test_what_does_not_fit_is_refused_in_words(call, said):
    with pytest.raises(ValueError, match=said):
        call()
