"""Losses beside their formula written out a second time, in inputs that no golden file has."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dataset.dense import DenseMetrics
from dfkd_losses.kegnet import KegNet
from ka_losses.afk import AFK
from ka_losses.fedka import transferability
from kd_losses.aekd import AEKD
from kd_losses.at import AT
from kd_losses.bss import BSSAttacker
from kd_losses.byot import BYOT
from kd_losses.crosskd import quality_focal
from kd_losses.ctkd import CTKD
from kd_losses.dcm import DCM
from kd_losses.distplus import DISTPlus
from kd_losses.dkl import DKL
from kd_losses.kdcl import KDCL
from kd_losses.kdsvd import KDSVD
from kd_losses.lwm import LwM
from kd_losses.mlkd import MLKD
from kd_losses.ofakd import OFAKD
from kd_losses.pkt import PKT
from kd_losses.quest import QuEST


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(value, wanted):
    torch.testing.assert_close(value, wanted, rtol=1e-9, atol=1e-12)


def test_kdsvd_of_a_student_with_fewer_positions_than_vectors():
    """Each of the teacher's vectors finds the nearest of those that the student has."""
    fms_s, fms_t = [draw(2, 6, 1, 2), draw(2, 5, 1, 1)], [draw(2, 6, 3, 2), draw(2, 5, 2, 2)]
    k, sides = 3, [[], []]
    for s, t in zip(fms_s, fms_t):
        rows_s, rows_t = (x.flatten(2).mT for x in (s, t))
        _, sigma, vh = torch.linalg.svd(rows_t, full_matrices=False)
        v_t = vh[:, :k].mT
        v_t = v_t * v_t.gather(1, v_t.abs().argmax(dim=1, keepdim=True)).sign()
        w = sigma[:, None, :k] / sigma[:, None, :k].norm(dim=2, keepdim=True)
        r = min(k + 3, *rows_s.shape[1:])
        a = torch.linalg.svd(rows_s, full_matrices=False)[2][:, :r].mT
        cos = a.mT @ v_t
        best = cos.abs().argmax(dim=1, keepdim=True)
        a = a.gather(2, best.expand(-1, a.shape[1], -1)) * cos.gather(1, best).sign()
        sides[0].append(a * w)
        sides[1].append(v_t * w)
    r_s, r_t = (((late[:, :, None] - early[:, None]).square() / -8).exp() for early, late in sides)
    close(KDSVD(k=k)(fms_s, fms_t), (r_s - r_t).square().sum() / 2)


def test_distplus_of_short_vectors():
    """A product of lengths up to 1e-12 is no direction: r = 0 and no gradient."""
    out_s, out_t = draw(4, 5), draw(4, 5, seed=1)
    fm_s, fm_t = (1e-7 * draw(4, 3, 2, 2, seed=seed) for seed in (2, 3))
    fm_s.requires_grad_()
    _, channel, spatial = DISTPlus().terms(out_s, fm_s, out_t, fm_t)
    (channel + spatial).backward()
    assert (channel.item(), spatial.item(), fm_s.grad.abs().max().item()) == (1, 1, 0)
    assert DISTPlus().terms(out_s, fm_s * torch.nan, out_t, fm_t)[1].isnan()


def test_dkl_with_a_small_power_of_small_probabilities():
    """In float32 a probability may be 0 whose power of 0.05 is not."""
    loss = DKL(gamma=0.05, T2=0.5, reduction='weights', alpha=0, beta=1)
    out_s, out_t = torch.tensor([[0.0, 1.0, 2.0]]), torch.tensor([[0.0, 150.0, 90.0]])
    torch.testing.assert_close(loss(out_s, out_t), loss(out_s.double(), out_t.double()).float())
    assert loss(out_s, out_t) > 4


def test_quest_pools_teachers_of_odd_sizes_by_two():
    words, fm_s, fm_t = draw(3, 4), draw(2, 3, 2, 3), draw(2, 4, 5, 7, seed=1)
    loss = QuEST(3, 4, centroids=words).double()
    close(loss(fm_s, fm_t), loss(fm_s, F.avg_pool2d(fm_t[:, :, :4, :6], 2)))
    close(
        loss(fm_s[:, :, :1, :1], fm_t[:, :, :3, :3]),
        loss(fm_s[:, :, :1, :1], F.avg_pool2d(fm_t[:, :, :2, :2], 2)),
    )


def test_afk_takes_a_masked_attribute_as_a_no():
    out_s, out_t = draw(4, 3).requires_grad_(), draw(4, 3, seed=1)
    masked = out_t.clone()
    masked[1, 0] = -torch.inf
    out_t[1, 0] = -1
    close(AFK()([out_s], [masked]), AFK()([out_s], [out_t]))
    for value in torch.inf, torch.nan:
        masked[0, 0] = value
        assert not AFK()([out_s], [masked]).isfinite()


def test_fedka_compares_directions_however_small_the_saliency():
    sal_s, sals_t = draw(2, 7), draw(3, 2, 7, seed=1)
    close(transferability(1e-11 * sal_s, sals_t), transferability(sal_s, sals_t))
    close(transferability(0 * sal_s, sals_t), torch.full((3,), 2.0, dtype=torch.float64))


def test_bss_leaves_images_alone_that_the_teacher_has_wrong():
    """The attack ends before its first step, also before it clips."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(60, 5)).double()
    img = 3 * draw(2, 3, 4, 5)
    wrong = (net(img).argmax(dim=1) + 1) % 5
    assert torch.equal(BSSAttacker().attack(net, img, wrong, (wrong + 1) % 5), img)


def test_crosskd_of_a_class_that_both_rule_out():
    out_s, out_t = draw(3, 4), draw(3, 4, seed=1)
    weight = torch.ones(3, dtype=torch.float64)
    wanted = quality_focal(out_s[:, 1:], out_t[:, 1:], weight, 3)
    out_s[:, 0] = out_t[:, 0] = -torch.inf
    out_s.requires_grad_()
    loss = quality_focal(out_s, out_t, weight, 3)
    loss.backward()
    close(loss, wanted)
    assert out_s.grad.isfinite().all()


def test_dense_metrics_refuse_labels_that_are_no_class():
    out = draw(1, 3, 2, 2)
    label = torch.tensor([[[0, 1], [2, 255]]])
    metrics = DenseMetrics(('seg',), 3, 'cpu', ignore=255)
    metrics.add([out], {'seg': label})
    assert metrics.confusion.sum() == 3
    with pytest.raises(ValueError, match=r'labels must be in 0\.\.2, -1 or -100, got 255'):
        DenseMetrics(('seg',), 3, 'cpu').add([out], {'seg': label})


def test_kegnet_takes_labels_as_rows_of_any_type_beside_masked_classes():
    out_t, z, label = draw(4, 5), draw(4, 3, seed=1), torch.tensor([0, 2, 3, 4])
    out_t[:, 1] = out_t[2, 4] = -torch.inf
    more = draw(4, 3, seed=2), z, draw(4, 1, 2, 2, seed=3)
    rows = F.one_hot(label, 5)
    close(KegNet()(out_t, rows.double(), *more), KegNet()(out_t, label, *more))
    close(KegNet()(out_t, rows, *more), KegNet()(out_t, label, *more))


def test_aekd_weighs_equal_teachers_alike():
    t, u = draw(8, 10), draw(8, 10, seed=1)
    for norm in False, True:
        close(AEKD.weights(torch.stack([t] * 6), 0.6, norm), torch.full((6,), 1 / 6, dtype=torch.float64))
        w = AEKD.weights(torch.stack([t, u, t]), 0.6, norm)
        assert w[0] == w[2] != w[1]


def test_ofakd_of_a_class_that_both_rule_out():
    out_s, out_t, target = draw(3, 5), draw(3, 5, seed=1), torch.tensor([0, 2, 3])
    out_s[:, 1] = out_t[:, 1] = -torch.inf
    rest = [0, 2, 3, 4]
    close(
        OFAKD(1.5)(out_s, out_t, target), OFAKD(1.5)(out_s[:, rest], out_t[:, rest], torch.tensor([0, 1, 2]))
    )
    out_s[0, 2] = torch.nan
    assert OFAKD(1.5)(out_s, out_t, target).isnan()


def test_what_would_only_be_half_a_loss_is_refused():
    with pytest.raises(ValueError, match='at least 3 classes with logit_std'):
        MLKD(logit_std=True)(draw(4, 2), draw(4, 2, seed=1))
    with pytest.raises(ValueError, match='eps must be > 0'):
        PKT(eps=0.0)
    fm, net = draw(2, 3, 4, 4).requires_grad_(), nn.Sequential(nn.Flatten(), nn.Linear(48, 5)).double()
    out, target = net(fm), torch.tensor([0, 1])
    with torch.no_grad(), pytest.raises(ValueError, match='enable_grad'):
        LwM()(out, fm, out, fm, target)


def test_at_divides_short_maps_by_the_least_length():
    fm_s, fm_t = 3e-7 * draw(2, 3, 4, 4), draw(2, 5, 4, 4, seed=1)
    q_s, q_t = (fm.square().mean(dim=1).flatten(1) for fm in (fm_s, fm_t))
    q_s, q_t = (q / q.norm(dim=1, keepdim=True).clamp(min=1e-12) for q in (q_s, q_t))
    assert q_s.norm(dim=1).max() < 1
    close(AT()(fm_s, fm_t), (q_s - q_t).square().mean())


@pytest.mark.parametrize('mode', ['ctkd', 'byot', 'dcm', 'linear', 'general', 'naive', 'minlogit'])
def test_a_class_that_all_networks_rule_out_counts_nothing(mode):
    """Also in what the gradients say."""
    outs, target, rest = [3 * draw(6, 5, seed=k) for k in range(3)], torch.arange(6) % 4, slice(0, 4)
    feats = [draw(6, 3, seed=9 + k) for k in range(3)]
    theta = []

    def value(outs):
        if mode == 'ctkd':
            loss = CTKD().double()
            found = loss(*outs[:2], 1.0)
            theta.append(loss.theta)
        elif mode == 'byot':
            torch.manual_seed(0)
            found = BYOT((3, 3, 3)).double()(outs, feats, target)
        elif mode == 'dcm':
            found = DCM(eps=0.0)(outs[:1], outs[1:2], target)
        else:
            found = KDCL(mode)(outs, target, *[torch.tensor([0.8, 0.5, -0.3]).double()] * (mode == 'general'))
        return found

    def masked(k):
        out = outs[k].clone()
        out[:, 4] = -torch.inf
        return out.requires_grad_()

    with_it, without = [masked(k) for k in range(3)], [out[:, rest] for out in outs]
    loss = value(with_it)
    loss.backward()
    assert all(x.grad is None or x.grad.isfinite().all() for x in [*with_it, *theta])
    torch.testing.assert_close(loss.detach(), value(without).detach(), rtol=1e-6, atol=0)
