"""What the papers promise, and independent slow forms of what the files compute cleverly."""

import copy
import math
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from kd_losses import (
    AT,
    CC,
    CRD,
    DIST,
    DKD,
    KDSVD,
    LSKD,
    MLKD,
    NST,
    OFAKD,
    OFD,
    PKT,
    RKD,
    SP,
    TTM,
    VID,
    FitNet,
    Logits,
    SoftTarget,
)
from kd_losses.ab import AB
from kd_losses.adain import AdaINKD
from kd_losses.bss import BSS, BSSAttacker, sample_attack_class, select_base_samples
from kd_losses.catkd import CATKD, to_cam
from kd_losses.cd import GKD
from kd_losses.cskd import CSKD
from kd_losses.ctkd import CTKD, cosine_lambda
from kd_losses.dcm import DCM
from kd_losses.ddgsd import DDGSD
from kd_losses.dgkd import DGKD
from kd_losses.dlb import DLB
from kd_losses.dml import DML
from kd_losses.dot import DOT
from kd_losses.dot import update as dot_update
from kd_losses.fcfd import FCFD, ghost_statistics
from kd_losses.fsp import FSP
from kd_losses.ft import FT
from kd_losses.kdcl import KDCL, general_weights
from kd_losses.lwm import LwM, grad_cam
from kd_losses.mhgd import MHGD, clipped
from kd_losses.mlkd import build_strong
from kd_losses.mlkd import feed_strong as mlkd_feed
from kd_losses.norm import NORM, FeatureTransform
from kd_losses.ofakd import OFAExit
from kd_losses.okddip import OKDDip
from kd_losses.onadvfd import Adversaries
from kd_losses.one import ONE
from kd_losses.pskd import PSKD, pskd_loss
from kd_losses.quest import QuEST, fit_centroids
from kd_losses.sad import SAD
from kd_losses.semckd import SemCKD
from kd_losses.simkd import SimKD
from kd_losses.sla import SLA, rotations
from kd_losses.sobolev import Sobolev
from kd_losses.tfkd import TfKDReg, TfKDSelf
from kd_losses.uskd import USKD
from kd_losses.vkd import VkD
from methods import METHODS
from tests.test_contract import build, call, inputs, relay


def rand(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def near(a, b, tol=1e-10):
    torch.testing.assert_close(
        torch.as_tensor(a, dtype=torch.float64), torch.as_tensor(b, dtype=torch.float64), rtol=tol, atol=tol
    )


# rows whose value depends on the order of a batch, with the reason
ORDERED = {
    'bss': 'draws a class per sample',
    'crd': 'draws negatives per sample',
    'diffkd': 'draws noise per sample',
    'mgd': 'draws a mask per sample',
    'semckd': 'its attention reads rows of an N x N matrix',
    'tekap': 'draws noise per sample',
    'vitkd': 'draws a mask per sample',
}


@pytest.mark.parametrize(
    'name', [n for n, m in sorted(METHODS.items()) if n not in ORDERED and not m.own.once_per_batch]
)
def test_order_of_the_batch_does_not_matter(name):
    w, v = inputs(name, dtype=torch.float64), inputs(name, dtype=torch.float64)
    order = torch.tensor([3, 1, 4, 0, 2])

    def mixed(x):  # copies of a sample stay neighbours
        return x.unflatten(0, (5, -1))[order].flatten(0, 1)

    expected = call(name, build(name, w), w)
    kd = build(name, v)
    relay(v, mixed)
    v.b.target, v.b.index, v.b.img = v.b.target[order], v.b.index[order], v.b.img[order]
    v.b.views = {view: x[order] for view, x in v.b.views.items()}
    near(call(name, kd, v), expected)


@pytest.mark.parametrize(
    'loss',
    [
        Logits(),
        SoftTarget(),
        AT(),
        FitNet(),
        NST(),
        NST('linear'),
        NST('gaussian'),
        PKT(),
        RKD(),
        SP(),
        CC(),
        CC(kernel='rbf'),
        CC(kernel='bilinear'),
        CC(kernel='mmd'),
    ],
)
def test_zero_when_student_equals_teacher(loss):
    x = rand(5, 7) if isinstance(loss, (Logits, SoftTarget, PKT, RKD, CC)) else rand(5, 7, 4, 3)
    s = x.clone().requires_grad_()
    value = loss(s, x)
    value.backward()
    near(value, 0.0, 1e-12)
    near(s.grad.abs().max(), 0.0, 1e-7)
    moved = x + 0.1 * rand(*x.shape, seed=1)
    assert loss(moved, x) > 1e-9


# ------------------------------------------------------------------------------------------------- logits


def test_soft_targets_tend_to_matching_logits():
    """For T to infinity, T^2 KL becomes the squared error of centred logits / 2, summed over classes / K."""
    s, t = rand(6, 5), rand(6, 5, seed=1)
    centred = (s - s.mean(1, keepdim=True)) - (t - t.mean(1, keepdim=True))
    near(SoftTarget(T=1e4)(s, t), centred.square().sum(1).mean() / (2 * 5), 1e-3)


def test_soft_target_gradient_is_the_difference_of_probabilities():
    s, t = rand(6, 5).requires_grad_(), rand(6, 5, seed=1)
    SoftTarget(T=3.0)(s, t).backward()
    near(s.grad, 3.0 / 6 * (F.softmax(s / 3, 1) - F.softmax(t / 3, 1)))


def test_soft_target_direction_and_mask():
    s, t = rand(6, 5), rand(6, 5, seed=1)
    assert abs(SoftTarget()(s, t) - SoftTarget()(t, s)) > 1e-3, 'the direction of the KL must matter'
    t[:, 2] = -math.inf
    assert torch.isfinite(SoftTarget()(s, t))
    s[:, 2] = -math.inf
    near(SoftTarget()(s, t), SoftTarget()(s[:, [0, 1, 3, 4]], t[:, [0, 1, 3, 4]]))


def test_dkd_recombines_to_soft_targets():
    """Per sample KD = TCKD + (1 - p_t[y]) NCKD: for one sample, DKD with alpha 1 and beta 1 - p_t[y]."""
    for seed in range(5):
        s, t, y = rand(1, 6, seed=seed), rand(1, 6, seed=seed + 10), torch.tensor([seed])
        rest = 1 - F.softmax(t / 4, 1)[0, seed].item()
        near(DKD(alpha=1, beta=rest)(s, t, y), SoftTarget(T=4)(s, t))
    # and DKD(1, 1) is KD when the teacher gives the target nothing
    t[0, 4] = -200.0
    near(DKD(alpha=1, beta=1)(s, t, y), SoftTarget(T=4)(s, t))


def test_dkd_two_classes_have_no_second_term():
    tckd, nckd = DKD().terms(rand(4, 2), rand(4, 2, seed=1), torch.tensor([0, 1, 0, 1]))
    near(nckd, 0.0)
    assert tckd > 0


# --------------------------------------------------------------------------------------------------- maps


def test_at_ignores_channels_and_scale():
    s, t = rand(4, 6, 5, 3), rand(4, 8, 5, 3, seed=1)
    near(AT()(s[:, torch.randperm(6)], t), AT()(s, t))
    near(AT()(7 * s, 0.1 * t), AT()(s, t))
    near(AT()(-s, t), AT()(s, t))


def test_at_powers_below_one_have_zero_slope_at_zero():
    s = rand(3, 4, 5, 5).relu().requires_grad_()
    AT(p=0.5)(s, rand(3, 4, 5, 5, seed=1)).backward()
    assert torch.isfinite(s.grad).all() and (s.grad[s == 0] == 0).all()


@pytest.mark.parametrize('loss', [AT(), NST()])
def test_sizes_meet_at_the_smaller(loss):
    """Height and width on their own: (8, 3) and (4, 6) meet at (4, 3)."""
    s, t = rand(2, 4, 8, 3), rand(2, 5, 4, 6, seed=1)
    near(loss(s, t), loss(F.adaptive_avg_pool2d(s, (4, 3)), F.adaptive_avg_pool2d(t, (4, 3))))


def nst_naive(s, t, k):
    s, t = F.normalize(s.flatten(2), dim=2), F.normalize(t.flatten(2), dim=2)
    total = 0
    for a, b in zip(s, t):
        total += (
            sum(k(x, y) for x in b for y in b) / len(b) ** 2
            + sum(k(x, y) for x in a for y in a) / len(a) ** 2
        )
        total -= 2 * sum(k(x, y) for x in a for y in b) / (len(a) * len(b))
    return total / len(s)


@pytest.mark.parametrize('size', [(2, 2), (6, 5)])  # positions fewer, and more, than channels
def test_nst_against_three_sums(size):
    s, t = rand(2, 5, *size), rand(2, 4, *size, seed=1)
    near(NST()(s, t), nst_naive(s, t, lambda x, y: (x @ y) ** 2))
    near(NST(d=3, c=0.5)(s, t), nst_naive(s, t, lambda x, y: (x @ y + 0.5) ** 3))
    near(NST('linear')(s, t), nst_naive(s, t, lambda x, y: x @ y))


def test_vid_learns_its_variance():
    """With the regression fixed, the loss is least where var equals the mean squared error."""
    vid = VID(3, 2).double()
    s, t = rand(4, 3, 5, 5), rand(4, 2, 5, 5, seed=1)
    error = (vid.regressor(s) - t).square().mean((0, 2, 3)).detach()
    with torch.no_grad():
        vid.alpha.copy_(torch.log(torch.expm1(error - vid.eps)))
    vid(s, t).backward()
    near(vid.alpha.grad, torch.zeros(2))
    near(vid(s, t), 0.5 * (error.log() + 1).mean())


def test_vid_starts_at_its_variance():
    for init_var in (0.1, 5.0, 500.0):
        near((F.softplus(VID(2, 3, init_var=init_var).alpha) + 1e-5).mean(), init_var, 1e-5)


def test_ofd_mask_and_margin():
    """Only where the student is above a negative margin, or the teacher is positive, does anything pull."""
    ofd = OFD(1, 1, margin=torch.tensor([-1.0])).double()
    ofd.connector = torch.nn.Identity()
    s = torch.tensor([-3.0, -0.5, 2.0, -3.0], dtype=torch.float64).reshape(1, 1, 1, 4)
    t = torch.tensor([-5.0, -5.0, -5.0, 1.0], dtype=torch.float64).reshape(1, 1, 1, 4)
    near(ofd(s, t), 0 + 0.5**2 + 3**2 + 4**2)
    draws = 0.3 + 0.8 * rand(2_000_000)
    margin = OFD.margin_from_bn(torch.tensor([-0.8]).double(), torch.tensor([0.3]).double())
    near(margin, draws[draws < 0].mean()[None], 3e-3)
    near(OFD.margin_from_bn(torch.zeros(2), torch.tensor([0.5, -0.5])), torch.tensor([0.0, -0.5]))


# -------------------------------------------------------------------------------------------------- batch


def orthogonal(n):
    return torch.linalg.qr(rand(n, n, seed=7)).Q


@pytest.mark.parametrize('loss', [RKD(), PKT(), CC(), CC(kernel='rbf'), CC(kernel='bilinear'), SP()])
def test_rotating_an_embedding_changes_nothing(loss):
    s, t = rand(6, 5), rand(6, 8, seed=1)
    near(loss(s @ orthogonal(5), t @ orthogonal(8)), loss(s, t))


@pytest.mark.parametrize('loss,tol', [(RKD(), 1e-10), (PKT(), 1e-5), (CC(), 1e-10), (SP(), 1e-10)])
def test_scaling_an_embedding_changes_nothing(loss, tol):
    s, t = rand(6, 5), rand(6, 8, seed=1)
    near(loss(30 * s, 0.02 * t), loss(s, t), tol)  # PKT: to its eps


def test_rkd_ignores_shifts_and_weights_its_terms():
    s, t = rand(6, 5), rand(6, 8, seed=1)
    near(RKD()(s + 3, t - 2), RKD()(s, t))
    loss = RKD(w_dist=2.0, w_angle=0.0)
    near(loss(s, t), 2 * loss.distance(s, t))
    near(RKD(w_dist=0.0, w_angle=3.0)(s, t), 3 * loss.angle(s, t))
    near(RKD(w_dist=0.0, w_angle=0.0)(s, t), 0.0)


def rkd_naive(s, t):
    def distances(f):
        d = torch.stack([torch.stack([(a - b).norm() for b in f]) for a in f])
        return d / d[d > 0].mean()

    def angles(f):
        e = F.normalize(f[None, :] - f[:, None], dim=2)
        return e @ e.mT

    return F.smooth_l1_loss(distances(s), distances(t)), F.smooth_l1_loss(angles(s), angles(t))


@pytest.mark.parametrize(
    'n,d_s,d_t', [(5, 3, 7), (7, 20, 4), (4, 30, 50)]
)  # narrow and wide: the wide ones are reduced
def test_rkd_against_the_definition(n, d_s, d_t):
    s, t = rand(n, d_s).requires_grad_(), rand(n, d_t, seed=1)
    r = s.detach().clone().requires_grad_()
    loss = RKD()
    for ours, naive in zip((loss.distance(s, t), loss.angle(s, t)), rkd_naive(r, t)):
        near(ours, naive)
        ours.backward()
        naive.backward()
    near(s.grad, r.grad)


def test_rkd_in_chunks(monkeypatch):
    """The angle term does not depend on how many vertices are treated at once."""
    s, t = rand(70, 6).requires_grad_(), rand(70, 9, seed=1)
    whole = RKD().angle(s, t)
    whole.backward()
    grad, s.grad = s.grad, None
    first = torch.Tensor.__len__
    monkeypatch.setattr('kd_losses.rkd.max', lambda a, b: min(3, first(s)), raising=False)
    pieces = RKD().angle(s, t)
    pieces.backward()
    near(pieces, whole)
    near(s.grad, grad)


def test_rkd_angle_refuses_a_second_derivative():
    s = rand(4, 3).requires_grad_()
    (g,) = torch.autograd.grad(RKD().angle(s, rand(4, 3, seed=1)), s, create_graph=True)
    with pytest.raises(RuntimeError):
        g.sum().backward()


def test_cc_series_tends_to_the_kernel():
    s, t = rand(6, 5), rand(6, 8, seed=1)
    near(CC(P_order=30)(s, t), CC(kernel='rbf')(s, t))
    f = F.normalize(s, dim=1)
    near(
        CC(gamma=0.7, kernel='rbf')(s, t * 0),
        (torch.exp(-0.7 * torch.cdist(f, f) ** 2) - math.exp(-1.4)).square().mean(),
    )


def test_sp_gradient_of_the_short_gram():
    s, t = rand(5, 3, 2, 2).requires_grad_(), rand(5, 4, 2, 2, seed=1)
    SP()(s, t).backward()
    r = s.detach().clone().requires_grad_()
    g_s, g_t = (F.normalize(x.flatten(1) @ x.flatten(1).T, dim=1) for x in (r, t))
    F.mse_loss(g_s, g_t).backward()
    near(s.grad, r.grad)


def pkt_naive(s, t, eps=1e-7):
    p = []
    for f in (s, t):
        u = f / (f.norm(dim=1, keepdim=True) + eps)
        c = (u @ u.T + 1) / 2
        p.append(c / c.sum(dim=1, keepdim=True))
    return (p[1] * torch.log((p[1] + eps) / (p[0] + eps))).mean()


@pytest.mark.parametrize('mean', [0, 1, 10, 100])
def test_pkt_keeps_its_digits_around_a_large_mean(mean):
    """float32 against the plain formula in float64: all cosines are near 1 there."""
    s, t = (rand(32, 16, seed=seed).float() + mean for seed in (0, 1))
    s.requires_grad_()
    r = s.detach().double().requires_grad_()
    loss, expected = PKT()(s, t), pkt_naive(r, t.double())
    loss.backward()
    expected.backward()
    tol = max(1e-4 * mean, 1e-5)
    torch.testing.assert_close(loss.double(), expected, rtol=tol, atol=0)
    torch.testing.assert_close(s.grad.double(), r.grad, rtol=0, atol=tol * float(r.grad.abs().max()))


@pytest.mark.parametrize('n,K', [(5, 4), (5, 30), (1, 3)])
def test_mlkd_class_term_needs_no_square_of_the_classes(n, K):
    """Whichever form is taken, value and gradient are those of the K x K matrices."""
    s, t = 3 * rand(n, K).requires_grad_(), 3 * rand(n, K, seed=1)
    term = MLKD(temps=(2.0,)).terms(s, t)[2]
    p, q = (s / 2).softmax(dim=1), (t / 2).softmax(dim=1)
    expected = (q.T @ q - p.T @ p).square().sum() / K
    near(term, expected)
    near(*(torch.autograd.grad(x, s, retain_graph=True)[0] for x in (term, expected)))
    near(MLKD().terms(t, t)[2], 0.0, 1e-15)


def test_mlkd_memory_is_linear_in_the_classes():
    s, t = torch.randn(4, 100_000).requires_grad_(), torch.randn(4, 100_000)
    with Largest() as largest:
        MLKD()(s, t).backward()
    assert largest.numel <= 4 * s.numel()


@pytest.mark.parametrize('labelled', [0, 3])
def test_mlkd_strong_without_labels(labelled):
    """Its cross-entropy is the mean over the rows that have a label; of none, 0 with gradient 0."""
    target = torch.full((5,), -100)
    target[:labelled] = torch.arange(labelled)
    b = SimpleNamespace(views={'strong': torch.zeros(5, 3, 8, 8)}, target=target)
    weak, strong = rand(5, 4).requires_grad_(), rand(5, 4, seed=1).requires_grad_()
    b.student, b.teacher = (lambda img, out=x: SimpleNamespace(out=out) for x in (strong, rand(5, 4, seed=2)))
    kd = build_strong(MLKD, None, ce=0.2)
    loss = mlkd_feed(kd, SimpleNamespace(out=weak), SimpleNamespace(out=rand(5, 4, seed=3)), b)
    expected = kd(weak, rand(5, 4, seed=3), strong, rand(5, 4, seed=2))
    if labelled:
        expected = expected + F.cross_entropy(strong[:labelled], target[:labelled]) * 0.2
    near(loss, expected)
    near(*(torch.autograd.grad(x, strong)[0] for x in (loss, expected)))


class Largest(TorchDispatchMode):
    """The largest tensor that any operation returns."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            self.numel = max(self.numel, x.numel() if isinstance(x, torch.Tensor) else 0)
        return out


@pytest.mark.parametrize(
    'make',
    [
        lambda: SoftTarget(T=0),
        lambda: DKD(T=-1),
        lambda: AT(p=0),
        lambda: NST('cubic'),
        lambda: NST(d=1.5),
        lambda: CC(kernel='x'),
        lambda: CC(P_order=-1),
        lambda: FitNet(3),
        lambda: VID(2, 2, init_var=1e-6),
        lambda: OFD(2, 2, reduction='sum'),
        lambda: OFD(2, 2, margin=torch.zeros(3)),
    ],
)
def test_wrong_hyperparameters_are_refused(make):
    with pytest.raises(ValueError, match='got'):
        make()


def test_ofd_margin_of_batch_norms_without_parameters():
    """Without weight and bias a channel is N(0, 1): E[x | x < 0] = -sqrt(2 / pi)."""
    near(OFD.margin_from_bn(None, None), -math.sqrt(2 / math.pi), 1e-6)
    near(OFD.margin_from_bn(torch.ones(3), None), torch.full((3,), -math.sqrt(2 / math.pi)), 1e-6)
    bn = torch.nn.BatchNorm2d(4, affine=False)
    ofd = OFD(3, 4, margin=OFD.margin_from_bn(bn.weight, bn.bias))
    assert ofd.margin.shape == (1, 4, 1, 1) and ofd(torch.randn(2, 3, 4, 4), torch.randn(2, 4, 4, 4)) > 0


def test_lskd_needs_three_classes():
    with pytest.raises(ValueError, match='K >= 3.*constant'):
        LSKD()(rand(4, 2), rand(4, 2))


def test_fitnet_refuses_other_sizes():
    with pytest.raises(ValueError, match=r'\(2, 3, 4, 4\).*\(2, 3, 8, 8\)'):
        FitNet()(rand(2, 3, 4, 4), rand(2, 3, 8, 8))
    with pytest.raises(ValueError, match=r'\(2, 6, 4, 4\).*\(2, 5, 4, 4\)'):
        FitNet(3, 6)(rand(2, 3, 4, 4), rand(2, 5, 4, 4))


def test_crd_against_the_definition():
    """Values and gradients by gathered rows and plain autograd; both ways of scoring; the memory update."""
    for n_data, negatives in ((20, 6), (500, 3)):  # scores of the whole memory, and row by row
        torch.manual_seed(0)
        crd = CRD(4, 5, n_data, feat_dim=8).double()
        s, t = rand(3, 4).requires_grad_(), rand(3, 5, seed=1)
        index = torch.tensor([2, 7, 1])
        sample = torch.cat([index[:, None], torch.randint(n_data, (3, negatives))], dim=1)
        e_s, e_t = F.normalize(crd.embed_s(s), dim=1), F.normalize(crd.embed_t(t), dim=1)
        total = 0
        for e, memory in ((e_s, crd.memory_t), (e_t, crd.memory_s)):
            x = torch.exp((memory[sample] @ e[:, :, None])[..., 0] / 0.07)
            x = x / (x.mean() * n_data).detach()
            c = negatives / n_data
            total -= (x[:, 0] / (x[:, 0] + c + 1e-7)).log().sum() / 3
            total -= (c / (x[:, 1:] + c + 1e-7)).log().sum() / 3
        (wanted,) = torch.autograd.grad(total, s)
        updated = F.normalize(0.5 * crd.memory_s[index] + 0.5 * e_s.detach(), dim=1)
        loss = crd(s, t, index, sample)
        loss.backward()
        near(loss, total)
        near(s.grad, wanted)
        near(crd.memory_s[index], updated)
        crd.eval()
        before = crd.memory_s.clone()
        crd(s, t, index, sample)
        assert torch.equal(crd.memory_s, before), 'nothing is remembered in eval mode'


def test_crd_takes_labels_in_any_form():
    labels = [i % 3 for i in range(30)]
    for targets in (labels, np.array(labels), torch.tensor(labels, dtype=torch.int32)):
        crd = CRD(4, 4, 30, targets, nce_n=5)
        assert torch.equal(crd.targets, torch.tensor(labels))
        crd(rand(4, 4).float(), rand(4, 4).float(), torch.arange(4, dtype=torch.int32)).backward()
    for wrong in ([0] * 30, [0, -1] * 15):
        with pytest.raises(ValueError, match='two classes'):
            CRD(4, 4, 30, wrong)


def test_crd_leaves_images_without_a_label_out():
    """-100: never a negative, no row of the loss, not remembered."""
    targets = torch.arange(30) % 3
    targets[[1, 3, 20, 21]] = -100
    crd = CRD(4, 4, 30, targets, nce_n=12).double()
    drawn = crd._draw(torch.arange(5), torch.Generator().manual_seed(0))
    assert not torch.isin(drawn[:, 1:], torch.tensor([1, 3, 20, 21])).any()
    s, t, index = rand(5, 4).requires_grad_(), rand(5, 4, seed=1), torch.arange(5)
    rows = torch.tensor([0, 2, 4])
    part, before = copy.deepcopy(crd), crd.memory_s.clone()
    some = part(s[rows], t[rows], index[rows], drawn[rows])
    whole = crd(s, t, index, drawn)
    near(whole, some)
    (grad,) = torch.autograd.grad(whole, s)
    near(grad, torch.autograd.grad(some, s)[0])
    assert torch.equal(crd.memory_s[[1, 3]], before[[1, 3]]) and not torch.equal(crd.memory_s[0], before[0])
    near(crd.memory_s, part.memory_s)
    near(crd.z_s, part.z_s)
    none = CRD(4, 4, 30, targets, nce_n=12).double()
    value = none(s[[1, 3]], t[[1, 3]], index[[1, 3]])
    assert value == 0 and none.z_s < 0 and not torch.autograd.grad(value, s)[0].any()


def test_pskd_does_not_remember_rows_without_a_label():
    memory, out = PSKD(6, 5).double(), rand(6, 5)
    target = torch.arange(6) % 5
    target[2] = -100
    memory(out, target, torch.arange(6), 0)
    rows = [0, 1, 3, 4, 5]
    near(memory.memory[rows], out.softmax(dim=1)[rows], 1e-6)
    assert not memory.memory[2].any()


def test_gkd_leaves_rows_out_and_shows_what_is_not_finite():
    s, t, y = rand(6, 4), rand(6, 4, seed=1), torch.tensor([0, 1, -100, 3, -100, 1])
    rows = [0, 1, 3, 5]
    near(GKD(T=2.0)(s, t, y), GKD(T=2.0)(s[rows], t[rows], y[rows]))
    near(GKD()(s, t, torch.full((6,), -100)), 0)
    for bad in (math.nan, math.inf):
        for x in (s, t):
            poisoned = [z.clone() if z is x else z for z in (s, t)]
            poisoned[0 if x is s else 1][3, 2] = bad
            assert not GKD()(*poisoned, t.argmax(dim=1)).isfinite()
    with pytest.raises(ValueError, match='got 255'):
        GKD()(s, t, torch.full((6,), 255))


def test_dlb_leaves_rows_without_a_label_out_of_both_batches():
    out, now, then, y = rand(5, 4), rand(3, 4, seed=1), rand(3, 4, seed=2), torch.arange(5) % 4
    y[1], y_prev = -100, torch.tensor([2, -100, 0])
    near(DLB()(out, y, now, then, y_prev),
         DLB()(out[[0, 2, 3, 4]], y[[0, 2, 3, 4]], now[[0, 2]], then[[0, 2]], y_prev[[0, 2]]))  # fmt: skip


def test_crd_draws_negatives_of_other_classes():
    targets = torch.arange(60) % 3
    for negatives in (30, 100):  # enough images of other classes, and not
        crd = CRD(4, 4, 60, targets, nce_n=negatives)
        index = torch.arange(9)
        drawn = crd._draw(index, torch.Generator().manual_seed(0))
        assert drawn.shape == (9, 1 + negatives) and torch.equal(drawn[:, 0], index)
        assert (targets[drawn[:, 1:]] != targets[index][:, None]).all()
        if negatives == 30:
            assert all(len(set(row.tolist())) == 30 for row in drawn[:, 1:]), 'without replacement'
    crd, generator = CRD(4, 4, 60, targets, nce_n=30), torch.Generator().manual_seed(1)
    many = torch.cat([crd._draw(index, generator)[:, 1:].flatten() for _ in range(200)])
    counts = torch.bincount(many, minlength=60)
    assert counts.min() > 0.9 * counts.float().mean(), 'every image is drawn about equally often'


def test_lskd_ignores_shift_and_scale():
    s, t = rand(6, 5), rand(6, 5, seed=1)
    near(LSKD()(3 * s + 7, 0.2 * t - 1), LSKD()(s, t), 1e-5)


def test_dist_ignores_affine_changes_of_probabilities():
    """Pearson distance: any teacher row a p + b is as good as p."""
    p = F.softmax(rand(6, 5), dim=1)
    inter, _ = DIST(tau=1.0).terms(p.log(), (0.5 * p + 0.1).log())
    near(inter, 0.0, 1e-6)
    assert DIST(tau=1.0)(p.log(), (0.5 * p.flip(1) + 0.1).log()) > 0.1


def test_ttm_with_l_1_is_soft_targets_at_1():
    s, t = rand(6, 5), rand(6, 5, seed=1)
    near(TTM(l=1.0)(s, t), SoftTarget(T=1.0)(s, t))
    near(TTM(l=1.0, weighted=True)(s, t), SoftTarget(T=1.0)(s, t))


def test_ofakd_with_eps_1_is_cross_entropy_with_the_teacher():
    s, t = rand(6, 5), rand(6, 5, seed=1)
    wanted = -(F.softmax(t, 1) * F.log_softmax(s, 1)).sum(1).mean()
    near(OFAKD()(s, t, torch.arange(6) % 5), wanted)


def test_ofa_exits_give_logits():
    for stage, size in ((1, 32), (2, 32), (3, 16), (4, 8)):
        assert OFAExit(6, stage, 24, 10)(torch.randn(2, 6, size, size)).shape == (2, 10)


def test_kdsvd_does_not_depend_on_scale_or_degenerate_maps():
    s = [rand(3, 4, 5, 5, seed=i).relu() for i in range(3)]
    t = [rand(3, 4, 6, 6, seed=i + 9).relu() for i in range(3)]
    near(KDSVD()([5 * x for x in s], [0.1 * x for x in t]), KDSVD()(s, t), 1e-8)
    constant = [torch.ones_like(x).requires_grad_() for x in s]  # all singular values but one vanish
    KDSVD(k=2)(constant, t).backward()
    assert all(torch.isfinite(x.grad).all() for x in constant)


# ------------------------------------------------------- two phases, gradients, attacks, changed students


def test_fsp_and_ft_are_zero_for_equal_maps_and_ft_ignores_scale():
    a, b = rand(4, 3, 6, 6), rand(4, 5, 3, 3, seed=1)
    for pool in ('avg', 'max'):
        near(FSP(pool)(a, b, a, b), 0)
        assert FSP(pool)(a, b, a, 2 * b) > 1e-3
    near(FT()(a, 7 * a), 0)
    near(FT()(a, -a), 2 * F.normalize(a.flatten(1), dim=1).abs().mean())
    near(FSP()(a, b, a.flip(0), b.flip(0)), FSP()(a.flip(0), b.flip(0), a, b))


def test_ab_only_cares_for_the_side():
    t = rand(4, 3, 5, 5)
    loss = AB(margin=0.5)
    near(loss(t.sign() * 0.5001, t), 0)  # beyond the margin on the right side
    near(loss(torch.zeros_like(t), t), 0.25)
    near(loss(-t.sign(), t), 1.5**2)
    s = rand(4, 3, 5, 5, seed=1)
    near(loss(s, t), loss(s, 100 * t))


def test_lwm_sees_the_last_stage_and_ignores_scale():
    """Grad-CAM before average pooling and a linear layer: a known zoo's wrong map is 0 there."""
    W, y = rand(5, 3), torch.arange(4)
    maps = [rand(4, 3, 6, 6, seed=k).requires_grad_() for k in (1, 2)]
    outs = [fm.mean(dim=(2, 3)) @ W.T for fm in maps]
    assert LwM()(outs[0], maps[0], outs[1], maps[1], y) > 1e-3
    near(LwM()(outs[0], maps[0], outs[0], maps[0], y), 0)
    near(grad_cam(outs[0], maps[0], y), (W[y][:, :, None, None] * maps[0]).sum(dim=1).relu() / 36)
    with pytest.raises(ValueError, match='require grad'):
        LwM()(outs[0], maps[0], outs[1].detach(), maps[1], y)
    fine, coarse = maps[0], F.avg_pool2d(maps[1], 2)
    assert LwM()(outs[0], fine, coarse.mean(dim=(2, 3)) @ W.T, coarse, y).isfinite()


def test_sobolev_ignores_the_size_of_the_gradient():
    img, y = rand(4, 6).requires_grad_(), torch.arange(4)
    out = (img @ rand(6, 5, seed=1)).tanh()
    near(Sobolev()(out, 3 * out, img, y), 0)
    near(Sobolev()(out, -out, img, y), 4 / 6)  # opposite unit vectors, mean over six pixels
    with pytest.raises(ValueError, match='requires_grad_'):
        Sobolev()(out.detach(), out, img, y)
    dead = out * 0
    loss = Sobolev()(dead, out, img, y)
    assert loss.isfinite() and torch.autograd.grad(loss, img)[0].isfinite().all()


@pytest.mark.parametrize('score', ['logit', 'prob'])
def test_bss_attacks_reach_the_boundary(score):
    W = rand(2, 12)

    def model(x):
        return x @ W.T

    img = rand(64, 12, seed=1)
    target = model(img).argmax(dim=1)
    attacker = BSSAttacker(num_steps=300, clip=(-50, 50), score=score)
    attacked = attacker.attack(model, img, target, 1 - target)
    gaps = [(z[:, 0] - z[:, 1]).abs() for z in (model(img), model(attacked))]
    assert gaps[1].mean() < gaps[0].mean() / 4 and not attacked.requires_grad
    untouched = attacker.attack(model, img, 1 - target, target)  # not seen as its class: nothing to do
    near(untouched, img)


def test_bss_survives_everything():
    out = 60 * torch.eye(5, dtype=torch.float64)  # saturated: the probability's gradient underflows
    W = (300 * torch.eye(5)).requires_grad_()
    img = torch.eye(5)
    classes = torch.arange(5)
    attacked = BSSAttacker(score='prob').attack(lambda x: x @ W, img, classes, classes.roll(1))
    assert attacked.isfinite().all() and W.grad is None
    wrong = torch.arange(5).roll(1)
    assert len(select_base_samples(out, out, wrong, 3)) == 0
    empty = BSS()(out[:0].requires_grad_(), out[:0])
    assert empty == 0 and empty.requires_grad
    one = select_base_samples(out[:1], out[:1], torch.tensor([0]), 3)
    assert one.tolist() == [0]
    few = select_base_samples(out, out, torch.tensor([0, 1, 9, 9, 4]), 5)
    assert few.tolist() == [0, 1, 4], 'fewer candidates than slots: by index'
    images, valid = BSS(attack_size=4).attack(lambda x: x @ W, img, out, out, wrong)
    assert images.shape == (4, 5) and not valid.any()
    assert BSS()(rand(4, 5).requires_grad_(), rand(4, 5), valid) == 0


def test_bss_draws_classes_by_probability():
    out = torch.tensor([[5.0, 1.0, 2.0, 0.0]], dtype=torch.float64)
    p = out.softmax(dim=1)[0]
    u = torch.linspace(0, 1 - 1e-9, 20001, dtype=torch.float64)
    classes = sample_attack_class(out.expand(20001, -1), torch.arange(20001), u)
    share = torch.bincount(classes, minlength=4) / 20001
    near(share[1:], p[1:] / p[1:].sum(), 1e-3)
    assert share[0] == 0


def test_quest_k_means_finds_clusters():
    centres = 10 * rand(4, 3)
    x = (centres[:, None] + 0.1 * rand(4, 50, 3, seed=1)).flatten(0, 1)
    best = None
    for seed in range(5):
        c = fit_centroids(x, 4, generator=torch.Generator().manual_seed(seed))
        error = torch.cdist(x, c).min(dim=1).values.square().mean()
        best = error if best is None else min(best, error)
    near(best, 0.03, 0.01)
    with pytest.raises(ValueError, match='need as many features'):
        fit_centroids(x[:3], 4)
    loss = QuEST(2, 3, 4, centroids=centres.float()).double()
    s, t = rand(2, 2, 3, 3), rand(2, 3, 3, 3, seed=2)
    p = (-5 * torch.cdist(t.permute(0, 2, 3, 1).reshape(-1, 3), loss.centroids).square()).softmax(dim=1)
    w = F.normalize(loss.weight, dim=1)
    q = (loss.scale * F.normalize(s.permute(0, 2, 3, 1).reshape(-1, 2), dim=1) @ w.T).log_softmax(dim=1)
    near(loss(s, t), F.kl_div(q, p, reduction='batchmean'), 1e-6)
    near(loss(s, F.interpolate(t, scale_factor=2)), loss(s, t), 1e-6)


def test_vkd_stays_orthonormal_while_it_learns():
    for s_dim, t_dim in ((4, 7), (7, 4), (5, 5)):
        loss = VkD(s_dim, t_dim)
        opt = torch.optim.SGD(loss.parameters(), 0.5)
        s, t = torch.randn(9, s_dim), torch.randn(9, t_dim)
        first = float(loss(s, t))
        for _ in range(20):
            opt.zero_grad()
            loss(s, t).backward()
            opt.step()
        W = loss.projection.weight
        gram = W.T @ W if t_dim >= s_dim else W @ W.T
        torch.testing.assert_close(gram, torch.eye(min(s_dim, t_dim)), atol=1e-5, rtol=0)
        assert float(loss(s, t)) < first


def test_norm_and_catkd_and_simkd():
    t = rand(3, 4, 6, 6)
    near(NORM(1)(t, t), 0)
    s = rand(3, 8, 3, 3, seed=1)
    near(NORM(2)(s, t), sum(F.mse_loss(s[:, 4 * r : 4 * r + 4], F.max_pool2d(t, 2)) for r in (0, 1)))
    transform = FeatureTransform(4, 4, 1)
    assert all(torch.equal(a, t) for a in transform(t)) and not list(transform.parameters())
    block = FeatureTransform(4, 5, 3).double().eval()
    x = rand(2, 4, 3, 3, seed=2)
    flat = block(x)[1].permute(0, 2, 3, 1).reshape(-1, 4)
    inputs = torch.cat([x.permute(0, 2, 3, 1).reshape(-1, 4), torch.ones(18, 1, dtype=x.dtype)], dim=1)
    near(inputs @ torch.linalg.lstsq(inputs, flat).solution, flat, 1e-8)  # one affine map in use

    cam = rand(3, 5, 4, 4)
    near(CATKD()(cam, 9 * cam), 0)
    near(CATKD(normalize=False)(cam, 2 * cam), F.adaptive_avg_pool2d(cam, 2).square().mean())
    fm, W = rand(2, 3, 4, 4), rand(5, 3, seed=1)
    near(to_cam(fm, W).mean(dim=(2, 3)), fm.mean(dim=(2, 3)) @ W.T)

    loss = SimKD(3, 4).double().eval()
    fm_s, fm_t = rand(2, 3, 8, 8), rand(2, 4, 4, 4, seed=1)
    loss(fm_s, fm_t)
    layer = torch.nn.Linear(4, 6).double()
    near(loss.predict(fm_s, layer), layer(loss.project(fm_s, (4, 4)).mean(dim=(2, 3))))
    fresh = SimKD(3, 4).double().eval()
    fresh.load_state_dict(loss.state_dict())  # the size of the teacher's map survives
    near(fresh.predict(fm_s, layer), loss.predict(fm_s, layer))


def test_semckd_attends_to_all_teacher_layers():
    loss = SemCKD([3, 4], [5, 6, 7], 6, factor=4).double()  # 6 // 4: a width of one
    s = [rand(6, 3, 8, 8), rand(6, 4, 4, 4)]
    t = [rand(6, 5, 8, 8, seed=1), rand(6, 6, 6, 6, seed=1), rand(6, 7, 2, 2, seed=1)]
    w, m = loss.terms(s, t)
    assert w.shape == m.shape == (6, 2, 3)
    near(w.sum(dim=2), torch.ones(6, 2))
    with torch.no_grad():
        for net in [*loss.query, *loss.key]:
            for p in net.parameters():
                p.zero_()
    near(loss.terms(s, t)[0], torch.full((6, 2, 3), 1 / 3, dtype=torch.float64))


def test_fcfd_leaves_the_running_statistics_alone():
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    before = copy.deepcopy(net.state_dict())
    with ghost_statistics(net):
        net(torch.randn(5, 3, 6, 6))
    assert torch.equal(net[1].running_mean, before['1.running_mean'])
    assert torch.equal(net[1].running_var, before['1.running_var'])
    net(torch.randn(5, 3, 6, 6))
    assert not torch.equal(net[1].running_mean, before['1.running_mean'])
    for ratio, size in ((1, 8), (2, 4), (0.5, 16)):
        loss = FCFD([3], [5], [ratio])
        assert loss.to_teacher(torch.randn(2, 3, 8, 8), 1).shape == (2, 5, size, size)
        assert loss.to_student(torch.randn(2, 5, size, size), 1).shape == (2, 3, 8, 8)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_adain_takes_a_tail_of_any_precision(dtype):
    s, t, out_t = (x.float() for x in (rand(2, 4, 3, 3), rand(2, 4, 3, 3, seed=1), rand(2, 5)))
    s.requires_grad_()
    tail = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(36, 5)).to(dtype)
    loss = AdaINKD()(s, t.to(dtype), out_t.to(dtype), tail)
    loss.backward()
    assert loss.dtype == torch.float32
    near(loss, AdaINKD()(s, t.to(dtype).float(), out_t.to(dtype).float(), tail.float()), 1e-6)


def test_adain_is_zero_for_equal_statistics():
    fm = rand(3, 4, 5, 5)
    shuffled = fm.flatten(2)[:, :, torch.randperm(25)].unflatten(2, (5, 5))  # other pixels, same statistics
    W = rand(6, 4)

    def tail(x):
        return x.relu().mean(dim=(2, 3)) @ W.T

    near(AdaINKD()(shuffled, fm, tail(fm), tail), 0)
    assert AdaINKD()(2 * shuffled, fm, tail(fm), tail) > 1e-3


# ------------------------------------------------------------------------------- temperatures and optimisers


def test_ctkd_climbs_where_the_student_descends():
    s, t = rand(6, 5), rand(6, 5, seed=1)
    loss = CTKD().double()
    assert [round(cosine_lambda(e), 6) for e in (0, 5, 10, 50)] == [0, 0.5, 1, 1]
    loss(s, t, 0.0).backward()
    near(loss.theta.grad, torch.zeros(1))
    plain = loss.theta.detach().clone().requires_grad_()
    T = 1 + 20 * torch.sigmoid(plain)
    value = F.kl_div((s / T).log_softmax(dim=1), (t / T).softmax(dim=1), reduction='batchmean') * T.square()
    value.sum().backward()
    loss.theta.grad = None
    loss(s, t, 0.7).backward()
    near(loss.theta.grad, -0.7 * plain.grad)
    near(loss(s, t, 0.3), SoftTarget(T=float(loss.temperature))(s, t), 1e-6)


def test_dot_without_delta_is_sgd():
    def train(step):
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3)).double()
        for k in range(4):
            x = rand(7, 4, seed=k)
            out = net(x)
            step(net, F.cross_entropy(out, torch.arange(7) % 3), out.square().mean())
        return torch.cat([p.flatten() for p in net.parameters()])

    made = {}

    def dot(net, task, kd):
        opt = made.setdefault('dot', DOT(net.parameters(), 0.1, delta=0.0, weight_decay=0.01))
        dot_update(opt, task, kd, 0)

    def sgd(net, task, kd):
        opt = made.setdefault('sgd', torch.optim.SGD(net.parameters(), 0.1, momentum=0.9, weight_decay=0.01))
        opt.zero_grad()
        (task + kd).backward()
        opt.step()

    near(train(dot), train(sgd))
    for wrong in ({'delta': 0.2}, {'delta': -0.1}, {'momentum': 0.05, 'delta': 0.1}):
        with pytest.raises(ValueError, match='delta'):
            DOT([torch.zeros(2, requires_grad=True)], 0.1, **wrong)


def test_dot_is_copied_and_pickled():
    p = torch.ones(3, requires_grad=True)
    opt = DOT([p], 0.1)
    for _ in range(2):
        dot_update(opt, p.square().sum(), p.sum(), 0)
    for other in (copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))):
        (q,) = other.param_groups[0]['params']
        assert torch.equal(q, p) and q is not p
        dot_update(other, q.square().sum(), q.sum(), 0)
    dot_update(opt, p.square().sum(), p.sum(), 0)
    assert torch.equal(q, p)


def test_dot_refuses_a_gradient_scaler():
    """Its distillation gradients would stay scaled; a scaler that is switched off is no scaler."""
    for enabled, unscaled in ((True, False), (True, True), (False, False)):
        p = torch.ones(3, requires_grad=True)
        opt, scaler = DOT([p], 0.1), torch.amp.GradScaler('cpu', init_scale=1024.0, enabled=enabled)
        scaler.scale(p.sum()).backward()
        opt.step_kd()
        opt.zero_grad()
        scaler.scale(p.square().sum()).backward()
        if unscaled:
            scaler.unscale_(opt)
        if enabled:
            with pytest.raises(RuntimeError, match='GradScaler.*bfloat16'):
                scaler.step(opt)
        else:
            scaler.step(opt)
            near(p.detach(), torch.full((3,), 1 - 0.1 * (1 + 2.0)), 1e-6)


# ------------------------------------------------------------------------- peers and self-distillation


def test_equal_peers_learn_nothing_from_each_other():
    out = rand(6, 5)
    near(DML()(out, [out, out.clone()]), 0)
    a, b = rand(6, 5, seed=1), rand(6, 5, seed=2)
    near(DML('sum')(out, [a, b]), 2 * DML()(out, [a, b]))
    near(DML()(out, a), SoftTarget(T=1.0)(out, a))
    target = torch.arange(6) % 5
    hard, soft = DCM().terms([out, a], [out, a], target)
    near(soft, 2 * (SoftTarget(T=1.0)(out, a) + SoftTarget(T=1.0)(a, out)), 1e-6)
    near(hard, 2 * (F.cross_entropy(out, target) + F.cross_entropy(a, target)))


def test_kdcl_combinations():
    outs, y = rand(3, 8, 5), torch.arange(8) % 5
    low = KDCL().combine(outs, y)
    near(low.gather(1, y[:, None]), torch.zeros(8, 1))
    assert all((low <= z - z.gather(1, y[:, None]) + 1e-12).all() for z in outs)
    ce = torch.stack([F.cross_entropy(z, y, reduction='none') for z in outs])
    near(F.cross_entropy(KDCL('naive').combine(outs, y), y, reduction='none'), ce.min(dim=0).values)
    two = outs[:2]
    mixed = F.cross_entropy(KDCL('linear').combine(two, y), y, reduction='none')
    grid = torch.stack([F.cross_entropy(a * two[0] + (1 - a) * two[1], y, reduction='none')
                        for a in torch.linspace(0, 1, 1001, dtype=torch.float64)])  # fmt: skip
    near(mixed, grid.min(dim=0).values, 1e-4)
    for scale in 1, 3, 10, 30:  # one network alone is a combination, too
        mixed = F.cross_entropy(KDCL('linear').combine(scale * outs, y), y, reduction='none')
        alone = torch.stack([F.cross_entropy(scale * z, y, reduction='none') for z in outs])
        assert (mixed <= alone.min(dim=0).values + 1e-12).all()
    weights = general_weights(outs.softmax(dim=2), F.one_hot(y, 5))
    near(weights.sum(), 1)
    assert general_weights(torch.stack([outs[0]] * 2).softmax(dim=2), F.one_hot(y, 5)).isfinite().all()


def test_one_and_okddip_ensembles():
    outs, feat, y = rand(3, 6, 5), rand(6, 4, seed=1), torch.arange(6) % 5
    loss = ONE(4).double()
    loss(outs, feat, y)
    assert ((loss.ensemble <= outs.amax(dim=0) + 1e-9) & (loss.ensemble >= outs.amin(dim=0) - 1e-9)).all()
    assert loss(outs[:, :1], feat[:1], y[:1]).isfinite(), 'a batch of one'
    peers = OKDDip(4).double()
    feats = rand(3, 6, 4, seed=2)
    near(peers.attention(feats).sum(dim=2), torch.ones(6, 3))
    same = torch.stack([outs[0]] * 3)
    near(peers.targets(same, feats)[:, :, 1], outs[0])
    leaf = outs.clone().requires_grad_()
    OKDDip(4, detach=True).double()(leaf, feats, rand(6, 5, seed=3), y).backward()
    assert leaf.grad is not None


def test_self_distillation_at_its_limits():
    out, y, index = rand(6, 5), torch.arange(6) % 5, torch.arange(6)
    ce = F.cross_entropy(out, y)
    near(CSKD()(out, out), 0)
    near(DLB()(out, y), ce)  # the first step
    now, then = rand(4, 5, seed=1), rand(4, 5, seed=2)
    both = F.cross_entropy(torch.cat([now, out]), torch.cat([y[:4], y]))
    near(DLB(T=2.0)(out, y, now, then, y[:4]), both + SoftTarget(T=2.0)(now, then))
    near(pskd_loss(out, rand(6, 5), y, 0.0), ce)
    memory = PSKD(6, 5, alpha_T=0.8, total_epochs=10).double()
    near(memory(out, y, index, 0), ce)  # nothing is remembered yet
    near(memory.memory, out.softmax(dim=1), 1e-6)
    other = rand(6, 5, seed=3)
    expected = pskd_loss(other, out.softmax(dim=1), y, 0.8 * 6 / 10)
    near(memory.eval()(other, y, index, 5), expected, 1e-6)
    near(memory.memory, out.softmax(dim=1), 1e-6)  # nothing is remembered in eval mode
    smooth = TfKDReg(alpha=1.0, variant='paper', T=1.0, correct_prob=0.7)(out, y)
    p = torch.full((6, 5), 0.3 / 4, dtype=torch.float64).scatter(1, y[:, None], 0.7)
    near(smooth, F.kl_div(out.log_softmax(dim=1), p, reduction='batchmean'))
    own = TfKDSelf(T=2.0, alpha=0.5, multiplier=5.0)(out, other, y)
    near(own, 0.5 * ce + 0.5 * SoftTarget(T=2.0)(out, other))
    feats = rand(6, 3)
    near(DDGSD()(out, out, feats, feats, y), 2 * ce)
    near(DGKD(drop=0)(out, [other], y), 0.4 * ce + 0.6 * SoftTarget(T=5.0)(out, other))
    kept = [int(DGKD(drop=2)._draw(4, 'cpu', None).sum()) for _ in range(20)]
    assert kept == [2] * 20 and DGKD(drop=9)._draw(3, 'cpu', None).sum() == 1


def test_sad_enlarges_the_deeper_attention():
    fm, deep = rand(2, 3, 8, 8), rand(2, 5, 4, 4, seed=1)
    near(SAD()(fm, fm), 0)
    energy = deep.square().sum(dim=1, keepdim=True)
    energy = F.interpolate(energy, size=(8, 8), mode='bilinear', align_corners=False)
    expected = F.mse_loss(fm.square().sum(dim=1).flatten(1).softmax(dim=1), energy.flatten(1).softmax(dim=1))
    near(SAD()(fm, deep), expected)
    near(SAD()(1e3 * fm, 1e3 * fm), 0)


def test_sla_aggregates_rotations():
    img = rand(2, 3, 4, 4)
    turned = rotations(img)
    assert torch.equal(turned[0], img[0]) and torch.equal(turned[4], img[1])
    assert torch.equal(turned[1], img[0].rot90(1, (1, 2))) and torch.equal(turned[3].rot90(1, (1, 2)), img[0])
    joint = rand(8, 20)
    agg = SLA().aggregate(joint)
    for n in range(2):
        for k in range(5):
            near(agg[n, k], sum(joint[4 * n + j, 4 * k + j] for j in range(4)) / 4)


def test_uskd_ranks_all_classes():
    loss = USKD(3, 4).double()
    out = torch.tensor([[4.0, 3.0, 2.0, 1.0]], dtype=torch.float64)
    with torch.no_grad():
        for p in loss.parameters():
            p.zero_()
    z = loss._ranks(out.log_softmax(dim=1), torch.zeros(1, 4, dtype=torch.float64), torch.tensor([1]),
                    torch.tensor([[False, True, False, False]]))  # fmt: skip
    expected = torch.tensor([[1, 0, 1 / 3, 1 / 4]], dtype=torch.float64)
    near(z, expected / expected.sum())


def test_onadvfd_adversaries_tell_maps_dot_update():
    torch.manual_seed(0)
    rivals = Adversaries([4, 6])
    fms = [torch.randn(16, 4, 8, 8).requires_grad_(), (3 + torch.randn(16, 6, 8, 8)).requires_grad_()]
    opt = torch.optim.Adam(rivals.parameters(), 1e-2)
    first = float(rivals.d_loss(fms))
    for _ in range(30):
        opt.zero_grad()
        rivals.d_loss(fms).backward()
        opt.step()
    assert all(fm.grad is None for fm in fms) and float(rivals.d_loss(fms)) < first / 3
    rivals.g_loss(fms).backward()
    assert all(fm.grad.abs().max() > 0 for fm in fms)


def test_mhgd_against_a_slow_second_form():
    """Singular vectors by numpy, one sample, one head, one row at a time."""
    dims, N, heads = [3, 5], 4, 2
    s, t = ([rand(N, c, 6, 5, seed=k + c) for c in dims] for k in (0, 10))
    torch.manual_seed(0)
    loss = MHGD(dims, heads).double()
    loss.pretrain_loss(t)  # moves the batch norms' statistics
    vectors = {}
    for side, maps in (('t', t), ('s', s)):
        for level, fm in enumerate(maps):
            rows = []
            for n in range(N):
                right = np.linalg.svd(fm[n].flatten(1).T.numpy())[2]
                if side == 't':
                    v = right[0] * np.sign(right[0][np.abs(right[0]).argmax()])
                else:
                    cosine = right[:4] @ vectors['t', level][n]
                    best = np.abs(cosine).argmax()
                    v = right[best] * np.sign(cosine[best])
                rows.append(v)
            vectors[side, level] = np.stack(rows)

    def layer(module, x):
        linear, norm = module
        y = x @ linear.weight.detach().numpy().T + linear.bias.detach().numpy()
        mean, var = norm.running_mean.numpy(), norm.running_var.numpy()
        return (y - mean) / np.sqrt(var + norm.eps)

    expected = 0.0
    graphs = {}
    for side in 'st':
        q, k = layer(loss.query[0], vectors[side, 1]), layer(loss.key[0], vectors[side, 0])
        width = q.shape[1] // heads
        for h in range(heads):
            part = slice(h * width, (h + 1) * width)
            graphs[side, h] = np.tanh(q[:, part] @ k[:, part].T)
    for h in range(heads):
        for n in range(N):
            p, g = (np.exp(graphs[side, h][n]) / np.exp(graphs[side, h][n]).sum() for side in 'st')
            expected += (p * (np.log(p) - np.log(g))).sum()
    near(loss(s, t), expected, 1e-8)
    near(loss(t, t), 0)
    assert loss.training and loss.query[0][1].training, 'the modes are put back'
    long, short = [torch.full((3,), 10.0)], [torch.full((3,), 1.0)]
    near(clipped(long, short, 0)[0].norm(), 0.5 * short[0].norm(), 1e-5)
    near(clipped(short, long, 100)[0], short[0])


def test_equal_numbers_have_no_deviation():
    """In float32 their mean is off by a rounding, which is neither a direction nor a scale."""
    from kd_losses import crosskd, pkd, rsd, srd, wkd
    from kd_losses.scalekd import _without_mean

    torch.manual_seed(0)
    for value in (0.1, 33.3, 3333.3):
        fm = torch.full((2, 3, 5, 7), value)
        assert (pkd._by_deviation(fm) == 0).all() and (crosskd._moments(fm)[1] == 0).all()
        rows = torch.full((9, 4), value)
        assert (rsd._standard_columns(rows) == 0).all()
        assert (srd.SRD(4, 4, mode='corr').bn(rows) == 0).all()
        assert (_without_mean(torch.full((2, 9, 4), value)) == 0).all()
        feats = torch.randn(3, 6, 8)
        feats[1] = value
        cost = wkd.cka_cost(feats, 0)
        assert cost[1, 0] == cost[1, 2] == 1
