"""What the papers promise, and independent slow forms of what the files compute cleverly."""

import math

import pytest
import torch
import torch.nn.functional as F

from kd_losses import (
    AT,
    CC,
    CRD,
    DIST,
    DKD,
    KDSVD,
    LSKD,
    METHODS,
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
from kd_losses.ofakd import OFAExit
from tests.test_contract import build, call, relay, world


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
    'mgd': 'draws a mask per sample',
    'semckd': 'its attention reads rows of an N x N matrix',
}


@pytest.mark.parametrize(
    'name', [n for n, m in sorted(METHODS.items()) if n not in ORDERED and not m.prepare]
)
def test_order_of_the_batch_does_not_matter(name):
    w, v = world(name, dtype=torch.float64), world(name, dtype=torch.float64)
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
