"""Attributes: the faces, CelebA's files, teachers of attributes, backbones and their probes."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import dataset
from dataset.attributes import attribute_figures, majority
from dataset.celeba import read_attributes, read_partition
from dataset.faces import NAMES, face
from ka_settings.backbones import Task, accuracy, fit_probe
from models import build
from models.streams import StreamNet
from tests.conftest import ROOT
from tests.test_train import rows, same, weights

FACES = ('--data_name', 'faces:48', '--size', '16', '--batch_size', '24', '--epochs', '1')


def test_faces_are_the_golden_ones():
    with np.load(ROOT / 'tests/golden/attributes.npz') as z:
        for j, index in enumerate(z['in_index']):
            image, attributes = face(int(index), int(z['hp_seed']), int(z['hp_size']))
            assert (np.abs(image - z['out_image'][j]) > 1e-5).mean() <= 0.002
            assert (attributes == z['out_attr'][j]).all()
        made = [face(index, int(z['hp_seed']), int(z['hp_size'])) for index in range(50, 80)]
        assert np.mean([image for image, _ in made]) == pytest.approx(float(z['out_mean_image']), abs=1e-6)
        assert (np.sum([a for _, a in made], axis=0, dtype=int) == z['out_attr_counts']).all()


def test_halves_of_the_faces(img_root):
    """Teachers, students and tests see different faces; labels are those of the images."""
    labelled, val, test = dataset.load_attributes('faces:20', img_root, 'cpu', 16, labelled=True)
    other, _, again = dataset.load_attributes('faces:20', img_root, 'cpu', 16, labelled=False)
    assert val is None and len(labelled) == len(other) == 20 and len(test) == 6
    assert torch.equal(test.images, again.images) and not torch.equal(labelled.images, other.images)
    image, attributes = face(10003, size=16)
    assert torch.equal(other.targets[3], torch.from_numpy(attributes).long())
    assert (other.images[3].permute(2, 0, 1) / 255 - torch.from_numpy(image)).abs().max() <= 0.5 / 255 + 1e-6
    two = labelled.take(['Smiling', 'Bangs'])
    assert two.num_classes == 4 and two.class_names == ['not Smiling', 'Smiling', 'not Bangs', 'Bangs']
    columns = [NAMES.index('Smiling'), NAMES.index('Bangs')]
    img, target, index, _ = next(two.train_batches(8, 0, 0))
    assert img.shape == (8, 3, 16, 16) and torch.equal(target, labelled.targets[index][:, columns])
    part, held = two.split(0.25, 1)
    assert part.names == held.names == ['Smiling', 'Bangs'] and len(held) == 5
    for bad, said in (['Glasses'], "'Glasses'"), (['Bangs', 'Bangs'], 'once'), ([], 'none'):
        with pytest.raises(ValueError, match=said):
            labelled.take(bad)
    for bad in ('faces:9', 'faces:x', 'nobody'):
        with pytest.raises(ValueError, match='no data set'):
            dataset.load_attributes(bad, img_root, 'cpu', 16, labelled=True)


def write_celeba(root, values, parts):
    """The authors' folders: a count, names, then rows whose columns are one or two spaces apart."""
    for folder in ('Anno', 'Eval', 'Img/img_align_celeba'):
        (root / folder).mkdir(parents=True)
    lines = [str(len(values)), 'Bald Smiling Young ']
    for i, row in enumerate(values, 1):
        lines.append(f'{i:06d}.jpg ' + ' '.join(f'{2 * v - 1:2d}' for v in row))  # "-1  1 -1"
        pixels = np.zeros((218, 178, 3), np.uint8)
        pixels[:20], pixels[198:] = 255, 255  # outside the middle square
        pixels[20:198, :, 0] = 20 * i
        Image.fromarray(pixels).save(root / 'Img/img_align_celeba' / f'{i:06d}.jpg', quality=95)
    (root / 'Anno/list_attr_celeba.txt').write_text('\n'.join(lines) + '\n')
    text = ''.join(f'{i:06d}.jpg {part}\n' for i, part in enumerate(parts, 1))
    (root / 'Eval/list_eval_partition.txt').write_text(text)


def test_celeba_in_its_own_format(tmp_path):
    values = [[0, 1, 1], [1, 0, 0], [0, 0, 1], [1, 1, 0], [0, 1, 0]]
    write_celeba(tmp_path / 'celeba', values, [0, 0, 1, 2, 0])
    assert '-1  1' in (tmp_path / 'celeba/Anno/list_attr_celeba.txt').read_text()
    train, val, test = dataset.load_attributes('celeba', tmp_path, 'cpu', 24, labelled=True)
    assert train.names == ['Bald', 'Smiling', 'Young'] and len(train) == 3 and len(val) == len(test) == 1
    assert train.targets.tolist() == [values[0], values[1], values[4]]
    assert val.targets.tolist() == [values[2]] and test.targets.tolist() == [values[3]]
    red = train.images.float().mean(dim=(1, 2))
    torch.testing.assert_close(red[:, 0], torch.tensor([20.0, 40, 100]), atol=4, rtol=0)
    assert train.images[..., 1:].max() < 60, 'nothing but the middle square'
    train, _, _ = dataset.load_attributes('celeba:10', tmp_path, 'cpu', 24, labelled=False)
    assert len(train) == 3


@pytest.mark.parametrize('below', ['celeba', '.'])
def test_celeba_without_its_folders(below, tmp_path):
    """As torchvision.datasets.CelebA lays it out."""
    place = tmp_path / below
    write_celeba(place, [[0, 1, 1], [1, 0, 0], [1, 1, 0]], [0, 1, 2])
    for path in ('Anno/list_attr_celeba.txt', 'Eval/list_eval_partition.txt', 'Img/img_align_celeba'):
        (place / path).rename(place / path.rpartition('/')[2])
    parts = dataset.load_attributes('celeba', tmp_path, 'cpu', 16, labelled=True)
    assert [part.targets.tolist() for part in parts] == [[[0, 1, 1]], [[1, 0, 0]], [[1, 1, 0]]]


def test_celeba_says_what_is_wrong(tmp_path):
    with pytest.raises(ValueError, match='not there, nor below celeba, nor without the folders Anno'):
        dataset.load_attributes('celeba', tmp_path, 'cpu', 16, labelled=True)
    file = tmp_path / 'list.txt'
    for text, said in (
        ('', 'number of images'),
        ('x\nBald Young\n', 'number of images'),
        ('2\nBald Young\n1.jpg 1 -1\n', '2 images'),
        ('1\nBald Young\n1.jpg 1\n', 'line 3'),
        ('1\nBald Young\n1.jpg 1 0\n', '-1 or 1'),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=said):
            read_attributes(file)
    file.write_text('1.jpg 0\n2.jpg 3\n')
    with pytest.raises(ValueError, match='line 2'):
        read_partition(file)
    write_celeba(tmp_path, [[0, 1, 1], [1, 0, 0]], [0, 0])
    with pytest.raises(ValueError, match='no image'):
        dataset.load_attributes('celeba', tmp_path, 'cpu', 16, labelled=True)
    (tmp_path / 'Img/img_align_celeba/000002.jpg').write_bytes(b'no picture')
    with pytest.raises(ValueError, match='000002.jpg'):
        dataset.load_attributes('celeba', tmp_path, 'cpu', 16, labelled=True)


def test_attribute_figures_by_hand():
    says = torch.tensor([[1, 0, 1], [1, 1, 1], [1, 0, 1], [0, 0, 1]])
    target = torch.tensor([[1, 0, 1], [1, 0, 1], [0, 0, 1], [0, 1, 1]])
    out = nn.functional.one_hot(says, 2).float().flatten(1)
    read = attribute_figures(out, target, ['a', 'b', 'c'])
    assert read['accuracy_a'] == 75 and read['balanced_a'] == 75
    assert read['accuracy_b'] == 50 and read['balanced_b'] == pytest.approx(100 / 3)
    assert read['accuracy_c'] == 100 and 'balanced_c' not in read, 'all test images are of one class'
    assert read['accuracy'] == 75 and read['balanced'] == pytest.approx((75 + 100 / 3) / 2)
    assert majority(target, ['a', 'b', 'c']) == {'a': 50, 'b': 75, 'c': 100}


# ------------------------------------------------------------------------------------------------- streams


def test_streams_share_the_trunk_and_leave_it_where_told():
    """With closed filters (gates of a half): block by block, then the teacher's own blocks and classifier."""
    torch.manual_seed(0)
    nets = [build('resnet8', k).eval() for k in (6, 4)]
    joint = StreamNet(nets, [[0, 1], [2, 3]]).eval()
    for filters in joint.filters:
        for gate in filters:
            nn.init.zeros_(gate.w2.weight)
    x = torch.randn(2, 3, 16, 16)
    y = torch.relu(nets[0].bn1(nets[0].conv1(x)))
    maps = []
    for stage in (nets[0].layer1, nets[0].layer2, nets[0].layer3):
        (block,) = stage
        branch = block.bn2(block.conv2(torch.relu(block.bn1(block.conv1(y)))))
        y = torch.relu(branch + 0.5 * (y if block.downsample is None else block.downsample(y)))
        maps.append(y)
    out = joint(x, [2, 0])
    torch.testing.assert_close(out[0], nets[0].fc(maps[2].mean(dim=(2, 3)))[:, :2])
    y = maps[0]
    for block in (*nets[1].layer2, *nets[1].layer3):
        y = torch.relu(block(y))
    torch.testing.assert_close(out[1], nets[1].fc(y.mean(dim=(2, 3)))[:, 2:])
    assert torch.equal(joint(x)[0], joint(x, [2, 2])[0])
    whole = joint.parameters_in_use()
    joint.choose([0, 0])
    assert joint.parameters_in_use() != whole and not torch.equal(joint(x)[0], out[0])
    with pytest.raises(ValueError, match='one depth'):
        StreamNet([nets[0], build('resnet14', 4)])


def test_streams_rest_in_the_block_phase():
    joint = StreamNet([build('resnet8', 2), build('resnet8', 4)])
    joint.train()
    joint.freeze(True)
    before = {k: v.clone() for k, v in joint.branches.state_dict().items()}
    sum(out.square().mean() for out in joint(torch.randn(4, 3, 8, 8), [0, 1])).backward()
    torch.optim.SGD(joint.parameters(), 0.1).step()
    assert same(before, joint.branches.state_dict())  # batch norm's statistics included
    joint.freeze(False)
    joint(torch.randn(4, 3, 8, 8), [0, 1])
    assert not same(before, joint.branches.state_dict())


# -------------------------------------------------------------------------------------------------- probes


def test_probes_know_what_is_linear_and_nothing_else():
    g = torch.Generator().manual_seed(0)
    label = torch.randint(3, (300,), generator=g)
    feat = torch.randn(300, 5, generator=g) + 4 * nn.functional.one_hot(label, 5)
    target = torch.tensor([7, 2, 5])[label]
    task = Task('t', [2, 7], False, None)
    labels = task.labels(target)
    assert (task.heads, task.choices) == (1, 2)
    assert torch.equal(labels[:, 0], torch.tensor([1, 0, -1])[label])
    fitted = fit_probe(feat[:200], labels[:200], 2)
    assert accuracy(fitted(feat[200:]), labels[200:]) > 95
    noise = torch.randn(300, 5, generator=g)
    assert accuracy(fit_probe(noise[:200], labels[:200], 2)(noise[200:]), labels[200:]) < 75
    both = Task('a', [1, 0], True, None)
    answers = torch.stack([label == 0, label != 2], dim=1).long()
    assert (both.heads, both.choices) == (2, 2) and torch.equal(both.labels(answers), answers.flip(1))
    assert accuracy(fit_probe(feat[:200], answers[:200], 2)(feat[200:]), answers[200:]) > 95


# ------------------------------------------------------------------------------------------------- trainer


@pytest.fixture(scope='module')
def sources(train, tmp_path_factory):
    """Three resnet8, each trained for an epoch on some attributes: {their list: file}."""
    root, made = tmp_path_factory.mktemp('sources'), {}
    for number, names in enumerate(('Bangs,Smiling', 'Pale_Skin,Bangs', 'Eyeglasses')):
        train('train_ka', '--ka_mode', 'scratch', '--s_name', 'resnet8', *FACES, '--attributes',
              *names.split(','), '--save_root', root, '--note', f'source{number}')  # fmt: skip
        made[names] = root / f'source{number}' / 'scratch' / 'student.pt'
    return made


def teachers(made, *names):
    return ('--t_name', 'resnet8', '--t_model', *(made[name] for name in names), '--t_attributes', *names)


def result(folder) -> dict:
    return json.loads((folder / 'results.json').read_text())


def test_two_rounds_of_attributes(script, sources, tmp_path, monkeypatch):
    """Sources to component to target, and streams; labels are not read; the table names what it shows."""
    shared, apart = list(sources)[:2], [list(sources)[0], list(sources)[2]]
    words = (
        'train_ka',
        '--ka_mode',
        'customize',
        '--attributes',
        'Bangs',
        *teachers(sources, *shared),
        *FACES,
    )
    assert script(*words, '--note', 'a').code == 0
    one = result(tmp_path / 'a' / 'customize')
    assert one['attributes'] == ['Bangs'] and {'accuracy_Bangs', 'balanced'} <= one['last'].keys()
    rated = result(tmp_path / 'a' / 'ensemble')
    assert set(rated['ensembles']) == {'source 1', 'source 2', 'the surest source'}
    assert sum(rated['ensembles'][f'source {i}']['surest_of'] for i in (1, 2)) == pytest.approx(100)
    for i, names in enumerate(shared):  # cut to the right logits: what the source itself reached
        own = result(sources[names].parent)['last']['accuracy_Bangs']
        assert rated['ensembles'][f'source {i + 1}']['accuracy'] == pytest.approx(own)
    assert one['class_names'] == ['not Bangs', 'Bangs']

    component = {'Bangs': tmp_path / 'a' / 'customize' / 'student.pt', 'Eyeglasses': sources['Eyeglasses']}
    words = ('train_ka', '--ka_mode', 'customize_target', 'each_attribute', '--attributes', 'Eyeglasses',
             'Bangs', *teachers(component, *component), *FACES)  # fmt: skip
    assert script(*words, '--note', 'b').code == 0
    assert result(tmp_path / 'b' / 'each_attribute')['attributes'] == ['Eyeglasses', 'Bangs']
    words = ('train_ka', '--ka_mode', 'afk', 'scratch', '--attributes', 'Bangs', 'Eyeglasses', '--epochs_ft',
             1, *teachers(sources, *apart), *FACES)  # fmt: skip
    done = script(*words, '--note', 'c')
    assert done.code == 0 and 'phase 2, branch points' in done.out
    assert {'stream0', 'stream1', 'loss'} <= rows(tmp_path / 'c' / 'afk')[0].keys()
    assert len(result(tmp_path / 'c' / 'afk')['branch_points']) == 2
    (line,) = [line for line in done.out.splitlines() if 'in Python: ' in line]
    known = {}
    exec(line.split('; in Python: ')[1], known)  # as a reader of the log would
    assert known['net'].columns == [[0, 1], [0, 1]]
    assert same(known['net'].state_dict(), torch.load(tmp_path / 'c/afk/student.pt', weights_only=True))

    real = dataset.Attributes.train_batches

    def without(self, *words):
        for img, target, index, views in real(self, *words):
            yield img, torch.full_like(target, -1), index, views

    monkeypatch.setattr(dataset.Attributes, 'train_batches', without)
    assert script(*(w for w in words if w != 'scratch'), '--note', 'd').code == 0
    assert same(weights(tmp_path / 'c' / 'afk')['net'], weights(tmp_path / 'd' / 'afk')['net'])
    assert script('report.ka', *(tmp_path / x for x in 'abc'), '--out', tmp_path / 'table').code == 0
    text = (tmp_path / 'table' / 'table.md').read_text()
    for word in (
        'majority vote',
        'the surest source',
        'streams leave after block',
        'Balanced',
    ):
        assert word in text


def test_mistakes_with_attributes_are_one_line(script, sources, tmp_path):
    first, second, third = sources

    def refused(*words, said):
        done = script('train_ka', '--ka_mode', *words, *FACES)
        assert done.code == 2 and done.err.count('\n') == 1 and said in done.err, done.err

    refused('concat', *teachers(sources, first, second), said='not for --data_name')
    refused('customize', said='--t_attributes: needs as many')
    refused(
        'customize', '--attributes', 'Smiling', *teachers(sources, first, third), said='teacher 2 knows none'
    )
    refused('customize', *teachers(sources, first, second), said='all know all')
    twice = teachers(sources, first, first)
    refused('customize', '--attributes', *first.split(','), *twice, said='for one attribute')
    refused(
        'each_attribute', '--attributes', 'Bangs', 'Wearing_Hat', *teachers(sources, first), said='no teacher'
    )
    swapped = teachers({'Smiling,Bangs': sources[first], second: sources[second]}, 'Smiling,Bangs', second)
    refused('customize', '--attributes', 'Bangs', *swapped, said='teacher 1')
    refused('scratch', '--attributes', 'Glasses', said="no attribute is called 'Glasses'")
    refused('scratch', '--t_classes', '0', said='--t_classes: not for')
    refused(
        'scratch',
        '--attributes',
        'Bangs',
        '--s_name',
        'resnet8',
        '--s_init',
        sources[first],
        said='--new_head',
    )


def test_backbones_learn_from_unlike_teachers(script, tmp_path):
    """Parts of the shapes; one teacher is torchvision's through a Tap. Alone as beside another."""
    shapes = ('--data_name', 'shapes:60', '--batch_size', '20', '--epochs', '1')
    torch.manual_seed(0)
    names = ('resnet8', 'torchvision:shufflenet_v2_x0_5')
    for name, classes in zip(names, (5, 3)):
        torch.save(build(name, classes).state_dict(), tmp_path / f'{classes}.pt')
    words = ('--t_name', *names, '--t_model', tmp_path / '5.pt', tmp_path / '3.pt', '--t_classes', '0-4',
             '7-9', '--s_name', 'resnet8', *shapes)  # fmt: skip
    assert script('train_ka', '--ka_mode', 'radio', 'unic', 'scratch', *words, '--note', 'all').code == 0
    for mode in ('radio', 'unic', 'scratch'):
        read = result(tmp_path / 'all' / mode)
        assert {'task1', 'task2', 'mean'} <= read['last'].keys() and len(read['probes']) == 2
    rated = result(tmp_path / 'all' / 'ensemble')
    assert set(rated['ensembles']) == {'teacher 1', 'teacher 2', 'untrained student'}
    assert rated['teachers'][1]['task'] == 'crescent, ell, tee'
    for mode in ('unic', 'radio'):
        assert script('train_ka', '--ka_mode', mode, *words, '--note', mode).code == 0
        one, other = weights(tmp_path / 'all' / mode), weights(tmp_path / mode / mode)
        assert same(one['net'], other['net']) and same(
            *({k: v for k, v in w['ka'].items() if isinstance(v, torch.Tensor)} for w in (one, other))
        )
    assert script('report.ka', tmp_path / 'all', '--out', tmp_path / 'table').code == 0
    assert 'linear probes of' in (tmp_path / 'table' / 'table.md').read_text()
    done = script('train_ka', '--ka_mode', 'radio', 'cfl', *words)
    assert done.code == 2 and '--ka_mode radio: not in one run with cfl; run it by itself' in done.err
    done = script('train_ka', '--ka_mode', 'sbm', *words)
    assert done.code == 2 and 'not for --data_name shapes:60; there are concat, ' in done.err
    assert 'radio' in done.err and 'sbm,' not in done.err
    done = script('train_ka', '--ka_mode', 'radio', '--wanted', '0-3', *words)
    assert done.code == 2 and '--wanted: not for --ka_mode radio on --data_name shapes:60' in done.err
