"""Pruning: the authors' scores and choices, and a smaller network that computes what the masked one does."""

import contextlib
import copy
import itertools
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import models
from engine.meter import Meter
from models import slimming
from models.resnet import ResNet
from tests.conftest import TINY, Killed
from tests.test_resume import check_equal, killed_after

FOLDER = Path(os.environ.get('GOLDEN_DIR') or Path(__file__).parent / 'golden')


@pytest.fixture
def vector():
    with np.load(FOLDER / 'slimming.npz', allow_pickle=False) as file:
        z = {key: file[key] for key in file.files}
    net = ResNet(int(z['hp_blocks']), tuple(z['in_widths'].tolist()), int(z['hp_classes'])).double().eval()
    state = net.state_dict()
    for name in state:
        if not name.endswith('num_batches_tracked'):
            state[name] = torch.from_numpy(z[f'param_{name.replace(".", "_")}'])
    net.load_state_dict(state)
    batches = list(zip(torch.from_numpy(z['in_img']), torch.from_numpy(z['in_target'])))
    return z, net, batches


def near(got, wanted, rtol=1e-9):
    np.testing.assert_allclose(
        np.asarray(got), wanted, rtol=rtol, atol=rtol * max(np.abs(wanted).max(), 1e-3)
    )


def test_scores_are_the_authors(vector):
    z, net, batches = vector
    near(net(batches[0][0]).detach(), z['out_logits'])
    groups = slimming.groups(net)
    bn_of = {conv: bn for group in groups for conv, bn in zip(group.convs, group.bns)}
    assert {f'out_l1_{conv.replace(".", "_")}' for conv in bn_of} == {k for k in z if k.startswith('out_l1_')}
    for kind in ('l1', 'l2', 'taylor', 'taylor_abs'):
        for conv, value in slimming.conv_scores(net, bn_of, kind, batches).items():
            near(value, z[f'out_{kind}_{conv.replace(".", "_")}'])


def test_choices_are_the_authors(vector):
    """Their groups leave out the stem, their costs count strided layers with half pixels."""
    z, net, batches = vector
    groups = slimming.groups(net)
    bn_of = {conv: bn for group in groups for conv, bn in zip(group.convs, group.bns)}
    each = slimming.conv_scores(net, bn_of, 'taylor', batches)
    names = [str(name).split('***') for name in z['out_group_names']]
    values = [sum(each[conv] for conv in convs) for convs in names]
    costs = [sum(int(z[f'out_macs_{conv.replace(".", "_")}'][0]) for conv in convs) for convs in names]
    for ratio, (word, how) in itertools.product((30, 60), (('greedy', 'greedy'), ('dp', 'knapsack'))):
        for i, mask in enumerate(slimming.select(values, costs, ratio / 100, how)):
            wanted = torch.from_numpy(z[f'out_keep_{word}_{ratio}_{i}'].astype(bool))
            if not wanted.any():  # theirs may empty a group, ours keeps its best channel
                wanted[values[i].argmax()] = True
            assert torch.equal(mask, wanted), (word, ratio, i)
    items = torch.from_numpy(z['in_values']), torch.from_numpy(z['in_costs'])
    kept = slimming.knapsack(*items, int(z['hp_capacity']))
    assert kept.tolist() == z['out_keep_dp'].tolist()
    near(items[0][kept].sum(), z['out_value_dp'])
    assert slimming.greedy(*items, int(z['hp_capacity'])).tolist() == z['out_keep_greedy'].tolist()


def test_the_knapsack_is_the_best_of_all_subsets():
    generator = torch.Generator().manual_seed(0)
    values, weights = (
        torch.rand(11, generator=generator).double(),
        torch.randint(1, 30, (11,), generator=generator),
    )
    best = max(
        (float(values[list(some)].sum()) if some else 0.0)
        for r in range(12)
        for some in itertools.combinations(range(11), r)
        if not some or int(weights[list(some)].sum()) <= 70
    )
    kept = slimming.knapsack(values, weights, 70)
    assert float(values[kept].sum()) == pytest.approx(best) and int(weights[kept].sum()) <= 70
    assert float(values[kept].sum()) >= float(values[slimming.greedy(values, weights, 70)].sum())
    odd = weights * 10_000_019 + torch.arange(11)  # no common divisor: rounded up, so it still fits
    rounded = slimming.knapsack(values, odd, 70 * 10_000_019)
    assert len(rounded) and int(odd[rounded].sum()) <= 70 * 10_000_019


@pytest.mark.parametrize('name', ['resnet14', 'resnet8x4'])
def test_a_narrow_network_computes_what_the_masked_one_does(name):
    torch.manual_seed(0)
    net, img = models.build(name, 7).eval(), torch.randn(2, 3, 16, 16)
    for bn in (m for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d)):
        bn.running_mean.normal_()
        bn.bias.data.normal_()
    groups = slimming.groups(net)
    assert sorted(c for g in groups for c in g.convs) == sorted(
        n for n, m in net.named_modules() if isinstance(m, torch.nn.Conv2d)
    )
    every = [torch.ones(len(net.get_submodule(g.convs[0]).weight), dtype=torch.bool) for g in groups]
    torch.testing.assert_close(slimming.shrink(net, groups, every)(img), net(img))
    values = slimming.scores(net, groups, 'random', generator=torch.Generator().manual_seed(1))
    keep = slimming.select(values, slimming.costs(net, groups, 16), 0.5, 'global')
    small = slimming.shrink(net, groups, keep)
    assert slimming.macs(small, 16) < slimming.macs(net, 16)
    again = slimming.shaped_like(models.build(name, 7), small.state_dict()).eval()
    again.load_state_dict(small.state_dict())
    for group, mask in zip(groups, keep):
        for bn in map(net.get_submodule, group.bns):
            bn.weight.data[~mask] = 0
            bn.bias.data[~mask] = 0
    torch.testing.assert_close(small(img), net(img), rtol=1e-4, atol=1e-5)
    assert torch.equal(again(img), small(img))
    assert slimming.shaped_like(net, net.state_dict()) is net


def test_a_narrow_network_is_recognised_under_a_prefix(tmp_path):
    """As DataParallel and a training's checkpoint keep it."""
    wide = models.build('resnet8', 7)
    groups = slimming.groups(wide)
    values = slimming.scores(wide, groups, 'random', generator=torch.Generator().manual_seed(1))
    keep = slimming.select(values, slimming.costs(wide, groups, 16), 0.5, 'global')
    state = slimming.shrink(wide, groups, keep).state_dict()
    path = tmp_path / 'net.pt'
    torch.save({'net': {f'module.{key}': x for key, x in state.items()}}, path)
    for net in (models.build_for(path, 'resnet8', 7), models.narrowed(wide, path)):
        models.load_weights(net, path)
        assert all(torch.equal(x, state[key]) for key, x in net.state_dict().items())


def test_a_group_is_never_empty():
    values, costs = [torch.tensor([1.0, 2]), torch.tensor([0.1, 0.2, 0.15])], [5, 5]
    for how in slimming.HOWS:
        keep = slimming.select(values, costs, 0.9, how)
        assert all(mask.any() for mask in keep) and keep[1][1]
    with pytest.raises(ValueError, match='how must be one of'):
        slimming.select(values, costs, 0.5, 'best')
    with pytest.raises(ValueError, match='must be a resnet of CIFAR, got VGG'):
        slimming.groups(models.build('vgg8', 10))


def test_slim_then_distil(script, teacher, tmp_path, monkeypatch, img_root):
    """The tool, then the unpruned network teaches the narrow one, which any script can load."""
    import tools.slim

    monkeypatch.setitem(sys.modules, 'slim', tools.slim)
    words = ('--net_name', 'resnet8', '--model', teacher, '--data_name', 'shapes:96', '--img_root', img_root)
    words += ('--threads', 1, '--ratio', '0.5', '--out', tmp_path / 'slim')
    done = script('slim', *words, '--kind', 'l1', '--batches', 3)
    assert done.code == 2 and '--batches: --kind l1 does not read it' in done.err, done.err
    for kind, how in (('taylor', 'knapsack'), ('bn', 'uniform')):
        done = script('slim', *words, '--kind', kind, '--how', how)
        assert done.code == 0, done.err
    facts = json.loads((tmp_path / 'slim' / 'slim.json').read_text())
    assert facts['after']['macs'] < facts['before']['macs'] and facts['after']['top1'] >= 0
    pair = ('--t_name', 'resnet8', '--t_model', teacher, '--s_name', 'resnet8', *TINY)
    done = script(
        'train_kd', *pair, '--s_init', tmp_path / 'slim' / 'net.pt', '--kd_mode', 'ikd', '--note', 'k'
    )
    assert done.code == 0, done.err
    net = models.load_student(tmp_path / 'k' / 'ikd' / 'student.pt', 'resnet8', 10)
    assert sum(p.numel() for p in net.parameters()) == facts['after']['parameters']
    done = script(
        'train_base', '--net_name', 'resnet8', '--init', tmp_path / 'slim' / 'net.pt', '--note', 'f', *TINY
    )
    assert done.code == 0, done.err


def test_scales_are_pulled_towards_zero(script, tmp_path, monkeypatch):
    """--bn_l1: its gradient is W times the sign, cross-entropy is told without it, and it goes on."""
    import train_base

    torch.manual_seed(0)
    net = models.build('resnet8', 10)
    for scale in (m.weight for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d)):
        torch.nn.init.uniform_(scale, -1, 1)
    norms = {name for name, m in net.named_modules() if isinstance(m, torch.nn.BatchNorm2d)}
    scaling = {f'{name}.weight' for name in norms}
    x, target = torch.randn(4, 3, 32, 32), torch.arange(4)
    after, told = [], []
    for w in (0.0, 0.25):
        own = copy.deepcopy(net)
        scales = [m.weight for m in own.modules() if isinstance(m, torch.nn.BatchNorm2d)]
        meter = Meter('x', 0, torch.device('cpu'))
        meter.reset(0)
        opt, scaler = torch.optim.SGD(own.parameters(), 1.0), torch.amp.GradScaler(enabled=False)
        run = train_base.Run('x', own, opt, scaler, contextlib.nullcontext, meter, None, [], w, scales)
        train_base.train_step(run, SimpleNamespace(img=x, target=target))
        after.append(own)
        told.append(meter.read()['ce'])
    assert told[0] == told[1]
    for (name, old), plain, pulled in zip(net.named_parameters(), *(own.parameters() for own in after)):
        pull = 0.25 * old.sign() if name in scaling else 0 * old
        torch.testing.assert_close(plain - pulled, pull, rtol=0, atol=1e-5)

    words = ('--net_name', 'resnet8', *TINY, '--bn_l1', '0.01')
    assert script('train_base', *words, '--note', 'whole').code == 0
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_after(1, patch)
        script('train_base', *words, '--note', 'cut')
    done = script('train_base', *words[:-1], '0.02', '--note', 'cut', '--resume', 'auto')
    assert done.code == 2 and 'bn_l1 was 0.01, is 0.02' in done.err
    assert script('train_base', *words, '--note', 'cut', '--resume', 'auto').code == 0
    check_equal(tmp_path / 'whole', tmp_path / 'cut')
    done = script('train_base', '--net_name', 'vit_128_6', *TINY, '--bn_l1', '0.01', '--note', 'v')
    assert done.code == 2 and '--bn_l1: vit_128_6 has no BatchNorm2d' in done.err
