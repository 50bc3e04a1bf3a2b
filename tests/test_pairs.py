"""Unlike pairs of networks: every method on every kind of difference, as docs/pairs.md says."""

import re

import pytest

from report.pairs import PAIRS, TAUGHT, one_step, verdicts
from tests.conftest import ROOT
from tests.test_data import write_folder

SAID = verdicts((ROOT / 'docs' / 'pairs.md').read_text())


@pytest.mark.parametrize('name', TAUGHT)
def test_one_step_on_every_pair(name):
    """It works, with or without an adapter, or refuses with a sentence that says what must match."""
    for kind, wanted in zip(PAIRS, SAID[name]):
        verdict, said = one_step(name, kind)
        assert verdict == wanted, f'{kind}: {verdict}, docs/pairs.md says {wanted}: {said}'
        if verdict == 'refuses':
            assert re.match(r'\w+: ', said) or 'wrapped' in said, said
            assert re.search(r'must|needs|one architecture', said), said


FIELD = [  # the pairs of the literature, narrow networks of the same families for speed
    ('resnet8x4', 'ShuffleV1'),
    ('vgg8', 'MobileNetV2'),
    ('ResNet18', 'vgg8'),
    ('wrn_16_2', 'resnet8x4'),
    ('resnet14', 'torchvision:shufflenet_v2_x0_5'),
]


@pytest.mark.parametrize('teacher,student', FIELD)
def test_the_pairs_of_the_field_train(script, tmp_path, teacher, student):
    data = ('--data_name', 'shapes:16', '--batch_size', '16', '--epochs', '1')
    assert script('train_base', '--net_name', teacher, '--note', 't', *data).code == 0
    pair = ('--t_name', teacher, '--t_model', tmp_path / 't' / 'net.pt', '--s_name', student)
    methods = (
        'st',
        'at',
        'sp',
        'rkd',
        'pkt',
        'nst',
        'vid',
        'fitnet',
        'cc',
        'crd',
        'dkd',
        'dist',
        'ickd',
        'semckd+st',
    )
    words = ('--kd_mode', *methods, '--kd_args', 'crd.nce_n=8', '--lambda_kd', 'semckd=1', '--note', 'k')
    done = script('train_kd', *pair, *data, *words)
    assert done.code == 0, done.err


def test_imagenet_is_a_folder_and_torchvision_networks(script, tmp_path):
    """ResNet-34 teaches ResNet-18 on a small folder of images, as ImageNet would be run."""
    root = write_folder(tmp_path / 'images')
    data = (
        '--data_name',
        'folder',
        '--img_root',
        root,
        '--image_size',
        '64',
        '--workers',
        '0',
        '--epochs',
        '1',
    )
    data += ('--batch_size', '5', '--amp', 'bf16')
    done = script('train_base', '--net_name', 'torchvision:resnet34', '--note', 't', *data)
    assert done.code == 0, done.err
    pair = ('--t_name', 'torchvision:resnet34', '--t_model', tmp_path / 't' / 'net.pt')
    pair += ('--s_name', 'torchvision:resnet18')
    words = ('--kd_mode', 'st', 'at', 'dkd', 'reviewkd', 'ofd', 'cskd', 'ab', '--note', 'k')
    done = script('train_kd', *pair, *data, *words)
    assert done.code == 0, done.err
    done = script(
        'tools.eval', '--net_name', 'torchvision:resnet18', *data[:8], tmp_path / 'k' / 'st' / 'student.pt'
    )
    assert done.code == 0 and 'top-1' in done.out, done.err


def test_eval_prints_one_or_many(script, teacher, img_root, tmp_path):
    (tmp_path / 'broken.pt').write_bytes(b'nothing')
    words = ('--net_name', 'resnet8', '--data_name', 'shapes:96', '--img_root', img_root)
    done = script('tools.eval', *words, teacher, teacher)
    assert done.code == 0 and done.out.count(str(teacher)) >= 2 and '24 test images' in done.out
    done = script('tools.eval', *words, teacher, tmp_path / 'broken.pt')
    assert done.code == 2 and 'some files' in done.err and str(teacher) in done.out
