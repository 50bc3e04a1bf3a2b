"""Images of one's own: what is said where they, their numbers or their files are not what they were."""

import json

import numpy as np
import pytest
import torch

import models
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
