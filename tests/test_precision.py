"""Float32 beside float64 for a student that is almost its teacher; autocast around losses."""

import pytest
import torch
from torch import nn

from ka_losses.cfl import mmd
from ka_losses.fedka import saliency
from ka_losses.soka import GradNorm
from kd_losses.ctkd import CTKD
from kd_losses.deep_geometric_graphs import GraphKD
from kd_losses.kdsvd import KDSVD
from kd_losses.lwm import LwM
from kd_losses.mhgd import MHGD
from kd_losses.nst import NST
from kd_losses.pkt import PKT
from kd_losses.skds import PairWise
from kd_losses.sobolev import Sobolev


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def graphs(fm_s, fm_t):
    torch.manual_seed(0)
    return MHGD([8, 8], num_heads=2).to(fm_s)([fm_s, fm_s.flip(1)], [fm_t, fm_t.flip(1)])


def vectors(fm_s, fm_t):
    return KDSVD(k=2)([fm_s, fm_s.flip(1)], [fm_t, fm_t.flip(1)])


LOSSES = {  # loss, how far the value and the gradient may be
    'cfl': (lambda s, t: mmd(s, t, (0.001, 0.01)), 1e-3, 1e-3),
    'deep_geometric_graphs': (lambda s, t: GraphKD()([s], [t]), 1e-3, 1e-2),
    'kdsvd': (vectors, 1e-3, 1e-2),
    'mhgd': (graphs, 1e-2, 5e-2),
    'nst': (NST('gaussian'), 1e-3, 1e-3),
    'pkt': (lambda s, t: PKT()(s.flatten(1), t.flatten(1)), 2e-2, 2e-2),
    'skds': (PairWise(0.25), 1e-3, 1e-3),
}


@pytest.mark.parametrize('name', LOSSES)
def test_near_the_teacher(name):
    loss, value, slope = LOSSES[name]
    fm_t = draw(16, 8, 4, 4).relu()
    fm_s = fm_t + 1e-4 * draw(16, 8, 4, 4, seed=1)
    found = []
    for dtype in torch.float64, torch.float32:
        x = fm_s.to(dtype).requires_grad_()
        got = loss(x, fm_t.to(dtype))
        assert got.dtype == dtype
        got.backward()
        found.append((got.detach().double(), x.grad.double()))
    (wanted, gradient), (got, its) = found
    assert (got - wanted).abs() <= value * wanted.abs(), (got, wanted)
    assert (its - gradient).norm() <= slope * gradient.norm()


def test_the_temperature_of_ctkd_near_the_teacher():
    """What it learns had the wrong sign there: the sum of roundings."""
    out_t = 15 * draw(64, 100)
    out_s, found = out_t + 1e-3 * draw(64, 100, seed=1), []
    for dtype in torch.float64, torch.float32:
        loss = CTKD().to(dtype)
        loss(out_s.to(dtype), out_t.to(dtype), 1.0).backward()
        found.append(loss.theta.grad.double())
    torch.testing.assert_close(found[1], found[0], rtol=0.05, atol=0)


def head(width=48, classes=5):
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(width, 16), nn.Tanh(), nn.Linear(16, classes))


def lwm():
    fm_s, fm_t = (draw(4, 3, 4, 4, seed=k).requires_grad_() for k in range(2))
    out_s, out_t, loss = head()(fm_s), head()(fm_t), LwM()
    return lambda: loss(out_s, fm_s, out_t, fm_t, torch.arange(4))


def sobolev():
    img, loss = draw(4, 3, 4, 4).requires_grad_(), Sobolev()
    out_s, out_t = head()(img), head()(2 * img)
    return lambda: loss(out_s, out_t, img, torch.arange(4))


def soka():
    net, img = head(), draw(4, 3, 4, 4)
    losses = torch.stack([net(img).square().mean(), net(img).exp().mean()])
    balance = GradNorm(2)
    return lambda: balance(losses, net[1].weight)


def fedka():
    fm = draw(4, 3, 4, 4).requires_grad_()
    out = head()(fm)
    return lambda: saliency(fm, out)


@pytest.mark.parametrize('make', [lwm, sobolev, soka, fedka])
def test_autocast_around_a_loss_that_asks_for_gradients(make):
    plain = make()()
    loss = make()
    with torch.autocast('cpu', torch.bfloat16):
        inside = loss()
    assert torch.equal(plain, inside)
