"""On Apple's GPU, which a script takes where there is one: no loss needs what it lacks (tests/apple.py)."""

import pytest
import torch
from torch.testing import assert_close

from kd_losses.aekd import AEKD
from kd_losses.ofd import OFD
from kd_losses.rkd import RKD
from methods import METHODS
from models import slimming
from tests import test_contract, test_dfkd_contract, test_ka_contract, test_tokens
from tests.apple import APPLE, Apple, Dispatch, Names, send
from tests.methods.shared import seed
from transferability import knowledge


def agree(there, here) -> None:
    assert isinstance(there, Apple), 'the loss left the device'
    assert_close(there.near.detach(), here.detach(), rtol=1e-4, atol=1e-5)


def test_the_stand_in_can_fail():
    x = send(torch.randn(3, 3, requires_grad=True))
    assert str(x.device) == 'mps' and isinstance((x @ x).sum(), Apple) and (x.cpu() * 1).device.type == 'cpu'
    with Names(), Dispatch():
        assert str(torch.zeros(2, device=x.device).device) == 'mps'
        agree(torch.as_tensor([2, 5], device='mps'), torch.tensor([2, 5]))
        (x * x + 1).sum().backward()
        agree(x.grad, 2 * x.near)
    for wrong in (
        lambda: x.double(),
        lambda: x + torch.ones(3, 3),
        lambda: torch.linalg.eigh(x),
        lambda: send(torch.nn.Linear(2, 2).double()),
        lambda: torch.arange(3.0, device='mps', dtype=torch.float64),
    ):
        with Names(), Dispatch(), pytest.raises((TypeError, RuntimeError), match='mps'):
            wrong()


@pytest.mark.parametrize('name', test_contract.ROWS)
def test_rows(name):
    w = test_contract.inputs(name)
    here = test_contract.call(name, test_contract.build(name, w), w)
    here.backward()
    w = test_contract.inputs(name)
    kd = send(test_contract.build(name, w))
    w.s, w.t, w.other = send(w.s), send(w.t), send(w.other)
    w.b.all_t = [w.t, w.t]
    for key in ('net_s', 'net_t', 'img', 'target', 'index', 'views'):
        setattr(w.b, key, send(getattr(w.b, key)))
    w.b.teacher, w.b.exact, w.b.nets_t = w.b.net_t, w.b.net_t, [w.b.net_t, w.b.net_t]
    with Names(), Dispatch():
        if not METHODS[name].own.peers:
            test_contract.connect(name, w)
        if METHODS[name].own.once_per_batch:
            w.b.from_teacher = METHODS[name].own.once_per_batch(w.b.net_t, w.t, w.b)
        there = test_contract.call(name, kd, w)
        torch.autograd.backward(there)
    agree(there, here)


@pytest.mark.parametrize(
    'contract, name',
    [(test_ka_contract, name) for name in test_ka_contract.CASES]
    + [(test_dfkd_contract, name) for name in test_dfkd_contract.CASES],
)
def test_other_losses(contract, name):
    here = contract.Made(name)
    seed(0)
    value = here()
    made = contract.Made(name)
    made.loss, made.inputs = send(made.loss), send(made.inputs)
    if isinstance(getattr(made, 'call', None), torch.nn.Module):
        made.call = made.loss
    seed(0)
    with Names(), Dispatch():
        there = made()
        torch.autograd.backward(there)
    agree(there, value)


@pytest.mark.parametrize('name', test_tokens.ALL)
def test_losses_of_tokens(name):
    here = test_tokens.ALL[name]()(*test_tokens.batch())
    loss = test_tokens.ALL[name]()
    if isinstance(loss, torch.nn.Module):
        loss = send(loss)
    elif not isinstance(loss, type(test_tokens.lm_term)):
        vars(loss).update(send(vars(loss)))
    with Names(), Dispatch():
        there = loss(*send(test_tokens.batch()))
        torch.autograd.backward(there)
    agree(there, here)


def test_margins_of_ofd():
    weight, bias = torch.tensor([0.5, 0.0, 2.0]), torch.tensor([1.0, -1.0, -0.5])
    with Names(), Dispatch():
        agree(OFD.margin_from_bn(send(weight), send(bias)), OFD.margin_from_bn(weight, bias))


def test_weights_of_six_teachers():
    """In float32 the tolerances of the exact solution would throw the right choice out."""
    seed(0)
    out_s, outs_t = torch.randn(8, 10), [torch.randn(8, 10) for _ in range(6)]
    loss = AEKD(C=0.5)
    with Names(), Dispatch():
        agree(loss(send(out_s), send(outs_t)), loss(out_s, outs_t))
    grads = loss.gradients(out_s, outs_t)
    with Names(), Dispatch():
        assert_close(loss.weights(send(grads), 0.5), loss.weights(grads, 0.5), rtol=1e-6, atol=1e-9)


def test_wide_embeddings_of_rkd():
    feat_s, feat_t = torch.randn(4, 128), torch.randn(4, 96)
    with Names(), Dispatch():
        agree(RKD()(send(feat_s), send(feat_t)), RKD()(feat_s, feat_t))


def test_choices_and_numbers_of_scripts():
    values, weights = torch.rand(6), torch.tensor([3, 1, 2, 2, 4, 1])
    found = {'mask': torch.rand(5, 3, 4, 4) < 0.5, 'inside': torch.rand(5, 4, 4) < 0.5,
             'background': torch.rand(3)}  # fmt: skip
    for where, cells in (('fore', found['inside']), ('back', ~found['inside'])):
        found[where] = (found['mask'] & cells[:, None]).sum(dim=(2, 3))
    distance = torch.rand(3)
    with Names(), Dispatch():
        for choose in (slimming.knapsack, slimming.greedy):
            assert choose(send(values), send(weights), 7).tolist() == choose(values, weights, 7).tolist()
        assert knowledge.metrics(send(found), send(distance)) == knowledge.metrics(found, distance)


class NearGenerator(torch.Generator):
    """Of the CPU, but it says that it is Apple's."""

    device = APPLE

    def __new__(cls, device='cpu'):
        return super().__new__(cls)


def test_scripts(script, monkeypatch, tmp_path):
    """What the scripts compute themselves, and losses that are made from the data."""
    monkeypatch.setattr(torch, 'Generator', NearGenerator)
    for name, stand_in in {
        'get_rng_state': torch.get_rng_state,
        'set_rng_state': torch.set_rng_state,
        'manual_seed': seed,
    }.items():
        monkeypatch.setattr(torch.mps, name, stand_in)
    small = ('--data_name', 'shapes:64', '--batch_size', 32)
    trained = tmp_path / 'teacher' / 'net.pt'
    calls = (
        ('train_base', '--net_name', 'resnet8', *small, '--note', 'teacher'),
        ('train_kd', '--kd_mode', 'st', 'mhgd', 'tdd', '--s_name', 'resnet8', '--t_name', 'resnet8',
         '--t_model', trained, *small),
        ('train_ka', '--ka_mode', 'scratch', '--tasks', 'depth', 'normal', '--data_name', 'scenes:16',
         '--batch_size', 8, '--epochs_ft', 0),
    )  # fmt: skip
    with Names(), Dispatch():
        for words in calls:
            done = script(*words, '--device', 'mps', '--epochs', 1)
            assert done.code == 0, done.err
            assert 'mps' in done.out
