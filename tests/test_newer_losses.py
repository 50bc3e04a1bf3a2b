"""What the pages of the newer losses say beyond their vectors: fast forms, queues, orders, limits."""

import math
from types import SimpleNamespace

import pytest
import torch

import models
from kd_losses import sla, sskd, wkd
from kd_losses.clipkd import CLIPKD, gd, keep_patches
from kd_losses.crld import CRLD
from kd_losses.dcd import DCD
from kd_losses.diffkd import Denoiser, DiffKD
from kd_losses.distillm2 import DistiLLM2
from kd_losses.eakd import EAKD, entropy_weight
from kd_losses.pld import PLD
from kd_losses.radio import PHIS
from kd_losses.rld import RLD
from kd_losses.rrd import RRD
from kd_losses.rsd import RSD
from kd_losses.skd import SKD
from kd_losses.sortkd import SortKD, sort_logits
from kd_losses.st import SoftTarget
from kd_losses.taid import TAID
from kd_losses.tekap import TeKAP, perturb
from tests.test_properties import near, rand


@pytest.mark.parametrize('make', [
    lambda: SKD(T=0), lambda: SKD(tikhonov=0), lambda: SortKD(T=0), lambda: DCD(2, 2, max_scale=0),
    lambda: RRD(2, 2, T_t=0), lambda: RRD(2, 2, queue=0), lambda: CRLD(T=0), lambda: TeKAP(copies=0),
    lambda: TeKAP(noise=1.0), lambda: EAKD(upper=0), lambda: RSD(2, 3, projector=False), lambda: PLD(tau=0),
    lambda: DiffKD(4, 7), lambda: DiffKD(4, 8, train_steps=1281), lambda: DiffKD(4, 8, n_classes=1),
    lambda: DiffKD(4, 8)(rand(2, 4, 3, 3), rand(2, 8, 3, 3), rand(2, 5)),
    lambda: Denoiser(4, 8, kernel_size=2), lambda: keep_patches(rand(1, 3, 2), r=0.9),
])  # fmt: skip
def test_what_is_not_legal_is_refused(make):
    with pytest.raises(ValueError, match='got'):
        make()


@pytest.mark.parametrize('n', [4, 30])  # fewer and more samples than dimensions
def test_rsd_is_the_plain_correlation_matrix(n):
    s, t = rand(n, 6), rand(n, 6, seed=1)
    xn, tn = ((x - x.mean(0)) / (x.std(0, correction=0) + 1e-5) for x in (s, t))
    C = tn.T @ xn / n
    off = C - C.diagonal().diag()
    loss = RSD(6, 6, kappa=0.3, projector=False)
    near(loss(s, t), (C.diagonal() - 1).square().sum() + 0.3 * off.square().sum())
    s[:, 2] = 7  # a constant column: no correlation, and no gradient of 1e5
    s.requires_grad_()
    loss(s, t).backward()
    assert not s.grad[:, 2].any() and s.grad[:, 3].any() and s.grad.abs().max() < 100
    near(loss(s[:1], t[:1]), 6)


def test_sort_logits_deals_the_same_logits():
    inf = math.inf
    out, target = torch.tensor([[4.0, 3, 2, 1], [4, 3, 2, 1], [2, -inf, 1, 3]]), torch.tensor([2, 0, 1])
    wanted = torch.tensor([[3.0, 2, 4, 1], [4, 3, 2, 1], [1, 3, -inf, 2]])
    assert torch.equal(sort_logits(out, target), wanted)
    assert torch.equal(sort_logits(out.half(), target), wanted.half())
    assert torch.equal(sort_logits(out, torch.tensor([2, -100, -100]))[1:], out[1:])
    assert torch.equal(sort_logits(torch.zeros(1, 3), torch.tensor([1])), torch.zeros(1, 3))


def test_pld_step_by_step():
    s, t, target = rand(5, 6), rand(5, 6, seed=1), torch.tensor([0, 5, 2, 3, 1])
    t[0, 3] = -math.inf
    total = 0
    for n in range(5):
        others = sorted(set(range(6)) - {int(target[n])}, key=lambda k: -t[n, k])
        order, q = [int(target[n]), *others], (t[n] / 2).softmax(dim=0)
        total += sum(q[k] * (s[n, order[r:]].logsumexp(dim=0) - s[n, k]) for r, k in enumerate(order))
    near(PLD(tau=2.0)(s, t, target), total / 5)


def test_rrd_keeps_its_queue_clean():
    kd, s, t = RRD(3, 4, feat_dim=5, queue=7).double(), rand(5, 3), rand(5, 4, seed=1)
    before = kd.queue.clone()
    with torch.no_grad():
        kd(s, t)
    kd.eval()(s, t)
    assert torch.equal(kd.queue, before) and kd.pointer == 0, 'only training writes'
    first = kd.train()(s, t)
    again = kd(s, t)  # a second forward pass before the first backward pass, and rows 5, 6, 0, 1, 2
    (first + again).backward()
    assert kd.pointer == 3 and not torch.equal(kd.queue[5:], before[5:])
    near(kd.queue.norm(dim=1), torch.ones(7))
    kept = kd.queue.clone()
    t[2, 0] = math.nan
    assert kd(s, t).isnan() and kd.pointer == 1
    assert torch.equal(kd.queue[5], kept[5]) and kd.queue.isfinite().all(), 'the row of NaN is not written'
    with pytest.raises(ValueError, match='at most 7 samples, got 8'):
        kd(rand(8, 3), rand(8, 4))


def test_crld_masks():
    """Nothing is sure: 0 without gradient; thresholds are inclusive; masked rows still show NaN."""
    s, t = rand(4, 3).requires_grad_(), rand(4, 3, seed=1)
    loss = CRLD(tau_weak=1.1, tau_strong=1.1)(s, s, t, t)
    loss.backward()
    assert loss == 0 and not s.grad.any()
    uniform = torch.zeros(1, 4)
    assert [float(m) for m in CRLD(tau_weak=0.25, tau_strong=0.3).masks(uniform, uniform)] == [1, 0]
    bad = s.detach().clone()
    bad[1, 1] = math.nan
    assert CRLD(tau_weak=1.1, tau_strong=1.1)(bad, s, t, t).isnan()


def test_copies_and_weights_of_soft_targets():
    """TeKAP and EA-KD against their sums written out; the drawn copies are those of perturb."""
    s, t, e, st = rand(5, 4), rand(5, 4, seed=1), rand(2, 5, 4, seed=2), SoftTarget(T=4.0)
    plain = st(s, t) + 0.8 * sum(st(s, 0.7 * t + 0.3 * noise) for noise in e)
    near(TeKAP(copies=2, noise=0.3)(s, t, e), plain)
    draws = [torch.Generator().manual_seed(5) for _ in range(2)]
    copies = perturb(t.expand(3, 5, 4), 0.1, generator=draws[0])
    near(TeKAP().terms(s, t, generator=draws[1])[1], sum(st(s, y) for y in copies))
    w = entropy_weight(s, t, upper=2.0)
    near(EAKD(upper=2.0)(s, t), sum(w[n] * st(s[n, None], t[n, None]) for n in range(5)) / 5)


def test_skd_where_there_is_no_direction():
    s, t = rand(4, 5).requires_grad_(), rand(4, 5, seed=1)
    assert SKD().terms(s[:1], t[:1])[1] == 0
    SKD().terms(s, s.detach())[1].backward()
    assert not s.grad.any(), 'student and teacher agree: gradient 0, not NaN'
    f1, f2 = SKD().shares(t)
    near(f1, 0.5)  # of four samples, two
    near(f2, 0.6)  # of five classes, three


def test_dcd_bias_has_no_effect():
    kd, s, t = DCD(3, 4, feat_dim=5).double(), rand(6, 3), rand(6, 4, seed=1)
    before = kd(s, t)
    kd.bias.data.fill_(3)
    near(kd(s, t), before)
    near(DCD(3, 4)(s[:1], t[:1]), 0)


def test_clipkd_terms_that_have_no_weight():
    """They are not built; equal widths need no projection; one pair has nothing to tell apart."""
    kd = CLIPKD(4, 4, w_icl=0)
    assert not list(kd.parameters()) and kd.terms(*pairs(1)).keys() == {'task', 'crd', 'fd'}
    everything = CLIPKD(4, 4, w_cross_kd=1, w_gd=1, w_afd=1).double()
    terms = everything.terms(*pairs(1))
    assert {name for name, x in terms.items() if x.abs() > 1e-12} == {'fd'}
    assert all(x > 0 for x in everything.terms(*pairs(5)).values())
    a, b, scale, u, v, _ = pairs(5)
    a, b = (torch.nn.functional.normalize(x) for x in (a, b))
    near(gd(a, b, scale, u, v, 2.0, exact=True), gd(a, b, 1 / scale, u, v, 1 / 2.0))


def pairs(n):
    u, v = (torch.nn.functional.normalize(rand(n, 4, seed=k)) for k in (2, 3))
    return rand(n, 4), rand(n, 4, seed=1), 14.3, u, v, 100.0


def test_keep_patches():
    x = torch.arange(24.0).reshape(2, 6, 2)
    kept, mask, restore = keep_patches(x, 0.5, torch.Generator().manual_seed(0))
    assert kept.shape == (2, 3, 2) and mask.sum(dim=1).tolist() == [3, 3]
    back = torch.cat([kept, torch.full((2, 3, 2), -1.0)], dim=1)
    back = back.gather(1, restore[:, :, None].expand(-1, -1, 2))
    assert torch.equal(back, torch.where(mask[:, :, None], -1.0, x))


def test_anchors_of_a_curriculum_are_in_its_state():
    """So that a resumed run goes on with the gaps that its first steps measured."""
    loss, other = DistiLLM2(anchor_t=0.2, anchor_s=0.3), DistiLLM2()
    other.load_state_dict(loss.state_dict())
    assert (other.anchor_t, other.anchor_s) == (0.2, 0.3)


@pytest.mark.parametrize('make', [lambda: DiffKD(8, 8), TAID, lambda: PHIS(4)])
def test_state_in_float64(make):
    """half() leaves it alone, and a move that fails, to a device that is not there, takes nothing away."""
    loss = make()
    before = {key: x.clone() for key, x in loss.named_buffers()}

    def refuse(x):
        raise RuntimeError('no such device')

    with pytest.raises(RuntimeError, match='no such device'):
        loss._apply(refuse)
    state = dict(loss.named_buffers())
    assert state.keys() == before.keys() and all(torch.equal(state[key], x) for key, x in before.items())
    state = dict(loss.half().named_buffers())
    exact = [key for key, x in before.items() if x.dtype == torch.float64]
    assert exact and all(torch.equal(state[key], before[key]) for key in exact)


def test_diffkd_schedule_and_autoencoder():
    kd = DiffKD(4, 5, ae_channels=8)
    assert [t for t, *_ in kd.feature.schedule] == [400, 300, 200, 100, 0] and kd.feature.schedule[-1][2] == 1
    near(kd.half().float().feature.ab, (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0))
    terms = kd.terms(rand(3, 4, 6, 4).float(), rand(3, 5, 3, 2, seed=1).float())  # maps of two sizes
    sum(terms.values()).backward()
    assert terms.keys() == {'feature', 'ddim', 'rec'}
    assert all(p.grad is not None for p in kd.parameters())


def test_a_failed_factorisation_of_skd_is_nan():
    """Not the finite part of a factor that was found until then."""
    torch.manual_seed(0)
    out_s, out_t = (5 * torch.randn(64, 4) for _ in 'st')
    assert not torch.isfinite(SKD(per_class=False, tikhonov=1e-12)(out_s, out_t))
    assert torch.isfinite(SKD(per_class=False)(out_s, out_t))


class Labelled:
    def __init__(self, target):
        self.target = torch.tensor(target)

    def __len__(self):
        return len(self.target)

    def test_batches(self, n):
        img = torch.arange(len(self.target))
        return zip(img.split(n), self.target.split(n), img.split(n))


def test_costs_of_wkd_where_a_class_has_few_images():
    """A class of one image costs 1 to all and leaves the others as they are; no label at all is refused."""
    torch.manual_seed(0)
    logits = torch.randn(200, 4)
    kd, rare = (wkd.WKDLogit(torch.zeros(4, 4)) for _ in 'ab')
    probe = SimpleNamespace(train_set=Labelled([0, 1, 2] * 60 + [3] * 20), batch_size=64)
    teacher = lambda img: SimpleNamespace(out=logits[img])  # noqa: E731
    wkd.before(kd, teacher, probe)
    probe.train_set = Labelled([0, 1, 2] * 60 + [3] + [-100] * 19)
    wkd.before(rare, teacher, probe)
    near(kd.cost[:3, :3], rare.cost[:3, :3])
    apart = ~torch.eye(4, dtype=torch.bool)
    assert (kd.cost[apart] < 0.63).all() and (kd.cost[apart] > 0).all()
    near(rare.cost[3, :3], torch.full((3,), 1 - math.exp(-1)))
    probe.train_set = Labelled([-100] * 9)
    with pytest.raises(ValueError, match='no labels'):
        wkd.before(kd, teacher, probe)


@pytest.mark.parametrize(
    'make', [lambda net: sskd.SSKDStudent(net, 64), lambda net: sla.SLAStudent(net, 64, 5)]
)
def test_turned_students_hand_out_the_upright_images(make):
    net = models.build('vit_64_3', 5).eval()
    x = torch.randn(2, 3, 32, 32)
    alone, turned = net(x, True), make(net).eval()(x, True)
    for name in ('out', 'feat'):
        near(getattr(turned, name), getattr(alone, name), 1e-4)
    for name in ('fms', 'pres', 'tokens', 'levels'):
        assert len(getattr(turned, name)) == len(getattr(alone, name)) > 0
        for a, b in zip(getattr(turned, name), getattr(alone, name)):
            near(a, b, 1e-4)


def test_rows_of_turned_images_come_in_fours():
    with pytest.raises(ValueError, match='4 rows per image'):
        sskd.head_loss(torch.randn(6, 5))


@pytest.mark.parametrize('out_t, target', [([2.0, -torch.inf, 1.0, 0.5], 3), ([2.0, *[-torch.inf] * 3], 0)])
def test_rld_where_only_masked_classes_are_left(out_t, target):
    """Nothing but classes that the teacher calls impossible ranks below the label: the ranking is silent."""
    out_s = torch.tensor([[0.3, -0.2, 0.9, 0.1]], requires_grad=True)
    scd, mcd = RLD(T=2.0).terms(out_s, torch.tensor([out_t]), torch.tensor([target]))
    assert mcd == 0 and scd > 0
    (scd + mcd).backward()
    assert out_s.grad.isfinite().all()
    assert RLD()(out_s, torch.tensor([out_t]) * torch.nan, torch.tensor([target])).isnan()


def test_distillm2_works_in_the_precision_of_a_float64_student():
    generator = torch.Generator().manual_seed(0)
    s, t, s_gen, t_gen = (torch.randn(3, 4, 6, generator=generator) for _ in range(4))
    target = torch.randint(6, (3, 4), generator=generator)
    loss = DistiLLM2(0.6, 0.4, 0.4)
    mixed = loss(s.double(), t, target, s_gen.double(), t_gen, target)
    whole = loss(*(x.double() if x.is_floating_point() else x for x in (s, t, target, s_gen, t_gen, target)))
    assert mixed.dtype == torch.float64 and abs(mixed / whole - 1) < 1e-12
