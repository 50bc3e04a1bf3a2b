"""What people run into who copy a loss into a project of their own."""

import pytest
import torch
from torch import nn

from kd_losses.crd import CRD
from kd_losses.dkd import DKD
from kd_losses.fkd_labels import SoftCE
from kd_losses.pskd import PSKD
from kd_losses.quest import QuEST
from kd_losses.reviewkd import ReviewKD
from kd_losses.sdd import local_logits
from kd_losses.simkd import SimKD
from kd_losses.srrl import SRRL
from kd_losses.taid import TAID
from kd_losses.unic import momentum
from kd_losses.vkd import VkD


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize('s_dim, t_dim', [(16, 32), (32, 16), (16, 16)])
@pytest.mark.parametrize('optimiser', ['sgd', 'adamw'])
def test_vkd_learns_under_weight_decay(s_dim, t_dim, optimiser):
    """Signs that the default form for unlike widths keeps in the parameter were rounded to 0."""
    torch.manual_seed(0)
    net, loss = nn.Linear(8, s_dim), VkD(s_dim, t_dim)
    parameters = [*net.parameters(), *loss.parameters()]
    step = {'sgd': lambda: torch.optim.SGD(parameters, 0.05, momentum=0.9, weight_decay=1e-4),
            'adamw': lambda: torch.optim.AdamW(parameters, 0.01, weight_decay=0.05)}[optimiser]()  # fmt: skip
    x, feat_t, values = draw(32, 8), draw(32, t_dim, seed=1), []
    for _ in range(20):
        value = loss(net(x), feat_t)
        step.zero_grad()
        value.backward()
        step.step()
        values.append(value.item())
    w = loss.projection.weight.detach()
    small = w.mT @ w if t_dim >= s_dim else w @ w.mT
    assert values[-1] < values[5] < values[0]
    torch.testing.assert_close(small, torch.eye(min(s_dim, t_dim)), rtol=0, atol=1e-5)


def test_a_schedule_that_is_over_stays_at_its_end():
    out, target, index = draw(8, 5).requires_grad_(), torch.arange(8) % 5, torch.arange(8)
    values = []
    for epoch in (9, 50):
        loss = PSKD(8, 5, total_epochs=10)
        loss.memory.fill_(0.2)
        values.append(loss(out, target, index, epoch=epoch))
    torch.testing.assert_close(*values)
    assert momentum(20, 10) == momentum(10, 10) == pytest.approx(0.001)
    with pytest.raises(ValueError, match='progress must be in .0, 1., got 3: steps done / all steps'):
        TAID()(draw(2, 5), draw(2, 5), progress=3)


def test_soft_cross_entropy_refuses_logits():
    p = draw(4, 5, seed=1).softmax(dim=1)
    assert SoftCE()(draw(4, 5), p - 1e-3).isfinite()
    assert torch.func.vmap(SoftCE())(draw(2, 4, 5), p.expand(2, 4, 5)).isfinite().all()
    with pytest.raises(ValueError, match='must be probabilities'):
        SoftCE()(draw(4, 5), draw(4, 5, seed=1))


def test_quest_wants_its_vocabulary():
    fm_s, fm_t = draw(2, 3, 4, 4), draw(2, 5, 4, 4, seed=1)
    loss = QuEST(3, 5, num_words=6)
    with pytest.raises(ValueError, match='call fit'):
        loss(fm_s, fm_t)
    loss.fit(fm_t)
    assert loss(fm_s, fm_t) != loss(fm_s, 5 * fm_t + 3)
    other = QuEST(3, 5, num_words=6)
    other.load_state_dict(loss.state_dict())
    assert other(fm_s, fm_t) == loss(fm_s, fm_t)


def test_a_classifier_that_is_no_linear_layer_is_named():
    head, fm_s, fm_t = (
        nn.Sequential(nn.Dropout(), nn.Linear(5, 4)),
        draw(2, 3, 4, 4),
        draw(2, 5, 4, 4, seed=1),
    )
    for use in (
        lambda: SRRL(3, 5)(fm_s, fm_t, draw(2, 4), head),
        lambda: SRRL(3, 5)(fm_s, fm_t, draw(2, 4), nn.Conv2d(5, 4, 1)),
        lambda: SimKD(3, 5).predict(fm_s, head),
        lambda: local_logits(fm_t, head),
    ):
        with pytest.raises(
            ValueError, match='must be a Linear or .weight, bias., got .*: give the last Linear'
        ):
            use()


@pytest.mark.parametrize('index', [[0, 1, 2, 9], [-1, 0, 1, 2], [0.0, 1.0, 2.0, 3.0]])
def test_positions_outside_the_training_set_are_named(index):
    index, target = torch.tensor(index), torch.arange(4)
    for use in (
        lambda: CRD(3, 5, 9, nce_n=2)(draw(4, 3), draw(4, 5), index),
        lambda: CRD(3, 5, 9, [0, 1, 2] * 3, nce_n=2)(draw(4, 3), draw(4, 5), index),
        lambda: PSKD(9, 5)(draw(4, 5), target, index, 0),
    ):
        with pytest.raises(ValueError, match='index must be integers in 0..8'):
            use()


def test_labels_of_another_shape_hear_what_helps():
    out, target = draw(4, 5), torch.arange(4)
    for wrong in (nn.functional.one_hot(target, 5), target[:, None]):
        with pytest.raises(ValueError, match='a number per row.*argmax'):
            DKD()(out, out, wrong)


def test_one_map_instead_of_a_list_is_named():
    with pytest.raises(ValueError, match='must hold 1 maps, got 2: a list'):
        ReviewKD([3], [5])(draw(2, 3, 4, 4), draw(2, 5, 4, 4))


def test_validation_leaves_what_simkd_pools_to():
    loss, fm_s = SimKD(3, 5), draw(2, 3, 8, 8)
    loss(fm_s, draw(2, 5, 4, 4))
    loss.eval()(fm_s, draw(2, 5, 2, 2))
    assert loss.size.tolist() == [4, 4]
    other = SimKD(3, 5).eval()
    other(fm_s, draw(2, 5, 2, 2))
    assert other.size.tolist() == [2, 2], 'without a training the last one counts'
    other.load_state_dict(loss.state_dict())
    other(fm_s, draw(2, 5, 2, 2))
    assert other.size.tolist() == [4, 4]
