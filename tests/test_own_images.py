"""Images of one's own: what is said where they, their numbers or their files are not what they were."""

import json
import sys
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import dataset
import models
from dataset.arrays import read_arrays
from dataset.folder import cores, decoded
from dataset.resident import Resident
from dataset.views import VIEWS, View
from engine.data import own_scale
from engine.recipe import load_checkpoint
from kd_losses.fkd_labels import kept
from models.checkpoint import load_weights

RUN = ('--data_name', 'arrays', '--epochs', 1, '--batch_size', 4, '--threads', 1)


def write_arrays(root, top: int = 256, number: int = 12, **more):
    """Both halves: three classes of noise from 0 to below `top`."""
    root.mkdir(exist_ok=True)
    images = np.random.default_rng(0).integers(0, top, (number, 8, 8, 3), dtype=np.uint8)
    names = np.array(['a', 'b', 'c'])
    for half in ('train', 'test'):
        np.savez(root / f'{half}.npz', images=images, labels=np.arange(number) % 3, class_names=names, **more)
    return root


@pytest.fixture
def trained(script, tmp_path):
    """(folder of the images, folder of a network that they trained)"""
    root = write_arrays(tmp_path / 'images')
    done = script('train_base', *RUN, '--net_name', 'resnet8', '--img_root', root, '--note', 'base')
    assert done.code == 0, done.err
    return root, tmp_path / 'base'


def test_weights_keep_how_their_images_were_normalised(script, trained, tmp_path):
    """Other numbers than these are said in a line, with what to do; none where they are the same."""
    root, base = trained
    said = (base / 'log.txt').read_text().splitlines()[-1]
    assert "', 3) is the network, for images normalised with mean (0.4" in said and ' std (0.2' in said
    dark = write_arrays(tmp_path / 'dark', top=64)
    kd = ('train_kd', *RUN, '--kd_mode', 'st', '--t_name', 'resnet8', '--s_name', 'resnet8')
    for name in ('net.pt', 'best.pt'):
        for place, warned in ((root, 0), (dark, 1)):
            words = ('--img_root', place, '--t_model', base / name, '--note', f'{name}-{place.name}')
            done = script(*kd, *words)
            assert done.code == 0 and done.out.count('warning: it was trained on images') == warned, done
            assert done.out.count('store the first mean and std in train.npz') == warned
    with np.load(root / 'train.npz') as file:
        mean, std = (file['images'].reshape(-1, 3) / 255).mean(axis=0), (file['images'] / 255).std((0, 1, 2))
    state = torch.load(base / 'net.pt', weights_only=True)
    assert np.allclose(state.scale, [mean, std])
    assert torch.load(base / 'initial.pt', weights_only=True).scale == state.scale
    known = ('--t_mean', *map(str, mean), '--t_std', *map(str, std))
    done = script(*kd, '--img_root', dark, '--t_model', base / 'net.pt', '--note', 'known', *known)
    assert done.code == 0 and 'warning' not in done.out
    alone = ('train_kd', *RUN, '--kd_mode', 'tfkd', '--s_name', 'resnet8', '--note', 'own')
    done = script(*alone, '--img_root', dark, '--s_init', base / 'net.pt')
    assert done.code == 0 and done.out.count('warning: it was trained') == 1, done
    done = script('tools.eval', '--data_name', 'arrays', '--img_root', dark, '--net_name', 'resnet8',
                  base / 'net.pt')  # fmt: skip
    assert done.code == 0 and done.out.count('warning: it was trained') == 1
    del state.scale  # as files were before
    net = models.build('resnet8', 3)
    torch.save(state, tmp_path / 'old.pt')
    assert 'warning' not in load_weights(net, tmp_path / 'old.pt', scale=((0.1,) * 3, (0.1,) * 3))


def test_two_own_data_sets_are_two(tmp_path):
    """As sources of a transfer: what a network saw, and how its images were normalised, say its results."""
    from engine.sources import read_sources
    from tools.transferability_graph import overlap_of

    scale = [[0.5, 0.5, 0.5], [0.2, 0.2, 0.2]]
    recipes = {'a': {'own_images': 'aaaaaaaaaaaa', 'own_scale': scale}, 'old': {}}
    recipes['c'] = {'own_images': 'cccccccccccc', 'own_scale': [scale[0], [0.4] * 3]}
    for name, recipe in recipes.items():
        (tmp_path / name).mkdir()
        torch.save({}, tmp_path / name / 'net.pt')
        facts = {'student': 'resnet8', 'data': 'arrays', 'seed': 1, 'recipe': recipe}
        (tmp_path / name / 'results.json').write_text(json.dumps(facts))
    a, old, c = read_sources([str(tmp_path / name / 'net.pt') for name in ('a', 'old', 'c')], 'arrays')
    (other,) = read_sources([f'resnet8={tmp_path / "a" / "net.pt"}@cifar10'], 'arrays')
    assert [s.saw('arrays', None, 'aaaaaaaaaaaa') for s in (a, old, c)] == [True, None, False]
    assert [s.trained_on for s in (a, old, c)] == ['arrays aaaaaa', 'arrays', 'arrays cccccc']
    assert overlap_of(a, c) == 'other data' and overlap_of(a, a) == 'the same classes'
    assert overlap_of(a, old) is None and other.scale is None and a.saw('cifar10', None) is False
    img = torch.rand(2, 3, 4, 4)
    assert (
        a.seen_by(img, 'arrays', tuple(map(tuple, scale))) is img
        and old.seen_by(img, 'arrays', c.scale) is img
    )
    assert torch.allclose(c.seen_by(img, 'arrays', a.scale), img / 2, atol=1e-6)


@pytest.mark.parametrize(
    ('images', 'targets', 'said'),
    [
        (
            torch.rand(6, 8, 8, 3),
            torch.arange(6),
            r'images must be \(N, H, W, 3\) uint8.* got .* torch.float32',
        ),
        (torch.zeros(6, 3, 8, 8, dtype=torch.uint8), torch.arange(6), r'got \(6, 3, 8, 8\)'),
        (torch.zeros(6, 8, 8, 1, dtype=torch.uint8), torch.arange(6), r'got \(6, 8, 8, 1\)'),
        (torch.zeros(6, 8, 8, 3, dtype=torch.uint8), torch.arange(1, 7), 'targets must be 0 to 5, .* got 6'),
        (torch.zeros(6, 8, 8, 3, dtype=torch.uint8), torch.rand(6), 'targets must be integers'),
        (torch.zeros(6, 8, 8, 3, dtype=torch.uint8), torch.arange(5), 'one per image, got .* for 6 images'),
    ],
)
def test_a_set_of_ones_own_is_bytes_with_labels_from_zero(images, targets, said):
    with pytest.raises(ValueError, match=said):
        Resident(images, targets, 6, (0.5,) * 3, (0.5,) * 3, 'cpu')


def test_labels_of_other_integers_are_taken():
    targets = torch.tensor([0, 5, -100, 1], dtype=torch.int32)
    data = Resident(torch.zeros(4, 8, 8, 3, dtype=torch.uint8), targets, 6, (0.5,) * 3, (0.5,) * 3, 'cpu')
    assert data.targets.dtype == torch.int64 and data.targets.tolist() == [0, 5, -100, 1]


@pytest.mark.parametrize('change', [lambda x, _: x / 255, lambda x, _: x[:, :4], lambda x, _: x.numpy()])
def test_a_view_gives_bytes_of_the_images_size(change, monkeypatch):
    monkeypatch.setitem(VIEWS, 'mine', View('mine', change=change))
    pixels = torch.zeros(4, 8, 8, 3, dtype=torch.uint8)
    data = Resident(pixels, torch.arange(4), 4, (0.5,) * 3, (0.5,) * 3, 'cpu')
    with pytest.raises(
        dataset.BadImage, match=r'view mine: change must return \(3, 8, 8\) torch.uint8, got '
    ):
        next(data.train_batches(4, 0, 0, ['mine']))


def test_own_scale_is_that_of_ones_own_images_alone(tmp_path):
    train, _ = dataset.load('arrays', write_arrays(tmp_path / 'x', mean=[0.5] * 3, std=[0.25] * 3), 'cpu')
    assert own_scale('arrays', train) == [[0.5] * 3, [0.25] * 3]
    assert own_scale('cifar10', train) is None and own_scale('folder', SimpleNamespace(mean=1)) is None


def test_a_slimmed_network_keeps_how_its_images_were_normalised(script, trained, tmp_path, monkeypatch):
    import tools.slim

    monkeypatch.setitem(sys.modules, 'slim', tools.slim)
    root, base = trained
    done = script('slim', '--net_name', 'resnet8', '--model', base / 'net.pt', '--data_name', 'arrays',
                  '--img_root', root, '--threads', 1, '--out', tmp_path / 'slim')  # fmt: skip
    assert done.code == 0, done.err
    kept, given = (torch.load(f / 'net.pt', weights_only=True).scale for f in (tmp_path / 'slim', base))
    assert kept == given


@pytest.mark.parametrize('name', ['mean', 'std'])
def test_a_mean_or_std_alone_is_refused(name, tmp_path):
    root = write_arrays(tmp_path / 'x', **{name: np.full(3, 0.5)})
    with pytest.raises(ValueError, match=rf'train.npz: has {name} alone: give both mean and std, or neither'):
        read_arrays(root)


def test_halves_of_unlike_sizes_are_refused(tmp_path):
    root = write_arrays(tmp_path / 'x')
    with np.load(root / 'test.npz') as file:
        content = dict(file)
    np.savez(root / 'test.npz', **content | {'images': content['images'][:, :6]})
    with pytest.raises(ValueError, match='train.npz are 8 x 8 pixels, of test.npz 6 x 8: make them one size'):
        read_arrays(root)


def test_names_as_python_objects_say_what_to_do(tmp_path):
    write_arrays(tmp_path / 'x')
    with np.load(tmp_path / 'x' / 'train.npz') as file:
        content = dict(file)
    content['class_names'] = np.array(['a', 'b', 'c'], dtype=object)
    np.savez(tmp_path / 'x' / 'train.npz', **content)
    with pytest.raises(ValueError, match=r'refused: np.array\(names, dtype=str\)'):
        read_arrays(tmp_path / 'x')


@pytest.mark.parametrize('flag', [('--image_size', 64), ('--convert_rgb',)])
def test_flags_of_folders_are_refused_elsewhere(script, tmp_path, flag):
    root = write_arrays(tmp_path / 'images')
    done = script('train_base', *RUN, '--net_name', 'resnet8', '--img_root', root, *flag)
    assert done.code == 2 and f'{flag[0]}: arrays is read as it is' in done.err, done.err


def test_no_more_processes_than_cores_decode():
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert len(list(decoded([1, 2, 3, 4], cores() + 3, batch_size=2))) == 2


def test_transparent_images_say_what_is_lost(tmp_path):
    for half in ('train', 'val'):
        for name in ('a', 'b'):
            (tmp_path / half / name).mkdir(parents=True)
            Image.new('RGBA', (8, 8)).save(tmp_path / half / name / '1.png')
    train, _ = dataset.load('folder', tmp_path, workers=0)
    with pytest.raises(dataset.BadImage, match='is a RGBA image, .* without their alpha: it is not blended'):
        next(train.test_batches(2))


def test_too_many_kept_classes_say_how_many():
    for kind, remedy in (('smooth5', 'take smooth2 or logits'), ('renorm5', 'take renorm2 or logits')):
        with pytest.raises(ValueError, match=f'kind {kind} needs 5 classes, got 3: {remedy}'):
            kept(kind, 3)


def test_a_head_beside_the_backbone_is_not_hidden(tmp_path):
    net = models.build('resnet8', 3)
    state = {f'backbone.{k}': v for k, v in net.state_dict().items() if not k.startswith('fc.')}
    state |= {'head.weight': net.fc.weight.detach(), 'head.bias': net.fc.bias.detach()}
    torch.save(state, tmp_path / 'whole.pt')
    said = (
        r'beside it the file has head.weight, head.bias: rename them to backbone.fc.\* if that is the class'
    )
    with pytest.raises(ValueError, match=rf'missing: fc.weight, fc.bias; .*classifier differs; {said}'):
        load_weights(net, tmp_path / 'whole.pt')
    line = load_weights(net, tmp_path / 'whole.pt', new_head=True)
    assert 'the file has none' not in line and 'rename them to backbone.fc.*' in line
    renamed = {k.replace('head.', 'backbone.fc.'): v for k, v in state.items()}
    torch.save(renamed, tmp_path / 'renamed.pt')
    load_weights(net, tmp_path / 'renamed.pt')


@pytest.mark.filterwarnings('ignore::FutureWarning')
def test_foreign_files_say_how_to_save_their_weights(tmp_path):
    """And what is said works."""
    net = models.build('resnet8', 3)
    torch.save(net, tmp_path / 'net.pt')
    script = torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2))
    torch.jit.save(script, tmp_path / 'script.pt')
    for name, said in (('net.pt', 'contains pickled code'), ('script.pt', 'is a TorchScript archive')):
        with warnings.catch_warnings(), pytest.raises(ValueError, match=said) as error:
            warnings.simplefilter('error')
            load_weights(net, tmp_path / name)
        assert 'if you trust it, save its weights alone: ' in str(error.value)
        command = str(error.value).split('weights alone: ')[1].split(', of a dict')[0]
        exec(command, {'torch': torch, 'NEW': tmp_path / f'alone-{name}'})
    load_weights(net, tmp_path / 'alone-net.pt')
    assert torch.load(tmp_path / 'alone-script.pt', weights_only=True).keys() == {'weight', 'bias'}


def test_a_refusal_says_which_of_several_students(script, trained):
    root, base = trained
    done = script('train_kd', *RUN, '--img_root', root, '--t_name', 'resnet8', '--t_model', base / 'net.pt',
                  '--kd_mode', 'simkd', 'norm+st', '--s_name', 'torchvision:mobilenet_v3_small')  # fmt: skip
    assert (
        done.code == 2 and 'norm+st: MobileNetV3 is wrapped: it cannot be run from the middle' in done.err
    ), done


def test_a_refused_resume_speaks_of_flags(tmp_path):
    """Of keys that are none in words; and it says what to do."""
    old = {'script': 'train_dense', 'steps': 300, 'own_images': 'a', 'own_scale': [[0.5], [0.2]]}
    old |= {'teacher_weights': 'b', 'methods': [['st', 0.1, {}]]}
    torch.save({'args': old, 'epoch': 1}, tmp_path / 'last.pt')

    def said(**more) -> str:
        with pytest.raises(Exception, match='cannot resume') as error:
            load_checkpoint(tmp_path / 'last.pt', old | more)
        assert str(error.value).endswith(
            '; --note NAME starts another run, --resume never overwrites this one'
        )
        return str(error.value)

    text = said(own_images='c', own_scale=[[0.4], [0.2]], teacher_weights='d', methods=[['st', 0.2, {}]])
    assert 'the images of --img_root are others; the teacher (--t_model, or' in text
    assert 'is another; weights, arguments or stages of methods differ' in text
    assert 'own_' not in text and 'mean and std' not in text and '0.1' in text and '0.2' in text
    assert 'mean and std of the images of --img_root' in said(own_scale=[[0.4], [0.2]])
    assert 'the pictures with labels are drawn by chance now' in said(labelled_drawn=True)
    (tmp_path / 'student.pt').touch()
    assert f'--note NAME --s_init {tmp_path / "student.pt"}' in said(steps=400)
    assert '--s_init' not in said(steps=200)
