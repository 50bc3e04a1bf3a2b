"""Grafting, the tree of classes, concepts: what their networks compute, and the tools, killed and resumed."""

import json
import shutil
import sys

import pytest
import torch
from torch import nn

import dataset
import models
import transferability as tr
from models.grafting import Grafted, parts_of
from models.kdexplainer import KDExplainer
from tests.conftest import ROOT, Killed

DATA = ('--data_name', 'shapes:96', '--threads', 1)


@pytest.fixture
def tool(script, monkeypatch, img_root, tmp_path):
    """tool('graft', teacher, words...) -> exit code, out, err, started as from the folder tools/."""
    monkeypatch.syspath_prepend(ROOT / 'tools')

    def call(name, teacher, *words):
        monkeypatch.delitem(sys.modules, name, raising=False)
        place = ('--img_root', img_root, '--save_root', tmp_path)
        return script(f'tools.{name}', '--t_name', 'resnet8', '--t_model', teacher, *DATA, *place, *words)

    return call


def moved(net: nn.Module) -> nn.Module:
    """Statistics and biases that a fresh network does not have."""
    for bn in (m for m in net.modules() if isinstance(m, nn.BatchNorm2d)):
        bn.running_mean.normal_()
        bn.bias.data.normal_()
    return net


# ----------------------------------------------------------------------------------------------- grafting


@pytest.mark.parametrize('t_name,s_name', [('resnet14', 'resnet8x4'), ('vgg11', 'vgg8')])
def test_a_network_is_its_parts_and_grafts_merge(t_name, s_name):
    torch.manual_seed(0)
    teacher, student = (moved(models.build(name, 5)).eval() for name in (t_name, s_name))
    img = torch.randn(2, 3, 32, 32)
    wanted = teacher(img)
    torch.testing.assert_close(nn.Sequential(*parts_of(student))(img), student(img))
    net = Grafted(teacher, student, first=2).eval()
    assert torch.equal(net(img), wanted)
    for numbers in ((2,), (2, 3), tuple(net.numbers)):
        out = net.use(numbers)(img)
        assert out.shape == (2, 5) and not torch.allclose(out, wanted)
    small = net.merged().eval()
    torch.testing.assert_close(small(img), out, rtol=1e-4, atol=1e-4)
    assert torch.equal(net(img), out), 'merged() is a copy'
    assert sum(isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1) for m in small) == len(net.grafts)


def test_the_teacher_stays_as_it_is():
    """Whatever trains: its batch norms move no statistics, and no gradient reaches it."""
    net = Grafted(models.build('resnet8', 5), models.build('resnet8', 5), first=1)
    before = {k: v.clone() for k, v in net.teacher.state_dict().items()}
    net.use((1, 2)).train()
    net(torch.randn(4, 3, 32, 32)).sum().backward()
    assert all(torch.equal(v, before[k]) for k, v in net.teacher.state_dict().items())
    assert all(p.grad is None for p in net.teacher.parameters())
    has = [all(p.grad is not None for p in graft.parameters()) for graft in net.grafts]
    assert has == [True, True, False, False] and not net.grafts[2].part.training


def test_mistakes_with_grafts():
    def build(*names, **more):
        Grafted(*(models.build(name, 5) for name in names), **more)

    for names, more, said in (
        (('resnet8', 'vgg8'), {}, 'stages as the teacher has, got 5'),
        (('resnet8', 'resnet8'), {'first': 0}, 'first must be 1 to 3'),
        (('wrn_16_1', 'resnet8'), {}, 'must be a resnet or vgg of CIFAR, got WRN'),
    ):
        with pytest.raises(ValueError, match=said):
            build(*names, **more)


def test_few_images_are_nested():
    train, _ = dataset.load('patterns:60')
    one, three = (dataset.few_per_class(train, n, seed=3) for n in (1, 3))
    assert torch.equal(torch.bincount(three.targets), torch.full((train.num_classes,), 3))
    rows = {img.numpy().tobytes() for img in three.images}
    assert all(img.numpy().tobytes() in rows for img in one.images)
    other = dataset.few_per_class(train, 3, seed=4)
    assert not torch.equal(other.images, three.images)


GRAFT = ('--s_name', 'resnet8', '--shots', 1, 2, '--block_epochs', 2, '--net_epochs', 2, '--test_images', 10)


def test_graft_killed_between_phases_ends_alike(tool, script, teacher, tmp_path, monkeypatch):
    done = tool('graft', teacher, *GRAFT, '--note', 'whole')
    assert done.code == 0, done.err
    whole = json.loads((tmp_path / 'whole' / 'results.json').read_text())
    ways = [(row['shots'], row['way']) for row in whole['rows'] if row['last']]
    assert ways == [(n, way) for n in (1, 2) for way in ('grafted', 'at once', 'alone')]
    assert len({row['steps'] for row in whole['rows'] if row['way'] != 'grafted'}) == 1
    total = sum(row['steps'] for row in whole['rows'] if row['way'] == 'grafted' and row['shots'] == 1)
    assert total == next(row['steps'] for row in whole['rows'] if row['way'] == 'at once')
    assert (tmp_path / 'whole' / 'few-shot.png').stat().st_size > 10_000

    import tools.graft

    fit, calls = tools.graft.fit, []

    def killed(*words):
        calls.append(words)
        if len(calls) == 5:
            raise Killed
        return fit(*words)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(tools.graft, 'fit', killed)
        tool('graft', teacher, *GRAFT, '--note', 'cut')
    done = tool('graft', teacher, *GRAFT, '--note', 'cut', '--resume', 'auto')
    assert done.code == 0 and '4 of 14 phases done' in done.out, done.err + done.out
    cut = json.loads((tmp_path / 'cut' / 'results.json').read_text())

    def plain(rows):
        return [{k: v for k, v in row.items() if k != 'seconds'} for row in rows]

    assert plain(cut['rows']) == plain(whole['rows'])
    a, b = (torch.load(tmp_path / note / 'student-2-s2.pt', weights_only=True) for note in ('whole', 'cut'))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    net = Grafted(models.build('resnet8', 10), models.build('resnet8', 10)).merged()
    net.load_state_dict(a)
    files = [tmp_path / note / 'results.json' for note in ('whole', 'cut')]
    done = script('report.explain', *files, '--out', tmp_path / 'both.png')
    assert done.code == 2 and 'seed 2 with 1 per class is there twice' in done.err, done.err
    for row in cut['rows']:
        row['seed'] = 3
    cut['recipe'] |= {'seeds': [3], 'net_epochs': 9}
    files[1].write_text(json.dumps(cut))
    done = script('report.explain', *files, '--out', tmp_path / 'both.png')
    said = 'results with net_epochs 2 and net_epochs 9: no seeds of one run'
    assert done.code == 2 and done.err.count('\n') == 1 and said in done.err, done.err
    cut['recipe'] |= {'net_epochs': 2}
    files[1].write_text(json.dumps(cut))
    done = script('report.explain', *files, '--out', tmp_path / 'both.png')
    assert done.code == 0 and (tmp_path / 'both.png').stat().st_size > 10_000, done.err
    done = script('report.explain', tmp_path / 'cut' / 'last.pt', '--out', tmp_path / 'none.png')
    assert done.code == 2 and done.err.count('\n') == 1 and 'cannot be read as JSON' in done.err


def test_committed_grafts_are_of_one_recipe(script, tmp_path):
    files = sorted((ROOT / 'results' / 'cifar10-seeds-rest').glob('graft*.json'))
    done = script('report.explain', *files, '--out', tmp_path / 'x.png')
    assert done.code == 0 and len(files) == 3, done.err


@pytest.mark.parametrize(
    'words,said',
    [
        ('graft --s_name vgg8', 'stages as the teacher has'),
        ('graft --s_name resnet8 --shots 40', 'images only'),
        ('graft --s_name resnet8 --shots 0', '--shots'),
        ('graft --s_name resnet8 --first 7', 'first must be 1 to 3'),
        ('kdexplainer --batch_size 4000', 'training images only'),
        ('kdexplainer --batch_size 32 --blocks 2 2 2 2 2 2', 'too often'),
        ('knowledge --batch_size 32 --s_name resnet8x4 --epochs 2', 'the teacher has'),
        ('knowledge --s_name resnet8 --epochs 2 --checkpoints 1 9', 'two or more'),
        ('knowledge --s_name resnet8 --grid 5', '6 or more'),
    ],
)
def test_mistakes_with_these_tools(tool, teacher, words, said):
    name, *words = words.split()
    done = tool(name, teacher, *words)
    assert done.code == 2 and done.err.count('\n') == 1 and said in done.err, done.err + done.out


# ----------------------------------------------------------------------------------------------- the tree


def test_a_cold_search_is_the_frozen_tree():
    torch.manual_seed(0)
    net = KDExplainer(5, (2, 3), width=8, last=4).eval()
    moved(net)
    img = torch.randn(2, 3, 16, 16)
    warm = net(img)
    assert warm.shape == (2, 5) and not net.frozen
    net.temperature = 1e-4
    cold = net(img)
    net.freeze()
    assert net.frozen and [len(p) for p in net.parents] == [3, 5]
    torch.testing.assert_close(net(img), cold, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(warm, cold)
    for parents, route in zip(net.parents, net.routes):
        assert torch.equal(parents, route.argmax(dim=1)) and not route.requires_grad


def test_blocks_that_nobody_reads_are_left_out():
    net = KDExplainer(3, (2, 4), width=8, last=4)
    for i, parents in enumerate(([0, 0, 1, 1], [2, 2, 3])):
        net.parents[i].copy_(torch.tensor(parents))
    assert net.used() == [[1], [2, 3], [0, 1, 2]]
    net(torch.randn(2, 3, 16, 16)).sum().backward()
    trained = [[block[0].weight.grad is not None for block in level] for level in net.levels]
    assert trained == [[False, True], [False, False, True, True]]


def test_two_logits_a_head_and_mistakes():
    net = KDExplainer(3, (2,), width=8, last=4, head='nce').eval()
    net.freeze()
    img = torch.randn(2, 3, 16, 16)
    assert net.heads[0][-1].out_features == 2 and net(img).shape == (2, 3)
    for more in ({'head': 'softmax'}, {'blocks': ()}, {'blocks': (2, 0)}):
        with pytest.raises(ValueError, match=r'must be .*got .*: '):
            KDExplainer(3, **more)


TREE = ('--width', 8, '--last', 4, '--epochs', 2, '--tree_epochs', 2, '--batch_size', 32)


def test_the_tree_killed_in_both_stages_ends_alike(tool, teacher, tmp_path, monkeypatch):
    done = tool('kdexplainer', teacher, *TREE, '--note', 'whole')
    assert done.code == 0, done.err
    whole = json.loads((tmp_path / 'whole' / 'results.json').read_text())
    assert sorted(c for group in whole['groups'] for c in group['classes']) == sorted(
        dataset.load('shapes:96', tmp_path)[0].class_names
    )
    assert (tmp_path / 'whole' / 'tree.png').stat().st_size > 10_000
    assert [len(p) for p in whole['tree']['parents']] == [4, 8, 10]

    import tools.kdexplainer

    epoch, calls = tools.kdexplainer.one_epoch, []

    def killed(*words):
        calls.append(words)
        if len(calls) in (2, 4):
            raise Killed
        return epoch(*words)

    for _ in range(2):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(tools.kdexplainer, 'one_epoch', killed)
            tool('kdexplainer', teacher, *TREE, '--note', 'cut', '--resume', 'auto')
    done = tool('kdexplainer', teacher, *TREE, '--note', 'cut', '--resume', 'auto')
    assert done.code == 0, done.err
    cut = json.loads((tmp_path / 'cut' / 'results.json').read_text())
    assert all(cut[k] == whole[k] for k in ('tree', 'groups', 'curves', 'parameters'))
    a, b = (torch.load(tmp_path / n / 'tree' / 'net.pt', weights_only=True) for n in ('whole', 'cut'))
    assert all(torch.equal(a[k], b[k]) for k in a)


# ----------------------------------------------------------------------------------------------- concepts


def test_noise_goes_where_the_layer_does_not_look():
    """A layer that reads the left half: its cells bear little, those of the right half much."""
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 4, 3, padding=1).requires_grad_(False)
    img = torch.rand(3, 16, 16)
    words = {'grid': 4, 'steps': 40, 'batch': 8, 'lr': 1e-4}
    looks = [tr.discard_entropy(lambda x: conv(x)[..., :8], img, generator=torch.Generator().manual_seed(1),
                                **words) for _ in range(2)]  # fmt: skip
    assert torch.equal(*looks)
    h = tr.entropy(looks[0])
    assert h[:, 2:].min() > h[:, :2].max() + 0.2
    assert abs(float(h.mean()) + 2.8) < 0.2
    assert tr.discard_entropy(lambda x: conv(x) * 0, img, **words) is None
    with pytest.raises(ValueError, match='must be finite'):
        tr.discard_entropy(lambda x: conv(x) * torch.nan, img, **words)
    with pytest.raises(ValueError, match=r'must be \(C, H, W\)'):
        tr.discard_entropy(conv, img[None], **words)


def test_concepts_of_a_made_up_training():
    """Two images, three checkpoints; concepts appear in the middle one, one is forgotten."""
    foreground = torch.tensor([[1, 1], [0, 0]])
    low, high = 0.01, 0.02
    sigmas = torch.full((2, 3, 2, 2), high).double()
    sigmas[:, 1, 0] = low  # both cells of the foreground
    sigmas[:, 2, 0, 0] = low  # one of them still
    found = tr.concepts(sigmas, foreground)
    assert found['fore'].tolist() == [[0, 2, 1]] * 2 and not found['back'].any()
    made = tr.metrics(found, tr.distances([0, 1.5, 1, 1], [0, 2, 3]))
    wanted = {'fore': 1, 'back': 0, 'ratio': 1, 'fore_mean': 2.5, 'fore_var': 0, 'fore_slope': 2 / 2.5}
    wanted |= {'fore_share': 0.5, 'back_share': 0, 'total_share': 0.5, 'back_mean': 0}
    assert made | wanted == made
    assert made['back_slope'] != made['back_slope'], 'at no distance: there is none'
    assert tr.effective(sigmas, foreground).all() and not tr.effective(sigmas, 1 - foreground).any()
    assert tr.central_square(8, 8).sum() == 36
    for call in (
        lambda: tr.concepts(sigmas, torch.ones(2, 2)),
        lambda: tr.concepts(sigmas, torch.ones(3, 3)),
        lambda: tr.metrics(found, torch.zeros(4)),
    ):
        with pytest.raises(ValueError, match=r'(?s)must .*got .*: '):
            call()


KNOWLEDGE = ('--s_name', 'resnet8', '--epochs', 2, '--checkpoints', 0, 1, 2, '--batch_size', 32)
KNOWLEDGE += ('--probes', 3, '--noise_steps', 24, '--noise_batch', 4, '--grid', 6, '--test_images', 10)


def test_knowledge_killed_and_resumed(tool, teacher, tmp_path, monkeypatch):
    import tools.knowledge

    monkeypatch.setattr(tr.knowledge, 'effective', lambda s, _: torch.ones(len(s), dtype=torch.bool))
    done = tool('knowledge', teacher, *KNOWLEDGE, '--note', 'whole')
    assert done.code == 0, done.err
    whole = json.loads((tmp_path / 'whole' / 'results.json').read_text())
    assert whole['images_that_count'] == 3 and whole['labels']['distance'][0] == 0
    assert whole['labels']['distance'] == sorted(whole['labels']['distance'])
    assert whole['labels']['counts_fore'][0] == whole['distilled']['counts_fore'][0], 'equal initial weights'
    for name in ('concepts.png', 'panels.png'):
        assert (tmp_path / 'whole' / name).stat().st_size > 5_000

    for name, at in (('one_epoch', 2), ('scales', 5)):
        plain, calls = getattr(tools.knowledge, name), []

        def killed(*words):
            calls.append(words)  # noqa: B023
            if len(calls) == at:  # noqa: B023
                raise Killed
            return plain(*words)  # noqa: B023

        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(tools.knowledge, name, killed)
            tool('knowledge', teacher, *KNOWLEDGE, '--note', 'cut', '--resume', 'auto')
    done = tool('knowledge', teacher, *KNOWLEDGE, '--note', 'cut', '--resume', 'auto')
    assert done.code == 0, done.err
    cut = json.loads((tmp_path / 'cut' / 'results.json').read_text())
    assert all(cut[way] == whole[way] for way in ('labels', 'distilled'))


def test_a_tree_resumed_from_the_folder_of_a_group(tool, teacher, tmp_path, monkeypatch):
    """--resume PATH: its search goes on, its tree had not begun."""
    import tools.kdexplainer

    monkeypatch.setattr(tools.kdexplainer, 'draw', lambda *_: None)
    done = tool('kdexplainer', teacher, *TREE, '--note', 'whole')
    assert done.code == 0, done.err
    shutil.copytree(tmp_path / 'whole' / 'search', tmp_path / 'cut' / 'search')
    checkpoint = torch.load(tmp_path / 'cut' / 'search' / 'last.pt', weights_only=True)
    checkpoint['args'].pop('stage', None)  # older ones have none
    torch.save(checkpoint, tmp_path / 'cut' / 'search' / 'last.pt')
    done = tool('kdexplainer', teacher, *TREE, '--note', 'on', '--resume', tmp_path / 'cut')
    assert done.code == 0, done.err
    done = tool(
        'kdexplainer', teacher, *TREE, '--note', 'x', '--resume', tmp_path / 'cut' / 'search' / 'last.pt'
    )
    assert done.code == 2 and "stage was 'search', is 'tree'" in done.err, done.err
