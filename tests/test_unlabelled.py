"""Images without labels: noisy student and active mixup, as docs/unlabelled.md has them, small."""

import json
import re
import shlex
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import dataset
from dataset.arrays import read_arrays
from dataset.labels import NO_LABEL
from dataset.mixup import SHARES, all_pairs, hardest, mix
from methods.kd import KD
from tests.conftest import ROOT
from tests.test_data import write_folder
from tools.tree import arranged, changes

PAGE = (ROOT / 'docs' / 'unlabelled.md').read_text()
BLOCKS = {title: text for title, text in re.findall(r'## (.*?)\n(.*?)(?=\n## |\Z)', PAGE, re.S)}


def small(words: list[str], save, root) -> list[str]:
    """The same command on 96 shapes, for one epoch, with resnet8."""
    made = [re.sub(r'^save/', f'{save}/', 'resnet8' if word.startswith('resnet') else word) for word in words]
    for flag, value in {'--real': '17', '--select': '20', '--label_epochs': '1', '--epochs': '1',
                        '--batch_size': '16'}.items():  # fmt: skip
        if flag in made:
            made[made.index(flag) + 1] = value
    if 'cifar10' in made:
        made[made.index('cifar10')] = 'shapes:96'
        made += ['--img_root', str(root)]
    return [*made, '--threads', '1']


@pytest.mark.parametrize('title', ['Noisy student', 'Active mixup'])
def test_the_commands_of_the_page_train(script, tmp_path, img_root, title):
    lines = re.search(r'```bash\n(.*?)```', BLOCKS[title], re.S)[1].replace('\\\n', ' ').splitlines()
    assert len(lines) >= 4
    for python, name, *words in map(shlex.split, filter(None, lines)):
        words = small(words, tmp_path, img_root)
        if name.startswith('train'):
            words += ['--epochs', '1', '--batch_size', '16']
        done = script(name.removesuffix('.py').replace('/', '.'), *words)
        assert python == 'python' and done.code == 0, (name, words, done.err)
    note = words[words.index('--note') + 1]
    (path,) = (tmp_path / note).rglob('results.json')
    result = json.loads(path.read_text())
    assert 'labels)' in result['teacher'] and len(result['curve']) == 1


def test_a_share_keeps_its_labels(img_root):
    train, _ = dataset.load('shapes:96', img_root)
    some = dataset.forget_labels(train, 0.25, 2)
    kept = some.targets != NO_LABEL
    assert len(some) == 96 and kept.sum() == 24 and torch.equal(some.targets[kept], train.targets[kept])
    assert torch.equal(some.images, train.images)
    assert torch.equal(dataset.forget_labels(train, 0.25, 2).targets, some.targets)
    assert not torch.equal(dataset.forget_labels(train, 0.25, 3).targets, some.targets)
    part = dataset.only_labelled(some)
    assert len(part) == 24 and torch.equal(part.images, train.images[kept])
    assert dataset.only_labelled(train) is train
    with pytest.raises(ValueError, match='no labelled images'):
        dataset.only_labelled(train.subset(torch.arange(5), torch.full((96,), NO_LABEL)))


def test_unlabelled_images_count_in_distillation_only(script, teacher, tmp_path):
    """Cross-entropy leaves them out; a method that needs all labels says so."""
    from engine.student import Student

    step = Student(torch.nn.Linear(2, 3), [], None)
    out = torch.randn(4, 3, requires_grad=True)
    target = torch.tensor([1, NO_LABEL, 2, NO_LABEL])
    step.all_labelled = False
    wanted = torch.nn.functional.cross_entropy(out[[0, 2]], target[[0, 2]])
    torch.testing.assert_close(step.cross_entropy(out, target), wanted)
    none = step.cross_entropy(out, torch.full((4,), NO_LABEL))
    none.backward()
    assert none == 0 and not out.grad.any()

    words = ('train_kd', '--t_name', 'resnet8', '--t_model', teacher, '--s_name', 'resnet8', '--data_name',
             'shapes:96', '--batch_size', '32', '--epochs', '1', '--labelled', '0.1')  # fmt: skip
    done = script(*words, '--kd_mode', 'st', 'fkd_labels_strong', '--note', 'a')
    assert done.code == 0 and '87 of 96 training images have no label' in done.out, done.err
    for mode in ('sla', 'st+cskd'):
        done = script(*words, '--kd_mode', mode, '--note', 'b')
        assert done.code == 2 and 'needs the labels of all images, and 87 have none' in done.err
        assert done.err.count('\n') == 1


@pytest.mark.parametrize(
    'name', ['st', 'abkd', 'akl', 'distillm', 'fdistill_tvd', 'gkd', 'minillm_rkl', 'taid']
)
def test_losses_that_read_logits_only_learn_from_unlabelled_images(name):
    """For texts, a label of -100 masks a position; an image without a label is taught all the same."""
    train = SimpleNamespace(steps=lambda batch_size: 5)
    probe = SimpleNamespace(epochs=2, train_set=train, batch_size=8, num_classes=3)
    kd = KD[name].build(KD[name].loss, probe)
    out_s, out_t = torch.randn(8, 3, requires_grad=True), torch.randn(8, 3)
    batch = SimpleNamespace(target=torch.tensor([0, 1, 2, *[NO_LABEL] * 5]), epoch=1, epochs=2)
    KD[name].feed(kd, SimpleNamespace(out=out_s), SimpleNamespace(out=out_t), batch).backward()
    assert out_s.grad.any(dim=1).all()


def test_a_folder_of_unlabelled_images(script, tmp_path):
    """train/_unlabelled: no class; the teacher labels it, the student learns it, train_base.py does not."""
    root = write_folder(tmp_path / 'images')
    (root / 'train' / '_unlabelled' / 'deep').mkdir(parents=True)
    pictures = sorted((root / 'train').glob('*/*.*'))[:4]
    for k, path in enumerate(pictures):
        new = root / 'train' / '_unlabelled' / 'deep' / f'{k}{path.suffix}'
        new.write_bytes(path.read_bytes())
    train, _ = dataset.load('folder', root, image_size=32)
    plain = len(train) - 4
    assert train.num_classes == 3 and train.targets[-4:].tolist() == [NO_LABEL] * 4
    assert len(dataset.only_labelled(train)) == plain
    data = ('--data_name', 'folder', '--img_root', root, '--image_size', 32, '--workers', 0)
    base = ('--net_name', 'resnet8', '--epochs', 1, '--batch_size', 4, '--note', 't')
    done = script('train_base', *data, *base)
    assert done.code == 0 and f'{plain} + ' in done.out, done.err
    teacher = tmp_path / 't' / 'net.pt'
    labels = ('--kind', 'hard', '--label_epochs', 1, '--out', tmp_path / 'labels', '--threads', 1)
    done = script('tools.pseudo_labels', *data, '--t_name', 'resnet8', '--t_model', teacher, *labels)
    assert done.code == 0, done.err
    assert len(np.load(tmp_path / 'labels' / 'epoch_0000' / 'index.npy')) == len(train)
    kd = ('--kd_mode', 'fkd_labels', '--soft_labels', tmp_path / 'labels', '--s_name', 'resnet8')
    done = script('train_kd', *data, *kd, '--epochs', 1, '--batch_size', 4, '--note', 's')
    assert done.code == 0 and f'4 of {len(train)} training images have no label' in done.out, done.err


def test_the_hardest_mixes_are_found():
    """Against every pair and share by itself."""
    images = torch.randint(256, (7, 4, 4, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    pairs = all_pairs(7)
    assert len(pairs) == 21 and len({frozenset(pair) for pair in pairs.tolist()}) == 21

    def top(pictures):
        return (pictures.float().mean((1, 2, 3)) - pictures[:, 0, 0, 0].float()).abs() / 255

    found, shares = hardest(top, images, pairs, 5, batch=4)
    every = []
    for pair in pairs:
        values = [float(top(mix(images, pair[None], torch.tensor([share])))) for share in SHARES]
        every.append((min(values), pair.tolist(), SHARES[values.index(min(values))]))
    every.sort(key=lambda row: row[0])
    assert found.tolist() == [pair for _, pair, _ in every[:5]]
    assert shares.tolist() == pytest.approx([share for *_, share in every[:5]])
    whole = mix(images, torch.tensor([[0, 1]]), torch.tensor([0.3]))[0].float()
    assert (whole - (0.3 * images[0].float() + 0.7 * images[1].float())).abs().max() <= 0.5


def test_arrays_of_ones_own(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
    names = np.array(['a', 'b'])

    def write(half, **more):
        np.savez(tmp_path / f'{half}.npz', **({'images': images, 'labels': np.arange(6) % 2} | more))

    write('train', class_names=names), write('test')
    train, test = dataset.load('arrays', tmp_path)
    assert len(train) == len(test) == 6 and train.class_names == ['a', 'b'] and train.num_classes == 2
    img, *_ = next(train.test_batches(6))
    torch.testing.assert_close(img.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    assert len(dataset.load_test('arrays', tmp_path)) == 6
    write(
        'train', class_names=names, labels=np.array([0, 1, -100, 0, 1, 1]), mean=np.zeros(3), std=np.ones(3)
    )
    assert read_arrays(tmp_path)[2]['mean'] == (0, 0, 0)
    assert dataset.load('arrays', tmp_path)[0].targets[2] == NO_LABEL
    for half, more, said in (
        ('test', {'labels': np.array([0, 1, -100, 0, 1, 1])}, 'label -100 is none of 0..1'),
        ('test', {'labels': np.array([0, 1, 2, 0, 1, 1])}, 'label 2 is none of 0..1'),
        ('test', {'images': images[..., :1]}, 'images must be'),
        ('test', {'images': images[:0], 'labels': np.arange(0)}, 'test.npz: has no images'),
        ('test', {'labels': np.arange(6) % 2 * 1.0}, 'labels must be integers, got float64'),
        ('test', {'class_names': names[::-1]}, 'class_names are not those of train.npz, or in another order'),
    ):
        write(half, **more)
        with pytest.raises(ValueError, match=said):
            dataset.load('arrays', tmp_path)
    (tmp_path / 'train.npz').write_text('x')
    with pytest.raises(ValueError, match='cannot be read as arrays'):
        dataset.load('arrays', tmp_path)


def test_other_files_of_the_same_name_are_another_run(script, tmp_path):
    """arrays and folder do not say which images they are: the recipe does."""
    images = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
    for half in ('train', 'test'):
        np.savez(tmp_path / f'{half}.npz', images=images, labels=np.arange(6) % 2, class_names=['a', 'b'])
    write_folder(tmp_path)
    common = ('--net_name', 'resnet8', '--batch_size', 3, '--img_root', tmp_path)
    for data in ('arrays', 'folder'):
        words = (
            'train_base',
            '--data_name',
            data,
            *common,
            '--workers',
            0,
            '--note',
            data,
            '--resume',
            'auto',
            *(('--image_size', 32) if data == 'folder' else ()),
        )
        assert script(*words, '--epochs', 1).code == 0
        recipe = json.loads((tmp_path / data / 'results.json').read_text())['recipe']
        assert len(recipe['own_images']) == 12
        if data == 'arrays':
            np.savez(
                tmp_path / 'train.npz', images=images + 1, labels=np.arange(6) % 2, class_names=['a', 'b']
            )
        else:
            next((tmp_path / 'train').glob('*/*.png')).unlink()
        done = script(*words, '--epochs', 1)
        assert (
            done.code == 2
            and 'cannot resume, the images of --img_root are others; --note NAME starts' in done.err
        )
        last = torch.load(tmp_path / data / 'last.pt', weights_only=True)
        del last['args']['own_images']  # as checkpoints were before
        last['args'].pop('own_scale', None)  # of arrays
        torch.save(last, tmp_path / data / 'last.pt')
        assert script(*words, '--epochs', 1).code == 0


@pytest.mark.parametrize(
    'words,said',
    [
        ('--real 500', '--real 500: there are 96 training images'),
        ('--real 9 --s_name resnet8', '--s_name and --s_model: give both'),
        ('--real 9 --select 5', '--select: no mixes are chosen without --s_model'),
        ('--real 9 --pairs 5', '--pairs: no mixes are chosen without --s_model'),
        ('--real 9 --data_name arrays', 'train.npz: cannot be read as arrays'),
    ],
)
def test_mistakes_with_mixes(script, tmp_path, img_root, words, said):
    words = ('--data_name', 'shapes:96', '--img_root', img_root, '--out', tmp_path / 'x', *words.split())
    done = script('tools.select_mixup', *words)
    assert done.code == 2 and said in done.err and done.err.count('\n') == 1, done.err


def test_a_part_of_cifar():
    for name, said in (('cifar10:60000', 'there are'), ('cifar10:x', 'no data set')):
        with pytest.raises(ValueError, match=f'{said}|no cifar10'):
            dataset.load(name, ROOT / 'data')


def test_the_tree_of_tdd(script, train_kd, tmp_path):
    """Groups of last.pt, class by class; a figure; a run without tdd is refused in one line."""
    done = train_kd('tdd+st', 'st', '--kd_args', 'tdd.threshold=0.9', '--note', 'trees')
    assert done.code == 0, done.err
    runs = tmp_path / 'trees'
    done = script('tools.tree', '--run', runs / 'tdd+st', '--out', tmp_path / 'out')
    assert done.code == 0, done.err
    facts = json.loads((tmp_path / 'out' / 'tree.json').read_text())
    kd = torch.load(runs / 'tdd+st' / 'last.pt')['kd']
    (levels,) = (x for name, x in kd.items() if name.endswith('class_to_group'))
    names = json.loads((runs / 'tdd+st' / 'results.json').read_text())['class_names']
    assert len(facts['stages']) == len(levels)
    for level, groups in zip(levels.tolist(), facts['stages']):
        wanted = {frozenset(names[c] for c in range(len(names)) if level[c] == g) for g in set(level)}
        assert {frozenset(group) for group in groups} == wanted and sum(map(len, groups)) == len(names)
    assert (tmp_path / 'out' / 'tree.png').stat().st_size > 3000
    done = script('tools.tree', '--run', runs / 'st', '--out', tmp_path / 'out')
    assert done.code == 2 and 'has no groups of tdd' in done.err and done.err.count('\n') == 1


def test_companions_stand_together_and_changes_are_counted():
    levels = [[0, 1, 0, 1, 2], [0, 1, 2, 1, 3], [0, 1, 2, 3, 1]]
    stages = arranged(levels)
    assert stages[0] == [[1, 3], [4], [0, 2]]  # 4 beside 1, with whom it ends
    assert stages[1] == [[1, 3], [4], [0], [2]] and sorted(map(sorted, stages[2])) == [[0], [1, 4], [2], [3]]
    assert changes(stages[0], stages[1]) == 0 and changes(stages[1], stages[2]) == 1


def test_what_a_box_and_a_policy_do_inside(script, train_kd, teacher, tmp_path, img_root):
    """sdb with and without its key, sakd's spots: JSON and figure; other runs are refused in one line."""
    done = train_kd('sakd', 'sdb', 'sdb_student', '--note', 'k')
    assert done.code == 0, done.err
    data = ('--data_name', 'shapes:96', '--img_root', img_root, '--threads', 1, '--out', tmp_path / 'out')
    pair = ('--s_name', 'resnet8', '--t_name', 'resnet8', '--t_model', teacher)
    done = script('tools.spots', '--run', tmp_path / 'k' / 'sakd', *pair, *data)
    assert done.code == 0, done.err
    facts = json.loads((tmp_path / 'out' / 'spots.json').read_text())
    assert facts['spots'][-1] == 'logits' and len(facts['chance']) == 4
    assert all(0 <= chance <= 1 for row in facts['by_class'].values() for chance in row)
    done = script('tools.spots', '--run', tmp_path / 'k' / 'sdb', *pair, *data)
    assert done.code == 2 and 'has no policy of sakd' in done.err and done.err.count('\n') == 1

    box = ('--t_name', 'resnet8', '--t_model', tmp_path / 'k' / 'sdb' / 'student.pt')
    result = tmp_path / 'k' / 'sdb_student' / 'results.json'
    done = script('tools.box', *box, *data, '--results', f'with the key={result}')
    assert done.code == 0, done.err
    facts = json.loads((tmp_path / 'out' / 'box.json').read_text())
    assert set(facts['box']) == {'plain images', 'its key', 'another key'}
    assert facts['students']['with the key']['top1'] == json.loads(result.read_text())['last']['top1']
    assert train_kd('sdb_student', '--kd_args', 'key=7', '--note', 'other').code == 0
    done = train_kd('sdb_student', '--kd_args', 'key=x', '--note', 'bad')
    assert done.code == 2 and "key='x' of sdb_student has the wrong type" in done.err
    for name in ('box', 'spots'):
        assert (tmp_path / 'out' / f'{name}.png').stat().st_size > 3000
    done = script('tools.box', *box, *data, '--results', 'nothing')
    assert done.code == 2 and 'expected NAME=FILE' in done.err and done.err.count('\n') == 1


def test_pools_of_other_images_do_not_mix(script, tmp_path, img_root):
    words = ('--data_name', 'shapes:96', '--img_root', img_root, '--out')
    pool = ('--earlier', tmp_path / 'a')
    assert script('tools.select_mixup', *words, tmp_path / 'a', '--real', 9).code == 0
    done = script('tools.select_mixup', *words, tmp_path / 'b', '--real', 8, *pool)
    assert done.code == 2 and 'its real was 9, is 8 here' in done.err and done.err.count('\n') == 1, done.err
    done = script('tools.select_mixup', *words, tmp_path / 'b', '--real', 9, *pool)
    assert done.code == 0, done.err


def test_a_mix_of_several_pools_is_there_once(script, teacher, tmp_path, img_root):
    """A later pool holds the mixes of an earlier one, too, and a student may choose one again."""
    words = ('--data_name', 'shapes:96', '--img_root', img_root, '--real', 9, '--threads', 1, '--out')
    student = ('--s_name', 'resnet8', '--s_model', teacher, '--select', 3)
    places = {name: tmp_path / name for name in 'abc'}
    for name, more in (
        ('a', student),
        ('b', ('--earlier', places['a'], *student)),
        ('c', ('--earlier', places['b'], places['a'])),
    ):
        done = script('tools.select_mixup', *words, places[name], *more)
        assert done.code == 0 and '9 real images and 3 mixes' in done.out, done.err + done.out
        assert json.loads((places[name] / 'pool.json').read_text())['mixes'] == 3
    a, c = (np.load(places[name] / 'train.npz')['images'] for name in 'ac')
    assert np.array_equal(a, c), 'in their order'


def test_the_mean_of_a_data_set_needs_little_memory():
    """Of bytes, without a copy in another precision; images of any number and size."""
    import tracemalloc

    from dataset.arrays import _mean_and_std

    images = np.random.default_rng(0).integers(0, 256, (6000, 32, 32, 3), dtype=np.uint8)
    tracemalloc.start()
    mean, std = _mean_and_std(images)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < images.nbytes / 2
    np.testing.assert_allclose(mean, images.mean(axis=(0, 1, 2)) / 255, rtol=1e-12)
    np.testing.assert_allclose(std, images.std(axis=(0, 1, 2)) / 255, rtol=1e-9)
    np.testing.assert_allclose(
        _mean_and_std(images[:1])[0], images[:1].mean(axis=(0, 1, 2)) / 255, rtol=1e-12
    )
