"""What the losses of several teachers, of graphs and of foundation models promise; slow second forms."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from kd_losses.aekd import AEKD
from kd_losses.camkd import CAMKD, FeatureAdapters
from kd_losses.ebkd import EBKD
from kd_losses.mkd_avg import MultiTeacherKD
from kd_losses.st import SoftTarget


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
