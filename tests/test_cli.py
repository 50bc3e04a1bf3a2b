"""The command line: every mistake gets one clear line and exit code 2; flags, help and the example script."""

import argparse
import dataclasses
import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import torch
import torchvision

import engine.flags
import models
import train_base
import train_dense
import train_dml
import train_ka
import train_kd as train_kd_module
import train_lm
from methods import KA as KA_METHODS
from methods import KD, METHODS
from models.checkpoint import compare_classes
from tests import fresh
from tests.conftest import ROOT, TINY
from tests.test_data import write_folder

COMMON = {
    '--data_name',
    '--img_root',
    '--image_size',
    '--workers',
    '--convert_rgb',
    '--val_split',
    '--epochs',
    '--batch_size',
    '--lr',
    '--milestones',
    '--lr_decay',
    '--momentum',
    '--weight_decay',
    '--seed',
    '--device',
    '--amp',
    '--threads',
    '--deterministic',
    '--compile',
    '--save_root',
    '--note',
    '--resume',
    '--print_freq',
    '--tensorboard',
    '--debug',
    '--schedule',
    '--no_nesterov',
    '--optim',
    '--pad',
    '--save_every',
    '-h',
    '--help',
}


@pytest.fixture
def fails(script, capsys):
    """fails(script name, words..., said=...): exit code 2, one line, which says so."""

    def call(name, *words, said):
        done = script(name, *words)
        assert done.code == 2, f'exit code {done.code}: {done.err}{done.out}'
        assert done.err.count('\n') == 1 and done.err.startswith(f'{name}.py: error: '), done.err
        for part in [said] if isinstance(said, str) else said:
            assert part in done.err, done.err

    return call


def kd(teacher, *words):
    return ('--t_name', 'resnet8', '--t_model', teacher, '--s_name', 'resnet8', *TINY, *words)


def flags_of(module, monkeypatch) -> set[str]:
    seen = {}

    def parse(parser, args=None):
        seen['parser'] = parser
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(engine.flags.Parser, 'parse_args', parse)
        with pytest.raises(KeyboardInterrupt):
            module.parse_args()
    return {option for action in seen['parser']._actions for option in action.option_strings}


def test_the_flags_are_frozen(monkeypatch):
    """A new flag is a decision: it must serve several methods. Then change this list."""
    part = {'--num_parts', '--part', '--split', '--classes'}
    assert flags_of(train_base, monkeypatch) == COMMON | part | {
        '--net_name',
        '--init',
        '--new_head',
        '--bn_l1',
        '--keep',
        '--cuda_graphs',
        '--labelled',
    }
    loss = {'--kd_mode', '--lambda_kd', '--kd_args'}
    own = {'--t_name', '--t_model', '--s_name', '--s_init', '--init_epochs', '--pretrain_epochs'}
    own |= {'--global_relations', '--cuda_graphs', '--new_head', '--lambda_ce', '--ramp_epochs', '--phases'}
    own |= {
        '--student_threads',
        '--kd_layers',
        '--kd_stop',
        '--soft_labels',
        '--t_mean',
        '--t_std',
        '--labelled',
    }
    assert flags_of(train_kd_module, monkeypatch) == COMMON | loss | own
    assert flags_of(train_dml, monkeypatch) == COMMON | loss | {'--net_names', '--net_inits', '--new_head'}
    ka = {'--ka_mode', '--lambda_ka', '--lambda_kd', '--T', '--ka_args', '--ka_layers', '--optim', '--lr_ka'}
    ka |= {'--student_threads', '--new_head'}
    ka |= {'--t_name', '--t_model', '--s_name', '--s_init', '--num_parts', '--split', '--t_classes'}
    ka |= {
        '--wanted',
        '--unlabeled',
        '--limit_train',
        '--limit_test',
        '--tasks',
        '--size',
        '--labelled',
        '--epochs_ft',
        '--augment',
        '--draw',
        '--attributes',
        '--t_attributes',
    }
    assert flags_of(train_ka, monkeypatch) == COMMON | ka
    text = {'-h', '--help', '--debug', '--data_name', '--seed', '--lr', '--save_root', '--note', '--resume'}
    text |= {'--device', '--amp', '--threads', '--deterministic', '--lambda_ce', '--t_model', '--dry_run'}
    text |= {'--lmbda', '--steps', '--init_steps', '--t_steps', '--eval_every', '--batch_size'}
    text |= {'--tensorboard'}
    assert flags_of(train_lm, monkeypatch) == loss | text
    dense = {'-h', '--help', '--debug', '--data_name', '--img_root', '--batch_size', '--lr', '--milestones'}
    dense |= {
        '--seed',
        '--device',
        '--amp',
        '--threads',
        '--deterministic',
        '--save_root',
        '--note',
        '--resume',
    }
    dense |= {
        '--schedule',
        '--workers',
        '--t_name',
        '--t_model',
        '--s_name',
        '--s_init',
        '--size',
        '--labelled',
    }
    dense |= {'--optim', '--dry_run', '--steps', '--t_steps', '--eval_every'}  # as those of other scripts
    dense |= {'--task', '--unlabelled', '--warmup', '--augment', '--tensorboard'}
    assert flags_of(train_dense, monkeypatch) == loss | dense


@pytest.mark.parametrize('name', ['train_base', 'train_kd', 'train_dml'])
def test_help_explains(script, name):
    done = script(name, '--help')
    assert done.code == 0 and 'default' in done.out and name in done.out
    assert all(net in done.out for net in ('resnet8x4', 'resnet110'))


@pytest.mark.parametrize(
    'words,said',
    [
        ('--kd_mode st --net_names resnet8 resnet8', ['not a method for peers', 'use train_kd.py']),
        ('--kd_mode nonsense --net_names resnet8 resnet8', 'there are dcm, dml'),
        ('--kd_mode dml --net_names resnet8', 'two networks or more'),
        ('--kd_mode dml --net_names resnet8 resnet9', '6n + 2'),
        ('--kd_mode dcm --net_names resnet8 resnet8 resnet8', 'two networks, got 3'),
        ('--kd_mode one --net_names resnet8 vgg8', 'one architecture'),
        ('--kd_mode okddip --net_names resnet8x4 resnet8 resnet8', 'feats[1] must be'),
        ('--kd_mode dml --net_names resnet8 resnet8 --net_inits x', '1 files for 2 networks'),
        ('--kd_mode kdcl --net_names resnet8 resnet8 --kd_args mode=best', 'mode must be'),
        ('--kd_mode kdcl --net_names resnet8 resnet8 --kd_args temperature=3', 'no argument'),
        ('--kd_mode kdcl --net_names resnet8 resnet8 --lambda_kd 0', 'nothing to learn'),
    ],
)
def test_mistakes_of_train_dml(fails, words, said):
    fails('train_dml', *words.split(), *TINY, said=said)


def test_peers_that_start_equal_are_refused(fails, teacher):
    words = ('--kd_mode', 'dml', '--net_names', 'resnet8', 'resnet8', '--net_inits', teacher, teacher)
    fails('train_dml', *words, *TINY, said='start from equal weights')


@pytest.mark.parametrize(
    'words,said',
    [
        ('--kd_mode dml', 'use train_dml.py'),
        ('--kd_mode norm+simkd', 'norm and simkd change the student'),
        ('--kd_mode dot+mhgd', 'training step of their own'),
        ('--kd_mode dot --amp fp16', 'use bf16'),
        ('--kd_mode st at --ramp_epochs 3', '--ramp_epochs: at, st: the weight has no ramp'),
        ('--kd_mode gkd --kd_args reduction=none', 'must be one number'),
        ('--kd_mode dot --optim adamw', 'dot has an optimiser of its own'),
        ('--kd_mode dot --kd_args delta=0.5', 'delta 0.5 do not fit: --kd_args delta=X'),
        ('--kd_mode dot --kd_args gamma=1', 'no argument'),
        ('--kd_mode byot+sla', 'change the student'),
        ('--kd_mode ab --init_epochs -1', '--init_epochs'),
        ('--kd_mode semckd --kd_args factor=64', 'at least factor'),
        ('--kd_mode quest --kd_args num_words=7000', 'need as many features'),
    ],
)
def test_mistakes_with_the_newer_methods(fails, teacher, words, said):
    fails('train_kd', *kd(teacher, *words.split()), said=said)


def test_teachers_that_are_missing_or_idle(fails, teacher):
    student = ('--s_name', 'resnet8', *TINY)
    fails('train_kd', '--kd_mode', 'cskd', 'st', *student, said='st distils a teacher')
    two = ('--t_name', 'resnet8', 'resnet8', '--t_model', teacher)
    fails('train_kd', '--kd_mode', 'dgkd', *student, *two, said='2 names and 1 files')
    fails('train_kd', '--kd_mode', 'st', *student, *two, teacher, said='several are for')


@pytest.mark.parametrize(
    'words,said',
    [
        (['--net_nam', 'resnet8'], '--net_nam'),
        ([], '--net_name'),
        (['--net_name', 'resnet8', '--nonsense', '3'], '--nonsense'),
        (['--net_name', 'resnet8', '--epochs', 'many'], ["whole number > 0, got 'many'", '--epochs']),
        (['--net_name', 'resnet8', '--epochs', '0'], '--epochs'),
        (['--net_name', 'resnet8', '--lr', '-1'], '--lr'),
        (['--net_name', 'resnet8', '--milestones', '100'], 'share from 0 to below 1'),
        (
            ['--net_name', 'resnet8', '--milestones', '0.6', '--schedule', 'onecycle'],
            'onecycle does not read it',
        ),
        (
            ['--net_name', 'resnet8', '--no_nesterov', '--optim', 'adamw'],
            '--no_nesterov: --optim adamw does not',
        ),
        (['--net_name', 'resnet8', '--amp', 'fp8'], 'fp8'),
        (['--net_name', 'resnet8', '--seed', '1.5'], '--seed'),
        (['--net_name', 'resnet8', '--seed', '20261126140205'], ['--seed', 'at most 12 digits']),
        (['--net_name', 'resnet8', '--workers', '-1'], ["whole number >= 0, got '-1'", '--workers']),
        (['--net_name', 'resnet8', '--classes', '0-99999999999999'], 'lie in 0..9'),
        (['--net_name', 'resnet8', '--new_head'], 'goes with --init'),
        (['--net_name', 'resnet9'], '6n + 2'),
        (['--net_name', 'resnet8', '--device', 'cuda:77'], '--device cuda:77'),
        (['--net_name', 'resnet8', '--device', 'toaster'], '--device toaster'),
        (['--net_name', 'resnet8', '--device', 'meta'], 'say cpu, cuda or mps'),
        (['--net_name', 'resnet8', '--labelled', '0'], 'a share between 0 and 1'),
        (['--net_name', 'resnet8', *TINY, '--labelled', '0.02'], '1 training images are left'),
        (['--net_name', 'resnet8', '--data_name', 'shapes:96', '--batch_size', '1'], '--batch_size 1'),
        (['--net_name', 'resnet8', '--data_name', 'imagenet'], "no data set is called 'imagenet'"),
        (['--net_name', 'resnet8', '--data_name', 'shapes:96', '--batch_size', '97'], ['97', '96 images']),
        (
            [
                '--net_name',
                'resnet8',
                '--data_name',
                'shapes:96',
                '--batch_size',
                '32',
                '--resume',
                '/no/such',
            ],
            '--resume /no/such',
        ),
        (
            [
                '--net_name',
                'resnet8',
                '--data_name',
                'shapes:96',
                '--batch_size',
                '32',
                '--init',
                'absent.pt',
            ],
            'absent.pt: no such',
        ),
    ],
)
def test_base_mistakes(fails, words, said):
    fails('train_base', *words, said=said)


@pytest.mark.parametrize(
    'words,said',
    [
        (['--kd_mode', 'nonsense'], ["no method is called 'nonsense'", 'rkd']),
        (['--kd_mode', 'st', 'st'], 'named twice'),
        (['--kd_mode', 'st+st'], 'named twice'),
        (['--kd_mode', 'st+'], "''"),
        (
            ['--kd_mode', 'st', '--kd_args', 'temperature=4'],
            ["no argument 'temperature'", 'SoftTarget(T: float = 4.0)'],
        ),
        (['--kd_mode', 'st', '--kd_args', 'T'], "key=value, got 'T'"),
        (
            ['--kd_mode', 'st', '--kd_args', 'T=warm'],
            ["T='warm'", 'wrong type', 'SoftTarget(T: float = 4.0)'],
        ),
        (['--kd_mode', 'st', '--kd_args', 'T=True'], 'wrong type'),
        (['--kd_mode', 'st', '--kd_args', 'T=-1'], 'T must be > 0'),
        (['--kd_mode', 'nst', '--kd_args', 'kernel=cubic'], 'kernel must be one of'),
        (['--kd_mode', 'nst', '--kd_args', 'd=2.5'], 'wrong type'),
        (['--kd_mode', 'vid', '--kd_args', 's_channels=3'], 's_channels'),
        (['--kd_mode', 'st', 'at', '--kd_args', 'T=4'], 'METHOD.T=VALUE'),
        (['--kd_mode', 'st', 'at', '--kd_args', 'sp.x=4'], "'sp' is not among"),
        (['--kd_mode', 'st', '--lambda_kd', 'heavy'], '--lambda_kd'),
        (['--kd_mode', 'st', 'at', '--lambda_kd', '3'], 'METHOD=number'),
        (['--kd_mode', 'st', 'at', '--lambda_kd', 'sp=3'], "'sp' is not among"),
        (['--kd_mode', 'st', '--lambda_kd', 'st=heavy'], 'must be a number'),
        (['--kd_mode', 'st', '--kd_layers', '2'], ['stages of st are fixed', 'fitnet']),
        (['--kd_mode', 'at', 'sp', '--kd_layers', '2'], 'METHOD=2'),
        (['--kd_mode', 'at', '--kd_layers', 'sp=2'], "'sp' is not among"),
        (['--kd_mode', 'at', '--kd_layers', '0'], 'from 1, or from -1 backwards'),
        (['--kd_mode', 'at', '--kd_layers', '1:x'], "got '1:x'"),
        (['--kd_mode', 'at', '--kd_layers', '1:0,2'], "got '1:0,2'"),
        (['--kd_mode', 'at', '--kd_layers', 'rb2'], "got 'rb2'"),
        (['--kd_mode', 'at', '--kd_layers', '-9,-1'], 'at=-9,-1: the student has 3 stages'),
        (['--kd_mode', 'at', '--kd_layers', '4'], 'the student has 3 stages'),
        (['--kd_mode', 'at', '--kd_layers', '3,-1'], 'name each stage once'),
        (['--kd_mode', 'fitnet', '--kd_layers', '1,2'], 'the maps of one stage'),
        (['--kd_mode', 'fitnet', '--kd_layers', 'all'], 'the maps of one stage'),
        (['--kd_mode', 'kdsvd', '--kd_layers', '2:0.5,3'], 'no weights'),
        (['--kd_mode', 'st', '--s_name', 'resnet7'], '6n + 2'),
        (['--kd_mode', 'st', '--t_name', 'resnet20'], ['does not fit', 'looks like resnet8 with 10 classes']),
        (['--kd_mode', 'st', '--s_init', 'absent.pt'], 'absent.pt: no such'),
        (['--kd_mode', 'st', '--new_head'], 'goes with --s_init'),
    ],
)
def test_kd_mistakes(fails, teacher, words, said):
    fails('train_kd', *kd(teacher), *words, said=said)


def test_unlike_maps_are_refused_before_training(fails, script, tmp_path):
    """What must match is named, or what the network lacks; nothing was trained."""

    class Small(torch.nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, x, feats=False):
            return self.net(x[..., :24, :24], feats)

    real = models.build
    assert script('train_base', '--net_name', 'resnet8', '--note', 'b', *TINY, '--epochs', '1').code == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            models,
            'build',
            lambda name, k: Small(real('resnet8', k)) if name == 'resnet14' else real(name, k),
        )
        words = (*kd(tmp_path / 'b' / 'net.pt'), '--s_name', 'resnet14')
        fails('train_kd', *words, '--kd_mode', 'fcfd', said='FCFD: strides must be 1, 2 or 0.5, got 0.75')
        fails('train_kd', *words, '--kd_mode', 'norm', said="norm: 'Small' object has no attribute 'after'")


def test_a_loss_that_rests_at_half_time_is_tried(fails, teacher, monkeypatch):
    def forward(*_):
        raise ValueError('told at once')

    monkeypatch.setattr('kd_losses.sad.SAD.forward', forward)
    fails('train_kd', '--kd_mode', 'sad', '--s_name', 'resnet8', *TINY, said='told at once')
    monkeypatch.setattr('kd_losses.st.SoftTarget.forward', forward)
    fails('train_kd', *kd(teacher), '--kd_mode', 'st', '--kd_stop', '1', said='told at once')


class Bomb:
    def __reduce__(self):
        return (os.mkdir, ('bomb-went-off',))


@pytest.mark.parametrize(
    'kind,said',
    [
        ('missing', 'no such checkpoint'),
        ('truncated', 'truncated'),
        ('empty', 'truncated'),
        ('text', 'not a PyTorch'),
        ('code', 'refused'),
        ('architecture', 'looks like resnet14 with 10 classes'),
        ('classes', 'looks like resnet8 with 100 classes'),
        ('folder', 'no such checkpoint'),
    ],
)
def test_bad_checkpoints(fails, teacher, tmp_path, monkeypatch, kind, said):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / 'bad.pt'
    if kind == 'truncated':
        path.write_bytes(teacher.read_bytes()[:20000])
    elif kind == 'empty':
        path.write_bytes(b'')
    elif kind == 'text':
        path.write_text('these are not weights')
    elif kind == 'code':
        torch.save({'net': torch.load(teacher, weights_only=True), 'x': Bomb()}, path)
    elif kind == 'architecture':
        torch.save(models.build('resnet14', 10).state_dict(), path)
    elif kind == 'classes':
        torch.save(models.build('resnet8', 100).state_dict(), path)
    elif kind == 'folder':
        path.mkdir()
    fails('train_kd', *kd(path), '--kd_mode', 'st', said=['bad.pt', said])
    assert not (tmp_path / 'bomb-went-off').exists()


def test_resume_from_a_foreign_checkpoint(fails, teacher, tmp_path):
    fails(
        'train_kd',
        *kd(teacher),
        '--kd_mode',
        'st',
        '--resume',
        teacher,
        said='not a checkpoint of this script',
    )


def test_missing_and_corrupt_data(fails, tmp_path):
    base = ('--net_name', 'resnet8', '--img_root', tmp_path)
    fails(
        'train_base',
        *base,
        '--data_name',
        'cifar10',
        said=['no cifar10 under', 'python -m dataset.download cifar10'],
    )
    (tmp_path / 'cifar-10-batches-bin').mkdir()
    (tmp_path / 'cifar-10-batches-bin' / 'data_batch_1.bin').write_bytes(b'x' * 100)
    fails('train_base', *base, '--data_name', 'cifar10', said=['data_batch_1.bin: damaged', 'to repair it'])
    fails('train_base', *base, '--data_name', 'folder', said='no image folder')


@pytest.mark.parametrize('workers', ['0', '2'])
def test_bad_images_in_a_folder(fails, tmp_path, workers):
    from PIL import Image

    root = write_folder(tmp_path / 'images')
    base = (
        '--net_name',
        'resnet8',
        '--img_root',
        root,
        '--data_name',
        'folder',
        '--image_size',
        '24',
        '--batch_size',
        '5',
        '--epochs',
        '1',
        '--workers',
        workers,
    )
    (root / 'train' / 'bee' / '1.png').write_bytes(b'')
    fails('train_base', *base, '--note', 'a', said=['bee/1.png', 'cannot be read'])
    Image.new('L', (30, 30)).save(root / 'train' / 'bee' / '1.png')
    fails('train_base', *base, '--note', 'b', said=['bee/1.png', 'expected RGB'])


FOLDER = '--data_name folder --image_size 32 --batch_size 5 --epochs 1 --workers 0'.split()


def test_classes_of_val_that_are_not_those_of_train(fails, script, tmp_path):
    root = write_folder(tmp_path / 'images')
    base = ('--net_name', 'resnet8', '--img_root', root, *FOLDER)
    (root / 'val' / 'bee').rename(root / 'val' / 'been')
    fails('train_base', *base, said=['unknown to the training set: been', 'missing here: bee'])
    shutil.rmtree(root / 'val' / 'been')
    fails('train_base', *base, said='missing here: bee; an empty folder of that name says')
    (root / 'val' / 'bee').mkdir()
    done = script('train_base', *base, '--note', 'b')
    assert done.code == 0 and 'no images of bee' in (tmp_path / 'b' / 'log.txt').read_text()
    shutil.rmtree(root / 'train' / 'cat')
    (root / 'train' / 'cat').mkdir()
    fails('train_base', *base, said='no images in cat')


def names_in(path) -> list:
    if path.suffix == '.pt':
        content = torch.load(path, weights_only=True)
        if 'origin' in content:  # last.pt
            return content['origin']['class_names']
        return content.get('net', content).class_names
    return json.loads(path.read_text())['class_names']


def test_class_names_are_kept_and_compared(fails, script, tmp_path):
    """In every file of a run; a teacher of other classes, or of the same in another order, is refused."""
    root = write_folder(tmp_path / 'images')
    data = ('--img_root', root, *FOLDER)
    assert script('train_base', '--net_name', 'resnet8', '--note', 'b', '--keep', 1, *data).code == 0
    files = 'args.json results.json last.pt best.pt net.pt initial.pt epoch1.pt'.split()
    assert all(names_in(tmp_path / 'b' / file) == ['ape', 'bee', 'cat'] for file in files)
    teacher = shutil.copy(tmp_path / 'b' / 'net.pt', tmp_path / 'renamed.pt')
    net = models.build('resnet8', 3)
    net.load_state_dict(torch.load(teacher))  # plain weights for everybody

    pair = ('--t_name', 'resnet8', '--s_name', 'resnet8', '--kd_mode', 'st', *data)
    assert script('train_kd', *pair, '--t_model', teacher, '--note', 'k').code == 0
    assert names_in(tmp_path / 'k' / 'args.json') == names_in(tmp_path / 'b' / 'args.json')
    for file in ('results.json', 'last.pt', 'best.pt', 'student.pt'):
        assert names_in(tmp_path / 'k' / 'st' / file) == ['ape', 'bee', 'cat']

    part = ('--net_name', 'resnet8', *data, '--classes', '0-1', '--note', 'part', '--batch_size', 4)
    assert script('train_base', *part).code == 0
    assert names_in(tmp_path / 'part' / 'results.json') == ['ape', 'bee']
    for half in ('train', 'val'):
        (root / half / 'cat').rename(root / half / 'aardvark')
        (root / half / 'ape').rename(root / half / 'cat')
        (root / half / 'aardvark').rename(root / half / 'ape')
    same = ('--t_model', teacher, '--note', 'k2')
    assert script('train_kd', *pair, *same).code == 0, 'other pictures, but the same names'
    for half in ('train', 'val'):
        (root / half / 'cat').rename(root / half / 'dog')
    said = ['renamed.pt', 'the data has no cat', 'the weights have no dog']
    fails('train_kd', *pair, *same, '--note', 'k3', said=said)
    for file in ('net.pt', 'best.pt', 'last.pt'):
        fails('train_kd', *pair, '--t_model', tmp_path / 'b' / file, '--note', 'k3', said=said[1:])
    done = script('tools.eval', '--net_name', 'resnet8', *data[:6], '--workers', 0, teacher)
    assert done.code == 2 and 'the data has no cat' in done.out
    fails('train_base', '--net_name', 'resnet8', '--note', 'b', *data, '--resume', 'auto', '--keep', 1,
          said=['last.pt', 'the data has no cat'])  # fmt: skip


def test_classes_in_another_order():
    with pytest.raises(ValueError, match='another order: class 1 of the weights is bee, of the data cat'):
        compare_classes('x.pt', ['ape', 'bee', 'cat'], ['ape', 'cat', 'bee'])
    compare_classes('x.pt', None, ['ape'])
    compare_classes('x.pt', ['ape'], None)


def test_a_new_head(fails, script, teacher, tmp_path):
    """The body of other weights, a classifier of its own; without the flag the message tells of it."""
    torch.save(models.build('resnet8', 100).state_dict(), tmp_path / 'hundred.pt')
    base = ('--net_name', 'resnet8', *TINY, '--epochs', '1', '--init', tmp_path / 'hundred.pt')
    fails('train_base', *base, said=['looks like resnet8 with 100 classes', '--init FILE --new_head'])
    done = script('train_base', *base, '--new_head', '--note', 'b')
    assert done.code == 0 and 'a new classifier, left out: fc.weight, fc.bias' in done.out
    body, mine = (torch.load(path, weights_only=True) for path in (base[-1], tmp_path / 'b' / 'initial.pt'))
    assert torch.equal(body['layer2.0.conv1.weight'], mine['layer2.0.conv1.weight'])
    fails('train_kd', *kd(base[-1]), '--kd_mode', 'st', said=['hundred.pt', 'differs: a teacher needs a'])
    words = ('--kd_mode', 'st', '--s_init', base[-1], '--new_head', '--epochs', '1')
    done = script('train_kd', *kd(teacher), *words, '--note', 'k')
    assert done.code == 0 and 'a new classifier' in done.out
    peers = ('--kd_mode', 'dml', '--net_names', 'resnet8', 'resnet8', *TINY, '--epochs', '1')
    fails('train_dml', *peers, '--new_head', said='goes with --net_inits')
    peers += ('--net_inits', base[-1], base[-1])
    fails(
        'train_dml', *peers, said=['hundred.pt', 'only the classifier differs: --net_inits FILE --new_head']
    )
    done = script('train_dml', *peers, '--new_head', '--note', 'p')  # one body, and a classifier each
    assert done.code == 0 and done.out.count('a new classifier, left out: fc.weight, fc.bias') == 2


def test_students_with_added_layers_are_used_like_others(script, train_kd, tmp_path):
    """The last line of the log says how; it does what it says."""
    assert train_kd('simkd', 'norm', 'byot', 'catkd', '--note', 'k', '--epochs', '1', *TINY[:4]).code == 0
    lines = (tmp_path / 'k' / 'log.txt').read_text().splitlines()
    for method in ('simkd', 'norm', 'byot', 'catkd'):
        path = tmp_path / 'k' / method / 'student.pt'
        (line,) = [line for line in lines if f'weights: {path}; ' in line]
        command, code = re.search(
            r'python tools/eval\.py (.*) measures them, (models.*) is the network', line
        ).groups()
        done = script(
            'tools.eval', *command.split(), path.with_name('last.pt'), '--img_root', tmp_path.parent
        )
        top1 = json.loads(path.with_name('results.json').read_text())['last']['top1']
        assert done.code == 0 and done.out.count(f'  {top1:6.2f}  ') == 2, done.out + done.err
        assert eval(code)(torch.zeros(1, 3, 32, 32)).shape == (1, 10)
        words = ('--t_name', 'resnet8', '--t_model', path, '--s_name', 'resnet8', '--kd_mode', 'st', 'at')
        taught = script('train_kd', *words, *TINY, '--epochs', '1', '--note', f'of-{method}')
        assert taught.code == 0, taught.err
        teacher = json.loads((tmp_path / f'of-{method}' / 'st' / 'results.json').read_text())
        assert teacher['teacher_top1'] == pytest.approx(top1)


def test_a_finished_run_with_more_epochs_names_the_way(fails, script, teacher, tmp_path):
    words = ('--net_name', 'resnet8', '--note', 'teacher', *TINY, '--resume', 'auto')
    fails('train_base', *words, '--epochs', '3', said=['epochs was 2, is 3', f'--note NAME --init {teacher}'])
    assert script('train_kd', *kd(teacher), '--kd_mode', 'ab', '--init_epochs', '1', '--note', 'k').code == 0
    longer = ('--kd_mode', 'ab', '--init_epochs', '1', '--note', 'k', '--resume', 'auto', '--epochs', '4')
    fails('train_kd', *kd(teacher), *longer, said=f'--s_init {tmp_path / "k" / "ab" / "student.pt"}')
    done = script('train_base', *words)
    assert done.code == 0 and '2 of 2 epochs done' in done.out


def test_debug_shows_where(script):
    words = ('train_base', '--net_name', 'resnet8', '--data_name', 'nonsense')
    assert script(*words).err.count('\n') == 1
    done = script(*words, '--debug')
    assert (
        done.code == 2 and 'in load\n' in done.err and done.err.splitlines()[-1].startswith('train_base.py: ')
    )


def test_debug_shows_an_error_of_the_author(script, teacher, monkeypatch):
    """What a new feed does wrong looks like a mistake of the user, in one line; --debug shows the place."""

    def my_new_feed(kd, s, t, b):
        return s.nonsense

    monkeypatch.setitem(KD, 'st', dataclasses.replace(KD['st'], feed=my_new_feed))
    words = ('train_kd', *kd(teacher), '--kd_mode', 'st')
    assert script(*words, '--note', 'a').err.count('\n') == 1
    done = script(*words, '--note', 'b', '--debug')
    assert done.code == 2 and 'in my_new_feed\n' in done.err and 'nonsense' in done.err.splitlines()[-1]


def test_amalgamation_of_folders(script, fails, tmp_path):
    """Teachers know a part of the classes each; the class names tell whether the part is the right one."""
    root = write_folder(tmp_path / 'images', classes=('ape', 'bee', 'cat', 'dog'))
    data = ('--img_root', root, *FOLDER)
    for part, classes in enumerate(('0-1', '2-3')):
        words = (
            '--net_name',
            'resnet8',
            *data,
            '--classes',
            classes,
            '--note',
            f't{part}',
            '--batch_size',
            4,
        )
        assert script('train_base', *words).code == 0
    nets = [tmp_path / f't{part}' / 'net.pt' for part in (0, 1)]
    ka = ('--ka_mode', 'concat', '--t_name', 'resnet8', '--t_classes', '0-1', '2-3', *data)
    assert script('train_ka', *ka, '--t_model', *nets, '--limit_train', 9, '--limit_test', 9).code == 0
    for file in ('args.json', 'ensemble/results.json', 'concat/results.json', 'concat/student.pt'):
        assert names_in(next(tmp_path.glob('ka-*')) / file) == ['ape', 'bee', 'cat', 'dog']
    swapped = ('--t_classes', '1,0', '2-3')
    fails('train_ka', *ka, *swapped, '--t_model', *nets, '--note', 'k', said=['teacher 1', 'another order'])
    fails('train_ka', *ka, '--t_model', *nets, '--note', 'k', '--unlabeled', 'shapes:40', said='in memory')
    fed = ('--t_name', 'resnet8', '--t_model', *nets, '--s_name', 'resnet8', *data, '--probe', 2)
    few = ('--local_epochs', 1, '--adapt_epochs', 1, '--save_root', tmp_path, '--note', 'fed')
    done = script('tools.fedka', *fed, *few)
    assert done.code == 0, done.err


TOOLS = sorted(path.stem for path in (ROOT / 'tools').glob('[!_]*.py'))


@pytest.mark.parametrize('name', TOOLS)
def test_every_tool_explains_itself_and_refuses_in_one_line(script, monkeypatch, name):
    monkeypatch.syspath_prepend(ROOT / 'tools')  # as for a script that is started there
    done = script(f'tools.{name}', '--help')
    assert done.code == 0 and 'usage' in done.out
    done = script(f'tools.{name}', '--nonsense')
    assert done.code == 2 and done.err.count('\n') == 1 and 'Traceback' not in done.err


@pytest.mark.parametrize(
    'words,said',
    [
        ('missing at', 'after -- comes a command of train_base.py'),
        ('missing at -- nonsense.py', "got 'nonsense.py'"),
        ('missing -- train_kd.py --s_name resnet8', 'name methods before --, those of train_kd.py or'),
        ('missing -- train_base.py --net_name resnet8', 'name methods before --, those of train_kd.py or'),
        *((f'graphs --kd_mode teacher alone --{flag}', 'teacher alone would not read it, lsp does')
          for flag in ('kernel rbf', 'sigma 9', 'gamma 9', 'lambda_kd 9')),
        (f'report.table {ROOT}/results/lm-markov --out x', 'dense train_dense.py, tasks tools/sequences.py'),
        ('missing nonsense -- train_kd.py --s_name resnet8', "'nonsense'"),
        ('missing st -- train_kd.py --epochs many', '--epochs'),
        ('eval --net_name resnet9 x.pt', '6n + 2'),
        ('eval --net_name resnet8 --data_name shapes:40 --workers -1 x.pt', '--workers'),
        ('eval --net_name resnet8 --data_name nonsense x.pt', 'no data set'),
        ('report.table nowhere --out x', 'nowhere: no such folder'),
        (f'report.table {ROOT}/results/digits nope --out x', 'nope: no such folder'),
        (f'report.table {ROOT}/docs --out x', 'no result'),
        ('report.ka nowhere --out x', 'nowhere: no such folder'),
        (f'report.ka {ROOT}/docs --out x', 'no result'),
        (f'report.overview {ROOT}/results/digits', 'python -m report table, ka, dense and tasks show others'),
        ('report.figures nowhere --out x', 'no run of train_ka.py'),
        ('report.table broken --out x', 'broken/results.json: cannot be read as JSON'),
        ('report.ka broken --out x', 'broken/results.json: cannot be read as JSON'),
        ('fedka --t_name resnet8 --t_model x.pt --s_name resnet8 --data_name shapes:40 --batch_size 8',
         'x.pt: no such'),
    ],
)  # fmt: skip
def test_mistakes_with_tools(script, tmp_path, monkeypatch, words, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'broken').mkdir()
    (tmp_path / 'broken' / 'results.json').write_text('{"method": ')
    name, *words = words.split()
    done = script(name if '.' in name else f'tools.{name}', *words)
    assert done.code == 2 and done.err.count('\n') == 1 and said in done.err, done.err + done.out


def test_mistakes_with_the_download():
    done = fresh.run('-m', 'dataset.download', 'nonsense')
    assert done.returncode == 2 and done.stderr.count('\n') == 1 and 'nonsense' in done.stderr


@pytest.mark.parametrize(
    'raised,code,said',
    [
        (KeyboardInterrupt(), 130, 'interrupted'),
        (PermissionError(13, 'Permission denied', '/x/table.md'), 2, 'error: /x/table.md: Permission denied'),
        (
            torch.OutOfMemoryError('CUDA out of memory. Tried to allocate'),
            1,
            'CUDA out of memory: take a smaller',
        ),
    ],
)
def test_what_may_end_any_script_is_one_line(monkeypatch, capsys, raised, code, said):
    def main():
        raise raised

    for words in ([], ['--debug']):
        monkeypatch.setattr(sys, 'argv', ['x.py', *words])
        with pytest.raises(SystemExit) as stop:
            engine.errors.run(main)
        err = capsys.readouterr().err
        assert stop.value.code == code and said in err.splitlines()[-1]
        assert (err.count('\n') == 1) is (not words), '--debug shows where'


@pytest.mark.parametrize(
    'words,said',
    [
        ('train_base --net_name resnet8 --threads 99999', 'at most 1024'),
        ('train_base --net_name resnet8 --lr 1e308', "expected a number > 0, got '1e308'"),
        ('train_base --net_name resnet8 --epochs 99999999999', 'expected a whole number > 0'),
        ('train_base --net_name resnet8 --data_name shapes:99999999999999', 'Unable to allocate'),
        ('train_dml --kd_mode onadvfd --net_names resnet8 resnet8 --amp fp16', 'are not scaled; use bf16'),
        ('tools.graphs --kd_mode teacher --amp bf16', 'computes in float32'),
        ('tools.knowledge --t_name resnet8 --t_model x --s_name resnet8 --amp fp16', 'scales no gradients'),
        ('tools.slim --net_name resnet8 --model x --out FILE --data_name shapes:40', 'cannot write'),
    ],
)
def test_what_no_machine_can_do(script, tmp_path, words, said):
    (tmp_path / 'file').write_text('')
    done = script(*words.replace('FILE', str(tmp_path / 'file')).split())
    assert done.code == 2 and done.err.count('\n') == 1 and said in done.err, done.err + done.out


def test_an_old_torch_is_named():
    """The losses run with it; the scripts say in one line that they do not."""
    code = "import torch; torch.__version__ = '2.2.2'; import engine.errors"
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and done.stderr.count('\n') == 1
    assert 'torch >= 2.11' in done.stderr and '2.2.2' in done.stderr
    assert 'dependencies = ["torch>=2.2"]' in (ROOT / 'pyproject.toml').read_text()


def test_unwritable_output(fails, tmp_path):
    (tmp_path / 'file').write_text('')
    fails(
        'train_base',
        '--net_name',
        'resnet8',
        *TINY,
        '--save_root',
        tmp_path / 'file',
        said='cannot write to the output',
    )
    fails(
        'train_base',
        '--net_name',
        'resnet8',
        *TINY,
        '--save_root',
        '/proc/none',
        said='cannot write to the output',
    )


def test_a_real_process_has_no_traceback(tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / 'train_kd.py'), '--kd_mode', 'st'], capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stderr.count('\n') == 1 and 'Traceback' not in done.stderr


def test_a_reader_that_leaves():
    """`--kd_mode list | head`: no traceback."""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, str(ROOT / 'train_kd.py'), '--kd_mode', 'list']
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, '')


# ------------------------------------------------------------------------------------------ example script


def commands(tmp_path, *words, distilling=0) -> list[list[str]]:
    """What the example script would run, by a python3 on the PATH that only writes its arguments down.

    distilling: the exit code of each train_kd.py, and the script's.
    """
    (tmp_path / 'bin').mkdir(exist_ok=True)
    fake = tmp_path / 'bin' / 'python3'
    fake.write_text(
        '#!/bin/sh\n[ "$1" = -c ] && exit 0\n'
        '[ "$1" = tools/missing.py ] && { shift; while [ "$1" != -- ]; do echo "$1"; shift; done; exit; }\n'
        'words=$(for a in "$@"; do printf "%s\\n" "$a"; done)\n'
        f'printf "%s\\n\\n" "$words" >> {tmp_path}/calls\n'  # at once: two may run at a time
        f'[ "$1" != train_kd.py ] || exit {distilling}\n'
    )
    fake.chmod(0o755)
    env = {**os.environ, 'PATH': f'{tmp_path / "bin"}:{os.environ["PATH"]}', 'IMG_ROOT': './my data'}
    done = subprocess.run(
        ['bash', str(ROOT / 'example_train_script.sh'), *words], capture_output=True, text=True, env=env
    )
    assert done.returncode == distilling, done.stderr
    assert ('inf or NaN' in done.stderr) == (distilling == 1)
    calls = [block.split('\n') for block in (tmp_path / 'calls').read_text().strip().split('\n\n')]
    (tmp_path / 'calls').unlink()
    return calls


def parsed(call: list[str], monkeypatch) -> argparse.Namespace:
    module = importlib.import_module(call[0].removesuffix('.py'))
    monkeypatch.setattr(sys, 'argv', call)
    args = module.parse_args()
    if call[0] == 'train_kd.py':
        args.methods = {
            token: [(part.name, part.weight, part.options) for part in parts]
            for token, parts in module.read_methods(args).items()
        }
    if call[0] == 'train_dml.py':
        _, weight, options = module.read_method(args)
        args.methods = {args.kd_mode[0]: [(args.kd_mode[0], weight, options)]}
    if call[0] in ('train_ka.py', 'train_dfkd.py'):
        read = module.read_methods(args)
        args.methods = read[0] if isinstance(read, tuple) else read
    return args


def test_the_example_commands_parse(tmp_path, monkeypatch):
    calls = commands(tmp_path, 'cifar10')
    assert calls[0][:3] == ['-m', 'dataset.download', 'cifar10'] and calls[-1][:3] == [
        '-m',
        'report',
        'table',
    ]
    scripts = [parsed(call, monkeypatch) for call in calls[1:-1]]
    assert all(a.data_name == 'cifar10' and a.img_root == './my data' and a.resume == 'auto' for a in scripts)
    teacher, student, kd, *others = scripts
    assert (teacher.net_name, student.net_name) == (kd.t_name[0], kd.s_name)
    (second,) = [a for a in others if a.note.startswith('base')]  # of methods that take several teachers
    for run in [a for a in (kd, *others) if hasattr(a, 's_init')]:
        assert run.s_init == f'./save/{student.note}/initial.pt' and len(run.methods) <= 8
        own = list(run.methods) == ['tfkd_self']  # its teacher is the student alone
        several = [METHODS[name].needs.all_teachers for name in run.methods]
        assert all(several) or not any(several)
        runs = [student if own else teacher, *([second] if several[0] else [])]
        assert run.t_model == [f'./save/{a.note}/net.pt' for a in runs]
        assert run.t_name == [a.net_name for a in runs]
    trained = [name for run in (kd, *others) if run is not second for name in run.methods]
    fitting = [name for name, method in METHODS.items() if not method.needs.tokens]
    assert sorted(trained) == sorted(fitting), 'every method of the table that these networks fit, once'


def test_a_loss_that_is_not_finite_does_not_stop_the_example_script(tmp_path):
    """Exit code 1 of train_kd.py: all other commands follow, the table too; 2, a mistake, is the end."""
    every = commands(tmp_path, 'cifar10')
    assert commands(tmp_path, 'cifar10', distilling=1) == every
    cut = commands(tmp_path, 'cifar10', distilling=2)
    assert cut == every[: len(cut)] and [call[0] for call in cut].count('train_kd.py') == 1


def test_the_amalgamation_commands_parse(tmp_path, monkeypatch):
    """Teachers of all parts, every mode for parts that do not overlap; then the rooms and the faces."""
    calls = [call for call in commands(tmp_path, 'ka') if call[0].startswith('train_')]
    scripts = [parsed(call, monkeypatch) for call in calls]
    teachers, parts, rooms, joint = scripts[:2], scripts[2], scripts[3:6], scripts[6]
    assert [t.part for t in teachers] == [0, 1] and all(t.num_parts == 2 for t in teachers)
    assert parts.t_model == [f'./save/{t.note}/net.pt' for t in teachers]
    of_classes = [n for n, m in KA_METHODS.items() if not m.needs.setting or 'classes' in m.needs.setting]
    fitting = {name for name in of_classes if not KA_METHODS[name].needs.shared_classes}
    assert set(parts.methods) == fitting - {'ka_vit'}  # which has networks of its own, below
    assert [room.tasks for room in rooms] == [['seg'], ['depth'], ['normal']]
    assert joint.t_model == [f'./save/{room.note}/scratch/student.pt' for room in rooms]
    assert set(joint.methods) == {'sbm', 'scratch'} and joint.epochs_ft == 5
    notes = {run.note: run for run in scripts if run.note.startswith('ka-faces')}
    for run in notes.values():  # every teacher was trained before, for the attributes that it is said to have
        for path, names in zip(run.t_model, run.t_attributes):
            folder, note, word, _ = path.removeprefix('./save/').split('/')
            maker = notes[f'{folder}/{note}']
            assert list(notes).index(maker.note) < list(notes).index(run.note) and word in maker.methods
            assert names.split(',') == maker.attributes
    trained = {name for run in notes.values() for name in run.methods}
    others = {
        name for name, m in KA_METHODS.items() if {'attributes', 'backbones'} & {*m.needs.setting.split()}
    }
    assert trained == others | {'scratch'}


def test_the_language_model_command_parses(tmp_path, monkeypatch):
    (call,) = commands(tmp_path, 'lm')
    args = parsed(call, monkeypatch)
    assert args.data_name == 'pydoc' and args.note == 'lm-pydoc-s2' and args.resume == 'auto'
    assert set(train_lm.read_methods(args)) >= {'ce', 'fkl', 'gkd', 'gkd_01', 'distillm'}


def test_the_dense_commands_parse(tmp_path, monkeypatch):
    calls = [call for call in commands(tmp_path, 'dense') if call[0].startswith('train_')]
    both = [parsed(call, monkeypatch) for call in calls]
    assert {args.task for args in both} == {'segmentation', 'detection'}, 'both at a time, in any order'
    for args in both:
        assert args.data_name == 'scenes' and args.resume == 'auto' and args.threads == 1
        assert len(train_dense.read_methods(args)) >= 2


def test_dry_run_prints_and_does_nothing(tmp_path, monkeypatch):
    done = subprocess.run(
        ['bash', str(ROOT / 'example_train_script.sh'), '--dry-run', 'quick'], capture_output=True, text=True,
        env={**os.environ, 'IMG_ROOT': './my data'},
    )  # fmt: skip
    printed = [shlex.split(line, comments=True) for line in done.stdout.splitlines()]
    printed = [words for words in printed if words]  # headings are comments
    assert done.returncode == 0 and [words[0] for words in printed] == ['python'] * len(printed)
    # in any order: two trainings run at a time
    assert sorted(words[1:] for words in printed) == sorted(commands(tmp_path, 'quick'))


@pytest.mark.parametrize('name', sorted(METHODS))
def test_every_method_has_its_block(tmp_path, monkeypatch, name):
    *before, call = commands(tmp_path, name)
    assert len(before) == METHODS[name].needs.all_teachers, 'several teachers: the second is trained first'
    args = parsed(call, monkeypatch)
    assert args.methods == {name: [(name, METHODS[name].weight, {})]}, "the block's weight is the table's"


def test_what_is_in_results_is_not_trained_again(script):
    """The committed short schedule: its methods are there, others and other recipes are missing."""
    words = (
        '--t_name resnet20 --t_model x --s_name resnet8 --data_name cifar10 --epochs 12 --amp bf16 --seed 2'
    )

    def missing(*tokens, words=words):
        done = script('tools.missing', *tokens, '--', 'train_kd.py', *words.split())
        assert done.code == 0, done.err
        return done.out.split()

    assert missing('at', 'rkd', 'crd', 'st') == ['crd']
    assert missing('at', words=words + ' --lambda_kd 5') == ['at']
    assert missing('st', 'rkd', words=words + ' --lambda_kd rkd=0.2 --kd_args rkd.w_dist=2.0') == ['rkd']
    labels = (
        '--s_name resnet8 --data_name cifar10:8000 --epochs 2 --batch_size 32 --amp bf16 --schedule onecycle '
        '--soft_labels nowhere'
    )
    assert missing('fkd_labels', words=labels) == ['fkd_labels'], 'of which teacher, nothing says'
    for changed in (('12', '13'), ('bf16', 'off'), ('resnet8', 'resnet14'), ('seed 2', 'seed 3')):
        assert missing('at', words=words.replace(*changed)) == ['at']
    assert missing('at', words=words.replace('--amp bf16', '--amp bf16 --lr 0.05')) == ['at']
    assert missing('at', words=words.replace('--amp bf16', '--amp bf16 --pad zero')) == ['at']


def test_quick_and_mistakes_of_the_example_script(tmp_path, monkeypatch):
    calls = commands(tmp_path, 'quick')
    scripts = [parsed(call, monkeypatch) for call in calls if call[0].startswith('train_')]
    assert all(a.data_name.startswith(('shapes', 'patterns')) for a in scripts)
    kinds = [set(a.methods) for a in scripts if hasattr(a, 'methods')]
    assert sorted(kinds, key=len) == [{'fastdfkd'}, {'layerwise', 'scratch'}, {'st', 'at', 'sp'}]
    for words in ([], ['nonsense']):
        done = subprocess.run(
            ['bash', str(ROOT / 'example_train_script.sh'), *words], capture_output=True, text=True
        )
        assert done.returncode == 2 and done.stderr.count('\n') == 1
    done = subprocess.run(
        ['bash', str(ROOT / 'example_train_script.sh'), '--help'], capture_output=True, text=True
    )
    assert done.returncode == 0 and 'quick' in done.stdout


def test_an_overview_of_what_quick_trained(tmp_path):
    """One table and one figure of results of four scripts: who learnt from what, and how that compares."""
    for name in ('cifar10-resnet20-resnet8-12epochs', 'ka-cifar10-two', 'dfkd-patterns'):
        seeds = '*-s2.json' if name.startswith('cifar10') else '*.json'
        for path in (ROOT / 'results' / name).glob(seeds):
            shutil.copy(path, tmp_path / f'{name}-{path.name}')
    done = fresh.run('-m', 'report', 'overview', tmp_path)
    assert done.returncode == 0, done.stderr
    alone = json.loads((tmp_path / 'cifar10-resnet20-resnet8-12epochs-baseline-resnet8-s2.json').read_text())
    taught = json.loads((tmp_path / 'cifar10-resnet20-resnet8-12epochs-st-s2.json').read_text())
    lines = {
        cells[0]: cells[1:]
        for line in done.stdout.splitlines()
        if line.startswith('| ')
        for cells in [[cell.strip() for cell in line.split('|')[1:-1]]]
    }
    gain = taught['last']['top1'] - alone['last']['top1']
    assert lines['resnet8 with st'] == [
        "labels, teacher's soft outputs", f'{taught["last"]["top1"]:.1f} %', f'{gain:+.1f} points',
    ]  # fmt: skip
    assert lines['these teachers together'][2].endswith('% of the one with labels')
    assert lines['resnet8 with fastdfkd'][0].startswith('no image')
    images = tmp_path / 'dfkd' / 'fastdfkd' / 'images'
    images.mkdir(parents=True)
    torchvision.utils.save_image(torch.rand(64, 3, 16, 16), images / 'epoch003.png')
    assert fresh.run('-m', 'report', 'overview', tmp_path).returncode == 0, 'a panel more'
    assert (tmp_path / 'overview.png').stat().st_size > 10_000 and (tmp_path / 'overview.md').exists()
    done = fresh.run('-m', 'report', 'overview', tmp_path / 'nothing')
    assert done.returncode == 2 and done.stderr.count('\n') == 1
