"""Amalgamation: who knows which classes, the rooms, the trainer."""

import inspect
import json
import re
import shlex
import warnings
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import dataset
import engine.ka_build
import engine.record
import train_ka
from dataset.dense import DenseMetrics, supervised
from dataset.parts import ClassParts, read_classes, spelled, split_classes, take_classes
from dataset.scenes import objects, scene
from engine import pictures
from ka_losses.recombination import combine_bns, combine_convs, combine_models
from ka_settings import SETTINGS, Setting, setting_for
from methods.ka import KA as METHODS
from models import build, named_weights
from models.branching import JointNet
from models.segmentation import SegNet
from tests.conftest import ROOT
from tests.test_train import rows, same, weights

DATA = ('--data_name', 'shapes:96', '--batch_size', '32')
CLASS_MODES = [
    name
    for name, m in METHODS.items()
    if (not m.needs.setting or 'classes' in m.needs.setting)
    and not m.needs.shared_classes
    and name != 'ka_vit'  # has other networks
]
ROOMS = ('--data_name', 'scenes:24', '--size', '32', '--batch_size', '8', '--lr', '2e-3')


# ------------------------------------------------------------------------------------------ who knows what


def test_splits():
    assert split_classes(10, 2) == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
    assert split_classes(10, 3, 'interleaved') == [[0, 3, 6, 9], [1, 4, 7], [2, 5, 8]]
    one, two = split_classes(100, 4, 'random', 3), split_classes(100, 4, 'random', 3)
    assert one == two != split_classes(100, 4, 'random', 4)
    assert sorted(sum(one, [])) == list(range(100)) and {len(part) for part in one} == {25}
    assert read_classes('0-2,7', 10) == [0, 1, 2, 7]
    for classes in ([0, 1, 2, 7], [5, 6], [8, 0, 2, 4], [3]):
        assert read_classes(spelled(classes), 10) == classes
    assert spelled([0, 1, 2, 7]) == '0-2,7'
    for bad in ('', '3-', 'a', '1,1', '5-4', '9-10'):
        with pytest.raises(ValueError, match='classes'):
            read_classes(bad, 10)
    for bad in ((10, 11), (10, 0), (10, 2, 'sideways')):
        with pytest.raises(ValueError, match='got'):
            split_classes(*bad)


def test_part_of_a_data_set(tmp_path):
    train, _ = dataset.load('shapes:60', tmp_path)
    part = take_classes(train, [7, 2])
    assert len(part) == 12 and part.num_classes == 2
    assert set(part.targets.tolist()) == {0, 1}
    for label, original in enumerate([7, 2]):
        assert torch.equal(part.images[part.targets == label], train.images[train.targets == original])


def test_blocks_and_columns():
    split = ClassParts([[0, 1, 5], [2, 3]])
    assert split.classes == [0, 1, 5, 2, 3] and split.blocks == [[0, 1, 2], [3, 4]] and not split.overlap
    cut = ClassParts([[0, 1, 5], [2, 1]], wanted=[1, 2])
    assert cut.columns == [[1], [1, 0]] and cut.blocks == [[0], [0, 1]] and cut.overlap
    with pytest.raises(ValueError, match='share the classes .1.'):
        ClassParts([[0, 1], [1, 2]])
    with pytest.raises(ValueError, match='no teacher knows the classes .9.'):
        ClassParts([[0, 1], [2]], wanted=[1, 9])
    with pytest.raises(ValueError, match='teacher 2 knows none'):
        ClassParts([[0, 1], [2]], wanted=[1])


def test_accuracies_by_hand():
    """Joint accuracy, accuracy with the part known, and routing are three different things."""
    split = ClassParts([[0, 1], [2, 3]])
    out = torch.tensor([[3.0, 1, 9, 0], [0, 5, 1, 1], [9, 0, 2, 1], [0, 0, 2, 1]])
    target = torch.tensor([0, 1, 2, 3])
    read = split.metrics(out, target)
    assert read['top1'] == 25 and read['part1'] == 100 and read['part1_joint'] == 50
    assert read['part2'] == 50 and read['part2_joint'] == 0
    assert split.routing(out, target) == [[50, 50], [50, 50]]


# --------------------------------------------------------------------------------------------------- rooms


def test_rooms_are_the_golden_ones():
    with np.load(ROOT / 'tests/golden/scenes.npz') as z:
        for j, index in enumerate(z['hp_index']):
            made = scene(int(index), int(z['hp_seed']), int(z['hp_size']))
            for name, got in zip(('image', 'seg', 'depth', 'normal'), made):
                wanted = z[f'out_{name}'][j]
                if name == 'seg':
                    assert (got.reshape(wanted.shape) != wanted).mean() <= 0.002
                else:
                    assert np.median(np.abs(got - wanted)) < 1e-5
                    assert (np.abs(got - wanted) > 1e-5).mean() <= 0.002
    for index, counts, depth in (
        (2, [745, 1154, 38, 119, 41, 207], 3.222802),
        (5, [1020, 1155, 0, 52, 0, 77], 3.185299),
    ):
        _, seg, d, normal = scene(index)
        assert np.bincount(seg.ravel(), minlength=6).tolist() == counts  # with cylinders
        assert d.mean() == pytest.approx(depth, abs=1e-5)
        assert np.allclose(np.linalg.norm(normal, axis=0), 1, atol=1e-5)


def test_boxes_of_objects_hold_their_pixels():
    kinds, boxes = objects(2)
    _, seg, _, _ = scene(2)
    held = np.zeros_like(seg, bool)
    for x, y, w, h in boxes * 48:
        held[round(y - h / 2) : round(y + h / 2), round(x - w / 2) : round(x + w / 2)] = True
    assert len(kinds) == 3 and held[seg >= 3].mean() > 0.99


def test_rooms_mirrored(tmp_path):
    """A mirrored batch has mirrored labels, and normals whose x points the other way."""
    train, _ = dataset.load_dense('scenes:10', tmp_path, 'cpu', 16, labelled=True)
    plain = {int(i): (img, lab) for img, lab, i in train.test_batches(1)}
    mirrored = 0
    for seed in range(6):
        for img, labels, index, _ in train.train_batches(5, seed, 0):
            wanted, label = plain[int(index[0])]
            flipped = not torch.equal(img[:1], wanted)
            mirrored += flipped
            for task, sign in (('seg', 1), ('depth', 1), ('normal', torch.tensor([-1, 1, 1])[:, None, None])):
                target = label[task].flip(-1) * sign if flipped else label[task]
                assert torch.equal(labels[task][:1], target), task
    assert 0 < mirrored < 12


def test_dense_metrics_by_hand():
    metrics = DenseMetrics(('seg', 'depth', 'normal'), 2, 'cpu')
    seg = torch.tensor([[[0, 0], [1, -1]]])
    said = torch.tensor([[[0, 1], [1, 1]]])
    depth = torch.tensor([[[[2.0, 4], [0, 1]]]])
    normal = torch.zeros(1, 3, 2, 2)
    normal[:, 2] = 1
    normal[..., 1, 1] = 0  # unknown
    other = normal.clone()
    other[0, :, 0, 0] = torch.tensor([1.0, 0, 0])
    labels = {'seg': seg, 'depth': depth, 'normal': normal}
    outs = [nn.functional.one_hot(said, 2).permute(0, 3, 1, 2).float(), depth + 1, other]
    metrics.add(outs, labels)
    read = metrics.read()
    assert read['accuracy'] == pytest.approx(200 / 3)
    assert read['miou'] == pytest.approx(50)  # both classes: one hit of a union of two
    assert read['rmse'] == pytest.approx(1) and read['abs_rel'] == pytest.approx((0.5 + 0.25 + 1) / 3)
    assert read['delta125'] == 0 and read['angle_mean'] == pytest.approx(30)
    assert read['within_11'] == pytest.approx(200 / 3)
    assert float(supervised('depth', depth + 1, depth)) == pytest.approx(1)
    perfect = DenseMetrics(('depth',), 2, 'cpu')
    perfect.add([depth], labels)
    assert perfect.read()['delta125'] == 100


def test_nyu_in_its_own_format(tmp_path):
    """A small file as MATLAB 7.3 writes it: axes reversed."""
    import h5py
    import scipy.io

    rng = np.random.default_rng(0)
    images = rng.integers(0, 255, (6, 3, 640, 480), dtype=np.uint8)
    depths = np.full((6, 640, 480), 2.0, np.float32)
    depths[1, :320] = 0  # unknown on the left
    labels = rng.integers(0, 30, (6, 640, 480)).astype(np.uint16)
    labels[0, :, :240] = 5  # the upper half
    with h5py.File(tmp_path / 'nyu_depth_v2_labeled.mat', 'w') as file:
        file['images'], file['depths'], file['labels'] = images, depths, labels
    train, test = dataset.load_dense('nyuv2', tmp_path, 'cpu', 32, labelled=False)
    assert len(train) == 5 and len(test) == 1 and train.num_classes == 13
    assert train.images.shape == (5, 3, 32, 32) and 0 <= train.images.min() and train.images.max() <= 1
    upper = train.labels['seg'][0, :16]
    assert (upper == upper[0, 0]).all()  # columns and rows are not mixed up
    assert (train.labels['depth'][1, 0, :, :16] == 0).all() and (
        train.labels['depth'][1, 0, :, 16:] == 2
    ).all()
    wall = train.labels['normal'][0]
    assert torch.allclose(wall, torch.tensor([0, 0, -1.0])[:, None, None].expand_as(wall), atol=1e-4)
    (tmp_path / 'classes.txt').write_text('\n'.join(['-1', *(str(i % 4) for i in range(894))]))
    train, _ = dataset.load_dense('nyuv2', tmp_path, 'cpu', 32, labelled=False)
    assert train.num_classes == 4 and int(train.labels['seg'].min()) == -1
    for name, content, said in (
        ('classes.txt', 'wall', 'the number of a class per line'),
        ('classes.txt', '-2\n0', 'classes must be'),
        ('splits.mat', 'no MATLAB', 'trainNdxs and testNdxs'),
    ):
        before = (tmp_path / 'classes.txt').read_text()
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match=said):
            dataset.load_dense('nyuv2', tmp_path, 'cpu', 32, labelled=False)
        (tmp_path / 'classes.txt').write_text(before)
    halves = {'trainNdxs': np.array([[2], [6]]), 'testNdxs': np.array([[1]])}
    scipy.io.savemat(tmp_path / 'splits.mat', halves)
    train, test = dataset.load_dense('nyuv2', tmp_path, 'cpu', 32, labelled=False)
    assert (len(train), len(test)) == (2, 1)
    scipy.io.savemat(tmp_path / 'splits.mat', halves | {'testNdxs': np.array([[7]])})
    with pytest.raises(ValueError, match=r'frames must be 1\.\.6'):
        dataset.load_dense('nyuv2', tmp_path, 'cpu', 32, labelled=False)
    with pytest.raises(ValueError, match='not there'):
        dataset.load_dense('nyuv2', tmp_path / 'elsewhere', 'cpu', 32, labelled=False)
    (tmp_path / 'nyu_depth_v2_labeled.mat').write_bytes(b'MATLAB 5.0')
    with pytest.raises(ValueError, match='not the labelled data set'):
        dataset.load_dense('nyuv2', tmp_path, 'cpu', 32, labelled=False)


# ------------------------------------------------------------------------------------------------ networks


def test_joint_network_begins_as_its_teachers():
    """With its codings open, a branch at point 0 of a trunk that copies the first teacher is that teacher."""
    torch.manual_seed(0)
    nets = [SegNet(k, (4, 6), (1, 1)).eval() for k in (5, 1, 3)]
    joint = JointNet(nets).eval()
    for codings in joint.codings:
        for coding in codings:
            nn.init.zeros_(coding.w2.weight)  # the gate is 1 / 2 everywhere
    x = torch.randn(2, 3, 8, 8)
    places, maps = [], []
    for i in (1, 2):
        x_i = getattr(nets[0], f'down{i}')(x if i == 1 else maps[-1])
        y, where = nn.functional.max_pool2d(x_i, 2, return_indices=True)
        places.append((where, x_i.shape[2:]))
        maps.append(y)
    y = maps[-1] / 2
    for i in (2, 1):
        where, size = places[i - 1]
        y = getattr(nets[2], f'up{i}')(nn.functional.max_unpool2d(y, where, 2, output_size=size))
    torch.testing.assert_close(joint(x)[2], y)
    out = joint(x, [0, 1, 1])
    assert [o.shape[1] for o in out] == [5, 1, 3] and not torch.equal(out[2], joint(x)[2])


def test_frozen_branches_do_not_move():
    nets = [SegNet(k, (4, 6), (1, 1)) for k in (5, 1)]
    joint = JointNet(nets)
    joint.train()
    joint.freeze(True)
    before = {k: v.clone() for k, v in joint.branches.state_dict().items()}
    opt = torch.optim.SGD(joint.parameters(), 0.1)
    sum(out.square().mean() for out in joint(torch.randn(2, 3, 8, 8), [1, 0])).backward()
    opt.step()
    assert same(before, joint.branches.state_dict())  # batch norm's statistics included
    assert not torch.equal(joint.trunk.down1.layers[0][0].weight, nets[0].down1.layers[0][0].weight)
    joint.freeze(False)
    joint(torch.randn(2, 3, 8, 8))
    assert not same(before, joint.branches.state_dict())


def test_parameters_in_use():
    net = SegNet(1, (4, 6), (1, 1))
    joint = JointNet([net, net])
    coding = sum(p.numel() for p in joint.codings[0][0].parameters())
    down = sum(p.numel() for name, p in net.named_parameters() if name.startswith('down'))
    up = {i: sum(p.numel() for p in getattr(net, f'up{i}').parameters()) for i in (1, 2)}
    assert joint.parameters_in_use() == down + 2 * (coding + up[1] + up[2])
    joint.choose([1, 1])
    assert joint.parameters_in_use() == down + up[2] + 2 * (up[1] + coding_of(joint, 1))


def coding_of(joint, k):
    return sum(p.numel() for p in joint.codings[0][k].parameters())


def test_combined_networks_give_their_logits_side_by_side():
    """Recombination: two ResNets with their own statistics become one, exactly."""
    torch.manual_seed(0)
    nets = [build('resnet8', k).double() for k in (5, 3)]
    for net in nets:
        net.train()(torch.randn(8, 3, 8, 8, dtype=torch.float64))  # statistics of its own
        net.eval()
    joined = combine_models(nets)
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(joined(x.repeat(1, 2, 1, 1)), torch.cat([net(x) for net in nets], dim=1))
    assert nets[0].conv1.in_channels == 3 and joined.conv1.in_channels == 6
    with pytest.raises(ValueError, match='same modules'):
        combine_models([build('resnet8', 5), build('resnet14', 5)])


# ------------------------------------------------------------------------------------------------- trainer


@pytest.fixture(scope='module')
def halves(train, tmp_path_factory):
    """Two resnet8, each trained for an epoch on half of the classes."""
    root = tmp_path_factory.mktemp('halves')
    for part in (0, 1):
        train('train_base', '--net_name', 'resnet8', *DATA, '--epochs', 1, '--num_parts', 2, '--part', part,
              '--save_root', root, '--note', f'half{part}')  # fmt: skip
    return [root / f'half{part}' / 'net.pt' for part in (0, 1)]


@pytest.fixture
def ka(script, halves):
    def call(*words, epochs=2):
        teachers = ('--t_name', 'resnet8', '--t_model', *halves)
        data = () if '--data_name' in words else (*DATA, '--epochs', epochs)
        return script('train_ka', *teachers, *data, '--ka_mode', *words)

    return call


def test_every_mode_trains_and_reports(ka, tmp_path):
    done = ka(*CLASS_MODES, '--note', 'all')
    assert done.code == 0, done.err
    assert 'selected on test data' in done.out
    for mode in CLASS_MODES:
        result = json.loads((tmp_path / 'all' / mode / 'results.json').read_text())
        assert {'top1', 'part1', 'part2', 'part1_joint', 'epoch'} <= result['last'].keys()
        assert len(result['routing']) == 2 and result['command'] and result['commit']
        assert result['parts'] == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]] and len(result['teachers']) == 2
        assert np.allclose(np.sum(result['routing'], axis=1), 100)
    ensemble = json.loads((tmp_path / 'all' / 'ensemble' / 'results.json').read_text())
    assert set(ensemble['ensembles']) == {'A', 'B', 'C'}
    # softmax and centring leave the order inside a part alone
    parts = [[form[key] for key in ('part1', 'part2')] for form in ensemble['ensembles'].values()]
    for form in parts:
        assert form == pytest.approx([teacher['top1'] for teacher in ensemble['teachers']])
    metrics = rows(tmp_path / 'all' / 'layerwise')
    assert {'loss', 'kd', 'amal', 'recons', 'test_top1', 'test_part1'} <= metrics[0].keys()
    block = torch.load(tmp_path / 'all' / 'cfl' / 'ka.pt', weights_only=True)
    assert any(key.startswith('0.align_t') for key in block)


def test_alone_equals_beside_others(ka, tmp_path):
    for words, note in ((['layerwise', 'soka', 'cfl', 'customize_target'], 'many'), (['soka'], 'soka'),
                        (['cfl'], 'cfl')):  # fmt: skip
        assert ka(*words, '--note', note).code == 0
    for mode in ('soka', 'cfl'):
        a, b = weights(tmp_path / 'many' / mode), weights(tmp_path / mode / mode)
        assert same(a['net'], b['net']) and same(a['ka'], b['ka'])


def test_labels_are_not_read(ka, tmp_path, monkeypatch):
    """With every label of the training batches replaced by -1: the same weights, but for the reference."""
    modes = [mode for mode in CLASS_MODES if not METHODS[mode].needs.labels]
    assert ka(*modes, '--note', 'with').code == 0
    real = dataset.Resident.train_batches

    def without(self, *words):
        for img, target, index, views in real(self, *words):
            yield img, torch.full_like(target, -1), index, views

    monkeypatch.setattr(dataset.Resident, 'train_batches', without)
    assert ka(*modes, '--note', 'without').code == 0
    for mode in modes:
        assert same(weights(tmp_path / 'with' / mode)['net'], weights(tmp_path / 'without' / mode)['net']), (
            mode
        )
    with pytest.raises((IndexError, RuntimeError)):  # cross-entropy notices: the test can fail
        ka('scratch', '--note', 'reference')


def test_resumed_equals_undisturbed(ka, tmp_path, monkeypatch):
    modes = ['concat', 'soka', 'cfl', 'customize_target']
    assert ka(*modes, '--note', 'whole', epochs=3).code == 0
    real, wrote = engine.record.write_atomic, []

    class Killed(BaseException):
        pass

    def dies(path, content):
        wrote.append(path)
        if path.name == 'last.pt' and len([p for p in wrote if p.name == 'last.pt']) == 6:
            raise Killed  # in the second epoch, when the second student is due
        real(path, content)

    monkeypatch.setattr(engine.record, 'write_atomic', dies)
    with pytest.raises(Killed):
        ka(*modes, '--note', 'cut', '--resume', 'auto', epochs=3)
    monkeypatch.setattr(engine.record, 'write_atomic', real)
    done = ka(*modes, '--note', 'cut', '--resume', 'auto', epochs=3)
    assert done.code == 0 and '1 of 3 epochs done' in done.out
    for mode in modes:
        a, b = weights(tmp_path / 'whole' / mode), weights(tmp_path / 'cut' / mode)
        for key in set(a) - {'args', 'origin', 'history'}:
            assert str(a[key]) == str(b[key]), f'{mode}: {key}'
        assert same(a['net'], b['net']) and same(a['ka'], b['ka'])
        assert rows(tmp_path / 'whole' / mode) == rows(tmp_path / 'cut' / mode)


def test_sources_to_component_to_target(script, tmp_path):
    """The two rounds of customize: sources share the wanted classes, components do not."""
    for note, classes in (('s1', '0-2,6-7'), ('s2', '0-2,8-9'), ('s3', '3-5,6-7'), ('s4', '3-5,8-9')):
        done = script('train_base', '--net_name', 'resnet8', *DATA, '--epochs', 1, '--classes', classes,
                      '--note', note)  # fmt: skip
        assert done.code == 0, done.err
    for note, sources, wanted, classes in (
        ('a', ('s1', 's2'), '0-2', ('0-2,6-7', '0-2,8-9')),
        ('b', ('s3', 's4'), '3-5', ('3-5,6-7', '3-5,8-9')),
    ):
        models = [tmp_path / source / 'net.pt' for source in sources]
        done = script('train_ka', '--ka_mode', 'customize', '--t_name', 'resnet8', '--t_model', *models,
                      '--t_classes', *classes, '--wanted', wanted, *DATA, '--epochs', 1,
                      '--note', note)  # fmt: skip
        assert done.code == 0, done.err
        result = json.loads((tmp_path / note / 'customize' / 'results.json').read_text())
        assert len(result['classes']) == 3 and 'part2' not in result['last']
    models = [tmp_path / note / 'customize' / 'student.pt' for note in 'ab']
    done = script('train_ka', '--ka_mode', 'customize_target', '--t_name', 'resnet8', '--t_model', *models,
                  '--t_classes', '0-2', '3-5', *DATA, '--epochs', 1, '--note', 'target')  # fmt: skip
    assert done.code == 0, done.err
    result = json.loads((tmp_path / 'target' / 'customize_target' / 'results.json').read_text())
    assert result['classes'] == [0, 1, 2, 3, 4, 5] and {'part1', 'part2'} <= result['last'].keys()


def test_sources_only_see_images_they_are_sure_of():
    """Every image trains with exactly one source: the one of least entropy."""
    from types import SimpleNamespace

    from ka_losses.customize import feed

    seen = []

    class Spy(nn.Module):
        def forward(self, fms_s, fms_t, out_s, out_t, return_terms):
            seen.append(out_s[:, 0].tolist())
            return out_s.sum(), {'soft': out_s.sum()}

    out = torch.arange(4.0)[:, None].repeat(1, 2)
    sure, unsure = torch.tensor([9.0, 0]), torch.tensor([1.0, 0])
    logits = [sure, unsure, sure, unsure], [unsure, sure, unsure, sure]
    ts = [SimpleNamespace(out=torch.stack(rows_of), pres=[out]) for rows_of in logits]
    feed([Spy(), Spy()], SimpleNamespace(out=out, pres=[out]), ts, SimpleNamespace(layers=(0,)))
    assert seen == [[0.0, 2.0], [1.0, 3.0]]


def test_many_unlike_teachers(script, tmp_path):
    """Five teachers of three architectures with two classes each, interleaved."""
    nets = ['resnet8', 'wrn_16_1', 'resnet8x4', 'resnet8', 'wrn_16_1']
    for part, net in enumerate(nets):
        done = script('train_base', '--net_name', net, *DATA, '--epochs', 1, '--num_parts', 5, '--part', part,
                      '--split', 'interleaved', '--note', f'part{part}')  # fmt: skip
        assert done.code == 0, done.err
    models = [tmp_path / f'part{part}' / 'net.pt' for part in range(5)]
    words = ('--t_name', *nets, '--t_model', *models, '--split', 'interleaved', '--s_name', 'resnet8')
    modes = ('concat', 'layerwise', 'cfl', 'customize_target', 'parts')
    done = script('train_ka', '--ka_mode', *modes, *words, *DATA, '--epochs', 1, '--note', 'five')
    assert done.code == 0, done.err
    for mode in modes:
        result = json.loads((tmp_path / 'five' / mode / 'results.json').read_text())
        assert result['classes'] == [0, 5, 1, 6, 2, 7, 3, 8, 4, 9] and len(result['routing']) == 5
    # a level whose widths differ between student and teachers has no weighted sum
    done = script('train_ka', '--ka_mode', 'soka', *words, *DATA, '--epochs', 1, '--note', 'soka')
    assert done.code == 2 and 'SOKAFeature' in done.err and done.err.count('\n') == 1


def test_other_images(ka, tmp_path):
    done = ka('concat', 'layerwise', '--unlabeled', 'shapes:40', '--note', 'other')
    assert done.code == 0 and '40 + 24 images' in done.out
    done = ka('concat', '--limit_train', 50, '--limit_test', 12, '--note', 'few')
    assert done.code == 0 and '50 + 12 images' in done.out
    done = ka('concat', '--limit_train', 50, '--limit_test', 13, '--note', 'few', '--resume', 'auto')
    assert done.code == 2 and 'limit_test was 12, is 13' in done.err


def test_optimisers_and_layers(ka, tmp_path):
    done = ka('layerwise', '--optim', 'sgd', '--ka_layers', 'rb2', '--note', 'sgd')
    assert done.code == 0, done.err
    recipe = json.loads((tmp_path / 'sgd' / 'layerwise' / 'results.json').read_text())['recipe']
    assert recipe['lr'] == 0.1 and recipe['lr_ka'] == 0.01 and recipe['layers'] == [2]
    done = ka(
        'cfl', '--ka_args', 'block=fc', 'h_channels=8', '--lambda_kd', 0.5, '--lambda_ka', 3, '--note', 'fc'
    )
    assert done.code == 0, done.err
    recipe = json.loads((tmp_path / 'fc' / 'cfl' / 'results.json').read_text())['recipe']
    assert recipe['method'] == ['cfl', 3.0, 0.5, {'block': 'fc', 'h_channels': 8}]


def test_two_processes(two, halves, img_root, tmp_path):
    root = ('--img_root', img_root, '--save_root', tmp_path, '--threads', 1)
    words = ('--t_name', 'resnet8', '--t_model', *halves, *DATA[:2], '--batch_size', 16, '--epochs', 1, *root)
    done = two('train_ka.py', '--ka_mode', 'layerwise', 'cfl', *words, '--note', 'two')
    assert done.code == 0, done.err
    assert json.loads((tmp_path / 'two' / 'cfl' / 'results.json').read_text())['processes'] == 2
    rooms = (
        '--data_name',
        'scenes:24',
        '--size',
        32,
        '--batch_size',
        8,
        '--epochs',
        1,
        '--epochs_ft',
        0,
        *root,
    )
    done = two('train_ka.py', '--ka_mode', 'scratch', *rooms, '--note', 'rooms')
    assert done.code == 0, done.err
    done = two('train_ka.py', '--ka_mode', 'soka', *words, '--note', 'soka')
    assert done.code == 2 and 'soka runs in one process only' in done.err


@pytest.fixture(scope='module')
def room_teachers(train, tmp_path_factory):
    root = tmp_path_factory.mktemp('rooms')
    for task in ('seg', 'depth', 'normal'):
        words = ('--tasks', task, '--epochs', 1, '--epochs_ft', 0, '--save_root', root, '--note', task)
        train('train_ka', '--ka_mode', 'scratch', *ROOMS, *words)
    return [root / task / 'scratch' / 'student.pt' for task in ('seg', 'depth', 'normal')]


def test_rooms_block_phase_selection_fine_tuning(script, room_teachers, tmp_path, monkeypatch):
    words = (
        '--ka_mode',
        'sbm',
        'scratch',
        *ROOMS,
        '--t_model',
        *room_teachers,
        '--epochs',
        2,
        '--epochs_ft',
        2,
    )
    done = script('train_ka', *words, '--note', 'whole')
    assert done.code == 0, done.err
    assert 'sbm: phase 1' in done.out and 'sbm: phase 2, branch points' in done.out
    result = json.loads((tmp_path / 'whole' / 'sbm' / 'results.json').read_text())
    assert {'miou', 'rmse', 'angle_mean', 'within_11', 'score'} <= result['last'].keys()
    assert len(result['branch_points']) == 3 and result['parameters'] < result['parameters_of_teachers']
    assert [teacher['task'] for teacher in result['teachers']] == ['seg', 'depth', 'normal']

    for count in (2, 3, 5):  # killed in the block phase, at its end, and while fine-tuning
        real, wrote = engine.record.write_atomic, []

        class Killed(BaseException):
            pass

        def dies(path, content, wrote=wrote, real=real, count=count, killed=Killed):
            wrote.append(path.name)
            if wrote.count('last.pt') == count:
                raise killed
            real(path, content)

        with monkeypatch.context() as patch:
            patch.setattr(engine.record, 'write_atomic', dies)
            with pytest.raises(Killed):
                script('train_ka', *words, '--note', f'cut{count}', '--resume', 'auto')
        assert script('train_ka', *words, '--note', f'cut{count}', '--resume', 'auto').code == 0
        for mode in ('sbm', 'scratch'):
            a, b = weights(tmp_path / 'whole' / mode), weights(tmp_path / f'cut{count}' / mode)
            assert same(a['net'], b['net']) and str(a['opt_all']) == str(b['opt_all'])


def test_rooms_without_labels(script, room_teachers, tmp_path, monkeypatch):
    words = ('--ka_mode', 'sbm', *ROOMS, '--t_model', *room_teachers, '--epochs', 1, '--epochs_ft', 1)
    assert script('train_ka', *words, '--note', 'with').code == 0
    real = dataset.Dense.train_batches

    def without(self, *rest):
        for img, labels, index, views in real(self, *rest):
            yield img, {task: torch.full_like(label, -1) for task, label in labels.items()}, index, views

    monkeypatch.setattr(dataset.Dense, 'train_batches', without)
    assert script('train_ka', *words, '--note', 'without').code == 0
    assert same(weights(tmp_path / 'with' / 'sbm')['net'], weights(tmp_path / 'without' / 'sbm')['net'])


MISTAKES = [
    (['concat', '--t_classes', '0-4', '4-9'], ['share the classes [4]']),
    (['concat', '--t_classes', '0-3', '4-9'], ['teacher 1', '[0, 1, 2, 3]', 'does not fit']),
    (['concat', '--t_classes', '0-3', '4-9'], ['differs: train it with train_base.py --classes 0-3, or say']),
    (['concat', '--num_parts', '3'], ['3 parts of the classes for 2 teachers']),
    (['concat', '--wanted', '0-3,77'], ['classes must be distinct']),
    (['customize'], ['wants teachers that share the classes']),
    (['concat', '--s_name', 'resnet9'], ['depth must be 6n + 2']),
    (['cofl'], ["no method is called 'cofl'"]),
    (['cfl', 'cfl'], ['named twice']),
    (['sbm'], ['not for --data_name shapes:96']),
    (['layerwise', '--ka_layers', 'rb5'], ['attaches to stage 5, a network has 3']),
    (['layerwise', '--ka_layers', '3'], ['expected rb1']),
    (['layerwise', '--s_name', 'ShuffleV1'], ['LayerwiseKA', 'must be']),
    (['cfl', '--ka_args', 'block=rnn'], ["block must be 'conv' or 'fc'"]),
    (['cfl', '--ka_args', 'width=3'], ["no argument 'width'"]),
    (['cfl', '--ka_args', 's_channels=3'], ['--ka_args: cfl']),
    (['concat', '--unlabeled', 'svhn'], ["no data set is called 'svhn'"]),
    (['concat', '--data_name', 'scenes', '--size', '40'], ['not for --data_name scenes']),
    (['sbm', '--data_name', 'scenes', '--pad', 'zero'], ['--pad: not for scenes', 'are not cropped']),
    (['sbm', '--data_name', 'scenes', '--s_init', 'x.pt'], ['--s_init: not for scenes']),
    (['sbm', '--data_name', 'scenes', '--limit_train', '8'], ['--limit_train: not for --data_name scenes']),
    (['concat', 'mse', '--lambda_kd', '3'], ['--lambda_kd: concat mse would not read it']),
    (['concat', '--ka_layers', 'rb2'], ['--ka_layers: concat would not read it']),
    (['concat', '--momentum', '0.5'], ['--momentum: --optim adam does not read it']),
    (['scratch', '--T', '2'], ['--T: scratch would not read it']),
    (['mse', '--T', '4'], ['--T: mse would not read it']),
    (['concat', '--tasks', 'seg'], ['--tasks: not for --data_name shapes:96']),
    (
        ['scratch', '--data_name', 'scenes:10', '--tasks', 'depth', 'depth'],
        ['--tasks depth depth: something'],
    ),
    (['cfl', '--lambda_ka', '0', '--lambda_kd', '0'], ['cfl: has nothing to learn']),
    (['concat', '--new_head'], ['--new_head: goes with --s_init FILE']),
    (['ensemble', '--lambda_ka', '3'], ['--lambda_ka: --ka_mode ensemble trains nothing']),
    (['ensemble', '--ka_args', 'T=2'], ['--ka_args: --ka_mode ensemble trains nothing']),
]


@pytest.mark.parametrize('words, said', MISTAKES, ids=lambda x: ' '.join(x)[:40])
def test_mistakes_are_one_line(ka, words, said):
    done = ka(*words)
    assert done.code == 2 and done.err.count('\n') == 1 and 'Traceback' not in done.err, done.err
    for part in said:
        assert part in done.err, done.err


def test_a_new_head(ka, tmp_path):
    """A student from weights that know other classes."""
    body = build('resnet8', 7)
    torch.save(body.state_dict(), tmp_path / 'seven.pt')
    done = ka('concat', '--s_init', tmp_path / 'seven.pt', epochs=1)
    assert (
        done.code == 2 and 'only the classifier differs: --s_init FILE --new_head keeps the rest' in done.err
    )
    done = ka('concat', 'cfl', '--s_init', tmp_path / 'seven.pt', '--new_head', '--note', 'n',
              '--lr', '1e-9', '--weight_decay', '0', epochs=1)  # fmt: skip
    assert done.code == 0 and done.out.count('a new classifier, left out: fc.weight, fc.bias') == 1
    for mode in ('concat', 'cfl'):
        net = torch.load(tmp_path / 'n' / mode / 'student.pt', weights_only=True)
        assert net['fc.weight'].shape[0] == 10
        torch.testing.assert_close(net['conv1.weight'], body.conv1.weight, rtol=0, atol=1e-6)


def test_bad_teachers_are_one_line(script, halves, tmp_path):
    base = ('train_ka', '--ka_mode', 'concat', '--t_name', 'resnet8', *DATA, '--epochs', 1)
    done = script(*base, '--t_model', halves[0])
    assert done.code == 2 and 'two teachers or more' in done.err
    done = script(*base, '--t_model', halves[0], tmp_path / 'nowhere.pt')
    assert done.code == 2 and 'teacher 2' in done.err and 'no such checkpoint' in done.err
    state = torch.load(halves[1], weights_only=True)
    state['fc.bias'][2] = float('nan')
    torch.save(state, tmp_path / 'nan.pt')
    done = script(*base, '--t_model', halves[0], tmp_path / 'nan.pt')
    assert done.code == 2 and 'not finite' in done.err and done.err.count('\n') == 1
    done = script('train_ka', '--ka_mode', 'sbm', *ROOMS, '--epochs', 1)
    assert done.code == 2 and 'one teacher per task' in done.err
    done = script('train_ka', '--ka_mode', 'sbm', *ROOMS[:2], '--size', '40', '--epochs', 1)
    assert done.code == 2 and 'multiples of 16' in done.err


def measured_again(script, line: str, img_root) -> str:
    """What tools/eval.py prints, called as the last line of a log says."""
    words = shlex.split(line.split('python tools/eval.py ')[1].split(' measures')[0])
    done = script('tools.eval', *words, '--threads', 1)
    assert done.code == 0 and str(img_root) in words, done.err
    return done.out


def test_parts_are_measured_afterwards(script, halves, img_root, tmp_path):
    """The end of the log has a command of tools/eval.py that gives the accuracy of the last epoch."""
    log = (halves[1].parent / 'log.txt').read_text()
    said = measured_again(script, log.splitlines()[-1], img_root)
    top1 = json.loads((halves[1].parent / 'results.json').read_text())['last']['top1']
    assert f'  {top1:6.2f}  ' in said and 'classes 5-9' in said
    torch.manual_seed(0)
    for part in range(2):
        torch.save(build('resnet8', 5).state_dict(), tmp_path / f'{part}.pt')
    words = ('--t_name', 'resnet8', '--t_model', tmp_path / '0.pt', tmp_path / '1.pt', *DATA, '--epochs', 1)
    done = script('train_ka', '--ka_mode', 'concat', *words, '--split', 'interleaved', '--note', 'odd')
    said = measured_again(script, done.out.splitlines()[-1], img_root)
    top1 = json.loads((tmp_path / 'odd' / 'concat' / 'results.json').read_text())['last']['top1']
    assert f'  {top1:6.2f}  ' in said and 'classes 0,2,4,6,8,1,3,5,7,9' in said
    done = script('tools.eval', '--net_name', 'resnet8', *DATA[:2], '--img_root', img_root, halves[1])
    assert done.code == 2 and '--classes LIST' in done.err
    done = script('tools.eval', '--net_name', 'resnet8', *DATA[:2], '--classes', '5-11', halves[1])
    assert done.code == 2 and 'must be distinct and lie in 0..9' in done.err, done.err


def built(line: str) -> nn.Module:
    """The network that the last line of a log builds and fills."""
    known = {}
    exec(line.split('; in Python: ')[1], known)
    return known['net']


def test_networks_of_rooms_are_loaded_as_the_log_says(script, tmp_path):
    for words in (('seg',), ('seg', 'depth', 'normal')):
        name = str(len(words))
        done = script('train_ka', '--ka_mode', 'scratch', *ROOMS, '--tasks', *words, '--epochs', 1,
                      '--epochs_ft', 0, '--note', name)  # fmt: skip
        assert 'best.pt is selected on test data' in done.out and '--val_split' not in done.out
        net = built(done.out.splitlines()[-1])
        assert isinstance(net, JointNet if len(words) == 3 else SegNet) and not net.training
        stored = torch.load(tmp_path / name / 'scratch' / 'student.pt', weights_only=True)
        assert same(net.state_dict(), stored)
    assert SegNet(6).shape() == ((64, 128, 256, 512, 512), (2, 2, 3, 3, 3))


def test_nothing_trained_with_ensemble_alone(ka, tmp_path):
    done = ka('ensemble', '--note', 'only')
    assert done.code == 0
    for name, row in json.loads((tmp_path / 'only/ensemble/results.json').read_text())['ensembles'].items():
        (line,) = [line for line in done.out.splitlines() if f'ensemble, {name}, ' in line]
        assert line.split()[-6:] == [
            word for key in ('top1', 'part1', 'part2') for word in (key, f'{row[key]:.2f}')
        ]
    assert [p.name for p in (tmp_path / 'only').iterdir() if p.is_dir()] == ['ensemble']


def test_a_loss_that_explodes_is_named(ka, monkeypatch):
    done = ka('concat', 'mse', '--lambda_ka', 'concat=1', 'mse=1e40', '--note', 'boom')
    assert done.code == 1 and 'mse: the loss' in done.err and 'not finite' in done.err


def test_a_feed_that_returns_the_loss_alone(ka, monkeypatch):
    row = replace(METHODS['mse'], feed=lambda *words: METHODS['mse'].feed(*words)[0])
    monkeypatch.setitem(engine.ka_build.KA, 'mine', row)
    done = ka('mine', epochs=1)
    assert done.code == 2 and done.err.count('\n') == 1, done.err
    assert (
        'mine: a feed of an amalgamation returns (loss, its terms)' in done.err and 'got Tensor' in done.err
    )


def test_teachers_of_rooms_in_another_order(script, tmp_path):
    torch.save(SegNet(1, (16, 32, 48, 64), (2, 2, 2, 2)).state_dict(), tmp_path / 'depth.pt')
    done = script('train_ka', '--ka_mode', 'sbm', *ROOMS, '--t_model', *3 * [tmp_path / 'depth.pt'])
    assert done.code == 2 and done.err.count('\n') == 1, done.err
    assert (
        'teacher of seg (segnet): ' in done.err and '--t_model follows --tasks seg depth normal' in done.err
    )


def test_random_parts_of_another_seed(script, tmp_path):
    _, test = dataset.load('shapes:10', tmp_path)
    for i, part in enumerate(split_classes(10, 2, 'random', 3)):
        names = [test.class_names[c] for c in part]
        torch.save(named_weights(build('resnet8', 5), names), tmp_path / f'{i}.pt')
    words = ('--ka_mode', 'ensemble', '--t_name', 'resnet8', *DATA, '--split', 'random')
    words += ('--t_model', tmp_path / '0.pt', tmp_path / '1.pt')
    done = script('train_ka', *words, '--seed', 4)
    assert done.code == 2 and 'draws the parts by --seed: say the teachers' in done.err, done.err
    assert script('train_ka', *words, '--seed', 3).code == 0


def test_classes_without_test_images_are_named(script, tmp_path):
    rng = np.random.default_rng(0)
    for half, classes in (('train', 10), ('test', 9)):
        labels = np.arange(40) % classes
        images = rng.integers(0, 255, (40, 16, 16, 3), np.uint8)
        np.savez(
            tmp_path / f'{half}.npz', images=images, labels=labels, class_names=[f'c{k}' for k in range(10)]
        )
    data = ('--data_name', 'arrays', '--img_root', tmp_path, '--batch_size', 4, '--epochs', 1)
    done = script('train_base', '--net_name', 'resnet8', '--classes', '9,8', *data, '--note', 'base')
    assert done.code == 0 and 'no test images of the classes [9 (c9)]: ' in done.out, done.err
    for i in range(2):
        torch.save(build('resnet8', 5).state_dict(), tmp_path / f'{i}.pt')
    words = (
        '--t_name',
        'resnet8',
        '--t_model',
        tmp_path / '0.pt',
        tmp_path / '1.pt',
        '--wanted',
        '0,9',
        *data,
    )
    with warnings.catch_warnings():
        warnings.simplefilter('error', RuntimeWarning)
        done = script('train_ka', '--ka_mode', 'concat', *words, '--draw', '--note', 'ka')
    assert done.code == 0 and 'no test images of the classes [9 (c9)]: ' in done.out, done.err
    assert not pictures.matrix(np.array([[np.nan, 3], [0, 0]]))[2, 2].any()  # black


def test_help_names_every_mode(script):
    done = script('train_ka', '--ka_mode', 'list')
    assert done.code == 0 and all(f'\n{name} ' in done.out for name in METHODS)


def test_main_is_flat():
    """The loop reads rows: no string of the script is the name of a method ("parts" is a word)."""
    import ast

    tree = ast.parse((ROOT / 'train_ka.py').read_text())
    words = {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
    assert not words & set(METHODS) - {'parts'}
    assert train_ka.ENSEMBLE not in METHODS


@pytest.mark.parametrize('setting', SETTINGS, ids=lambda setting: setting.name)
def test_every_setting_offers_what_is_asked_of_it(setting):
    """All that the protocol lists, in the class or set by its constructor; the script names no setting."""
    source = inspect.getsource(setting)
    assigned = ' '.join(re.findall(r'^ +(self\.[^=(]*) =', source, re.M))
    offered = set(vars(setting)) | set(re.findall(r'self\.(\w+)', assigned))
    asked = set(Setting.__annotations__) | {k for k, v in vars(Setting).items() if inspect.isfunction(v)}
    assert {key for key in asked if not key.startswith('_')} <= offered
    assert setting.data and all(setting_for(f'{data}:24', [setting.name]) is setting for data in setting.data)
    script = (ROOT / 'train_ka.py').read_text().split('"""', 2)[2]
    assert not re.search(rf"\b{setting.__name__}\b|'({'|'.join(setting.data)})'", script)


def test_every_row_fits_a_setting():
    names = {setting.name for setting in SETTINGS}
    assert all(set(method.needs.setting.split()) <= names for method in METHODS.values())


def test_updates_take_turns_after_a_tenth():
    when = METHODS['soka'].when
    assert when.updates_now(0.0) == when.updates_now(0.0999) == ('all',)
    assert when.updates_now(0.1) == when.updates_now(1.0) == ('competition', 'collaboration', 'balance')
    assert METHODS['concat'].when.updates_now(0.5) == ('all',)


# ------------------------------------------------------------------------------------------------- the rest


def test_federation(script, halves, tmp_path):
    """Rounds, selection, averaging; resumed equals undisturbed; labels of clients are not read."""
    words = ('--t_name', 'resnet8', '--t_model', *halves, '--s_name', 'resnet8', *DATA, '--epochs', 3,
             '--local_epochs', 1, '--select_every', 2, '--adapt_every', 2, '--adapt_epochs', 1)  # fmt: skip
    place = ('--img_root', tmp_path, '--save_root', tmp_path)
    done = script('tools.fedka', *words, *place, '--note', 'whole')
    assert done.code == 0, done.err
    result = json.loads((tmp_path / 'whole' / 'results.json').read_text())
    assert result['probe'] == 50 and 'probe_alone' in result and result['last']['epoch'] == 3
    drawn = [row['clients'] for row in rows(tmp_path / 'whole')]
    assert drawn[0] == drawn[1] and len(json.loads(drawn[0])) == 2
    real = engine.record.write_atomic

    class Killed(BaseException):
        pass

    def dies(path, content, count=[]):  # noqa: B006
        count.append(path.name)
        if count.count('last.pt') == 2:
            raise Killed
        real(path, content)

    from unittest import mock

    with mock.patch.object(engine.record, 'write_atomic', dies), pytest.raises(Killed):
        script('tools.fedka', *words, *place, '--note', 'cut')
    assert script('tools.fedka', *words, *place, '--note', 'cut', '--resume', 'auto').code == 0
    assert same(weights(tmp_path / 'whole')['net'], weights(tmp_path / 'cut')['net'])


def test_table_and_figures(ka, script, room_teachers, tmp_path):
    assert ka('cfl', 'scratch', '--ka_layers', 'rb2', 'rb3', '--note', 'run').code == 0
    done = script('report.ka', tmp_path / 'run', '--out', tmp_path / 'table')
    assert done.code == 0
    text = (tmp_path / 'table' / 'table.md').read_text()
    for word in ('teacher 1, resnet8', 'ensemble A', 'ensemble C', 'scratch (reads labels)', 'cfl'):
        assert word in text
    done = script('report.figures', tmp_path / 'run', '--out', tmp_path / 'figures')
    assert done.code == 0, done.err
    for name in ('space', 'curves', 'routing'):
        assert (tmp_path / 'figures' / f'{name}.png').stat().st_size > 5000
    with np.load(tmp_path / 'figures' / 'space.npz') as file:
        assert file['common'].shape == file['raw'].shape == (3 * len(file['label']), 2)
    drawn = script('report.figures', tmp_path, '--out', tmp_path / 'figures')  # from the arrays alone
    assert drawn.code == 0 and drawn.out.count('figure:') == 3
    words = ('--ka_mode', 'sbm', *ROOMS, '--t_model', *room_teachers, '--epochs', 1, '--epochs_ft', 1)
    assert script('train_ka', *words, '--note', 'rooms').code == 0
    assert script('report.figures', tmp_path / 'rooms', '--out', tmp_path / 'panels').code == 0
    assert (tmp_path / 'panels' / 'panels.png').stat().st_size > 5000
    assert script('report.ka', tmp_path / 'rooms', '--out', tmp_path / 'panels').code == 0
    text = (tmp_path / 'panels' / 'table.md').read_text()
    assert 'the teachers, one per task' in text and 'sbm, after the block phase' in text


class Detector(nn.Module):
    """A DETR for toys: three convolutions, two encoder and two decoder layers, ten queries."""

    def __init__(self, classes: int, chunks: int = 1, dim: int = 32) -> None:
        super().__init__()
        sizes = ((3, 16), (16, 32), (32, dim))
        self.body = nn.Sequential(
            *(nn.Sequential(nn.Conv2d(a, b, 3, 2, 1), nn.BatchNorm2d(b), nn.ReLU()) for a, b in sizes)
        )
        self.proj = nn.Conv2d(dim, chunks * dim, 1)
        self.position = nn.Parameter(torch.randn(1, 16, dim) * 0.1)
        layers = {'d_model': dim, 'nhead': 4, 'dim_feedforward': 64, 'dropout': 0.0, 'batch_first': True}
        self.encoder = nn.ModuleList(nn.TransformerEncoderLayer(**layers) for _ in range(2))
        self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(**layers), 2)
        self.queries = nn.Parameter(torch.randn(1, 10, dim))
        self.kind, self.box, self.chunks = nn.Linear(dim, 1 + classes), nn.Linear(dim, 4), chunks

    def forward(self, img):
        chunks = self.proj(self.body(img)).flatten(2).transpose(1, 2).chunk(self.chunks, dim=2)
        tokens = torch.cat([chunk + self.position for chunk in chunks], dim=1)
        levels = [tokens]
        for layer in self.encoder:
            levels.append(layer(levels[-1]))
        found = self.decoder(self.queries.expand(len(img), -1, -1), levels[-1])
        sequences = [level.transpose(0, 1) for level in levels]
        return {'logits': self.kind(found), 'boxes': self.box(found).sigmoid()}, sequences


def detection_loss(out, kinds, boxes, columns):
    """DETR's loss with labels, on the classes that a teacher knows."""
    from ka_losses.transformer_ka import TaskAmalgamation, detr_ce, giou

    loss = TaskAmalgamation([list(range(out['logits'].shape[2] - 1))], out['logits'].shape[2] - 1)
    targets = []
    for kind, box in zip(kinds, boxes):
        known = [i for i, k in enumerate(kind.tolist()) if k in columns]
        label = torch.tensor([columns[int(kind[i])] for i in known], dtype=torch.long)
        targets.append({'labels': label, 'boxes': box[known], 'logits': None})
    pairs = loss.match(out, targets)
    labels = torch.zeros(out['logits'].shape[:2], dtype=torch.long)
    distance = out['boxes'].sum() * 0
    for n, ((source, wanted), target) in enumerate(zip(pairs, targets)):
        labels[n, source] = target['labels'][wanted]
        got, want = out['boxes'][n, source], target['boxes'][wanted]
        distance = distance + 5 * (got - want).abs().sum() + 2 * (1 - giou(got, want)).sum()
    return detr_ce(out['logits'], labels) + distance / max(sum(len(t['labels']) for t in targets), 1)


def test_detectors_are_amalgamated():
    """Two toy DETRs, one for boxes, one for spheres and cylinders; a student learns both without labels."""
    from ka_losses.transformer_ka import SeqHint, TaskAmalgamation, compress_tokens

    torch.manual_seed(0)
    scenes = [scene(i, size=32)[0] for i in range(24)]
    img = torch.from_numpy(np.stack(scenes)) - 0.5
    kinds, boxes = zip(*[map(torch.from_numpy, objects(i, size=32)) for i in range(24)])
    teachers = []
    for columns in ({0: 1}, {1: 1, 2: 2}):
        net = Detector(len(columns))
        opt = torch.optim.AdamW(net.parameters(), 2e-3)
        for _ in range(60):
            opt.zero_grad()
            detection_loss(net(img)[0], kinds, boxes, columns).backward()
            opt.step()
        teachers.append(net.eval().requires_grad_(False))
    tasks = [[0], [1, 2]]
    student = Detector(3, chunks=2)
    amalgamation, hints = TaskAmalgamation(tasks, 3), nn.ModuleList(SeqHint(2, 32) for _ in range(3))
    opt = torch.optim.AdamW([*student.parameters(), *hints.parameters()], 2e-3)
    looked = [net(img) for net in teachers]
    outs_t, sequences = [out for out, _ in looked], list(zip(*(levels for _, levels in looked)))
    assert sum(len(t['labels']) for t in amalgamation.targets(outs_t)) > 20  # the teachers find something
    history = []
    for _ in range(100):
        opt.zero_grad()
        out, levels = student(img)
        loss, terms = amalgamation(out, outs_t, return_terms=True)
        hint = sum(h(seq, seqs) for h, seq, seqs in zip(hints, levels, sequences))
        (loss + hint).backward()
        opt.step()
        history.append([float(loss.detach()), float(hint.detach()), float(terms['giou'].detach())])
    first, last = np.mean(history[:3], axis=0), np.mean(history[-3:], axis=0)
    assert (last < 0.8 * first).all(), (first, last)
    targets = amalgamation.targets(outs_t)
    agree = []  # on objects of either teacher, in the student's numbering
    for n, (source, wanted) in enumerate(amalgamation.match(out, targets)):
        likely = out['logits'][n, source, 1:].argmax(dim=1) + 1
        agree += list(zip(targets[n]['labels'][wanted].tolist(), likely.tolist()))
    assert {label for label, _ in agree} >= {1, 2} and np.mean([a == b for a, b in agree]) > 0.6
    assert compress_tokens(list(sequences[0])).shape == (24, 16)


def test_unlearnt_classes_leave_the_feature():
    """Sub-task extraction on clusters: wanted classes are kept, the others become hard to read."""
    from ka_losses.subtask import SubTask

    def left(lam: float) -> tuple[float, float]:
        torch.manual_seed(0)
        target = torch.arange(240) % 4
        centres = torch.randn(4, 8) * 3
        x = centres[target] + torch.randn(240, 8)
        out_t = 4 * torch.nn.functional.one_hot(target, 4).float()
        body, head, spy = nn.Sequential(nn.Linear(8, 16), nn.ReLU()), nn.Linear(16, 2), nn.Linear(16, 2)
        loss = SubTask([0, 1], 4, lambda_adv=lam, adv_cap=1.5)
        opt = torch.optim.Adam([*body.parameters(), *head.parameters()], 5e-3)
        opt_spy = torch.optim.Adam(spy.parameters(), 2e-2)
        for _ in range(400):
            feat = body(x)
            opt.zero_grad()
            loss(head(feat), spy(feat), out_t).backward()
            opt.step()
            opt_spy.zero_grad()
            (loss.adv_loss(spy(feat.detach()), out_t) / max(lam, 1e-9)).backward()
            opt_spy.step()
        kept = (head(body(x)).argmax(1) == target)[target < 2].float().mean()
        with torch.no_grad():
            distance = torch.nn.functional.kl_div(
                spy(body(x)).log_softmax(1), out_t[:, 2:].softmax(1), reduction='batchmean'
            )
        return float(kept), float(distance)

    kept, known = left(1e-9)
    kept_too, unknown = left(2.0)
    assert kept > 0.95 and kept_too > 0.9 and unknown > 2 * known


def test_what_cannot_be_joined_exactly_is_refused():
    circular = nn.Conv2d(4, 4, 3, padding=1, padding_mode='circular')
    x = torch.randn(2, 8, 6, 6)
    wanted = torch.cat([circular(part) for part in x.chunk(2, dim=1)], dim=1)
    torch.testing.assert_close(combine_convs([circular, circular])(x), wanted)
    bad = [
        (combine_convs, [circular, nn.Conv2d(4, 4, 3, padding=1)]),
        (combine_bns, [nn.BatchNorm2d(4), nn.BatchNorm2d(4, eps=0.1)]),
        (combine_bns, [nn.BatchNorm2d(4, affine=False)] * 2),
        (combine_bns, [nn.BatchNorm2d(4), nn.BatchNorm2d(4, track_running_stats=False)]),
    ]
    for combine, parts in bad:
        with pytest.raises(ValueError, match='equal'):
            combine(parts)


def test_a_joined_network_has_hooks_of_its_own():
    nets, seen = [nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU()) for _ in 'ab'], []
    joined = combine_models(nets)
    joined.register_forward_hook(lambda *_: seen.append('joined'))
    joined[1].register_forward_hook(lambda *_: seen.append('a part of it'))
    nets[0](torch.randn(1, 3, 2, 2))
    assert not seen
    joined(torch.randn(1, 6, 2, 2))
    assert seen == ['a part of it', 'joined']


def test_networks_that_do_not_join_are_refused():
    with pytest.raises(ValueError, match='equal levels and widths'):
        JointNet([SegNet(1, (4, 6), (1, 1)), SegNet(1, (4, 8), (1, 1))])


def test_cfl_attaches_to_every_stage_that_is_asked_for():
    nets = [build('resnet8', k).eval() for k in (5, 3, 2)]
    s, *all_t = (net(torch.randn(4, 3, 16, 16), True) for net in nets)
    row = METHODS['cfl']
    ka = row.build(row.loss, SimpleNamespace(s=s, all_t=all_t, layers=(2, 3)))
    batch = SimpleNamespace(layers=(2, 3))
    loss, terms = row.feed(ka, s, all_t, batch)
    each = [ka[i](s.fms[k], [t.fms[k] for t in all_t]) for i, k in enumerate((2, 3))]
    assert len(ka) == 2 and ka[0].channels[0] < ka[1].channels[0]
    torch.testing.assert_close(loss, sum(each))
    assert set(terms) == {'mmd', 'recons'}


def test_the_temperature_of_soft_targets_is_theirs(ka, tmp_path):
    """--T is that of concat itself, where nothing stands beside it."""
    for T, note in ((1, 'one'), (4, 'four')):
        done = ka('concat', '--epochs', 1, '--T', T, '--note', note)
        assert done.code == 0, done.err
    one, four = (weights(tmp_path / note / 'concat') for note in ('one', 'four'))
    assert not same(one['net'], four['net'])


def test_labels_and_classes_that_are_not_there(ka):
    for words, said in (
        (('scratch', '--unlabeled', 'shapes:96'), 'images have none'),
        (('customize', '--t_classes', '0-4', '3-7', '--wanted', '0-4'), 'all classes of --wanted'),
    ):
        done = ka(*words, '--epochs', 1)
        assert done.code == 2 and said in done.err and done.err.count('\n') == 1, done.err
