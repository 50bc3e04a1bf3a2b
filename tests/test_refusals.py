"""What cannot work is said in one line before anything is trained, and nothing is lost by the try."""

import json
import shlex
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import dataset.folder
import engine.build
import engine.data
import engine.device
import engine.evaluate
import models
import tools.eval
import tools.missing
import tools.pseudo_labels
import train_dfkd
from dataset.folder import Folder
from dataset.soft_labels import SAME, SoftLabelStore, write_epoch
from engine.errors import UserError
from engine.flags import data_words
from kd_losses import wkd
from tests import fresh
from tests.conftest import TINY
from tests.test_cli import flags_of
from tests.test_data import write_folder

BASE = ('train_base', '--net_name', 'resnet8')
ALONE = ('train_kd', '--s_name', 'resnet8', '--kd_mode', 'tfkd')  # without a teacher
PEERS = ('train_dml', '--kd_mode', 'dml', '--net_names', 'resnet8', 'resnet8')
TWO_TOKENS = 'vit_64_3x2'  # for images of 32 pixels a side
PATTERNS = ('--data_name', 'patterns:40', '--batch_size', '8', '--epochs', '1')  # 16 pixels


@pytest.fixture
def fails(script):
    """fails(script name, words...) -> the one line of an exit with code 2."""

    def call(name, *words):
        done = script(name, *words)
        assert done.code == 2 and done.err.count('\n') == 1, done.err
        return done.err

    return call


@pytest.mark.parametrize(
    'words,said',
    [
        ((*BASE, *TINY, '--classes', '3'), 'one class only'),
        ((*ALONE, *TINY, '--batch_size', '1'), '--batch_size 1'),
        ((*PEERS, *TINY, '--batch_size', '1'), '--batch_size 1'),
        (
            ('train_base', '--net_name', TWO_TOKENS, *PATTERNS),
            f'{TWO_TOKENS}: does not take images of 16 x 16: ',
        ),
        (
            ('train_kd', '--kd_mode', 'tfkd', '--s_name', TWO_TOKENS, *PATTERNS),
            'does not take images of 16 x 16',
        ),
        (('train_dml', '--kd_mode', 'dml', '--net_names', *2 * [TWO_TOKENS], *PATTERNS), 'images of 16 x 16'),
        ((*ALONE, *TINY, '--init_epochs', '3'), '--init_epochs: tfkd: '),
        ((*ALONE, *TINY, '--pretrain_epochs', '3'), '--pretrain_epochs: tfkd: '),
        ((*ALONE, *TINY, '--global_relations'), '--global_relations: tfkd: '),
        ((*ALONE, *TINY, '--t_mean', '0.5', '0.5', '0.5'), '--t_mean and --t_std'),
        (('tools.missing', 'fkl', '--', 'train_lm.py', '--steps', '5'), "got 'train_lm.py'"),
    ],
)
def test_one_line(fails, words, said):
    assert said in fails(*words)


def test_a_folder_one_level_too_deep(fails, tmp_path):
    root = write_folder(tmp_path / 'images', per_class=2)
    for half in ('train', 'val'):
        (root / half).rename(root / 'all')
        (root / half).mkdir()
        (root / 'all').rename(root / half / 'all')
    words = (
        '--data_name',
        'folder',
        '--img_root',
        root,
        '--image_size',
        32,
        '--batch_size',
        2,
        '--workers',
        0,
    )
    assert 'one class only (all)' in fails(*BASE, *words)


def test_a_teacher_for_other_images(fails, tmp_path):
    torch.save(models.build(TWO_TOKENS, 10).state_dict(), tmp_path / 'net.pt')
    words = (
        '--t_name',
        TWO_TOKENS,
        '--t_model',
        tmp_path / 'net.pt',
        '--s_name',
        'resnet8',
        '--kd_mode',
        'st',
    )
    assert 'net.pt: does not take images of 16 x 16: vit: with 2 tokens' in fails(
        'train_kd', *words, *PATTERNS
    )


def test_the_try_changes_nothing(tmp_path):
    train = Folder(write_folder(tmp_path) / 'train', 'cpu', image_size=32, workers=0)
    net = models.build('resnet8', 3)
    before = {name: x.clone() for name, x in net.state_dict().items()}
    state = torch.get_rng_state()
    engine.evaluate.refuse_misfit('resnet8', net, train)
    assert torch.equal(torch.get_rng_state(), state) and all(m.training for m in net.modules())
    assert all(torch.equal(x, before[name]) for name, x in net.state_dict().items())
    small = nn.Sequential(nn.Conv2d(3, 4, 40))
    with pytest.raises(UserError, match='small: does not take images of 32 x 32: '):
        engine.evaluate.refuse_misfit('small', small, train)


def test_too_few_images_for_all_processes(fails, teacher, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(engine.data, 'processes', lambda: 60)
        for start in (BASE, ALONE, PEERS):
            assert 'every process needs two' in fails(*start, *TINY)
    monkeypatch.setattr(engine.build, 'processes', lambda: 4)
    words = ('--t_name', 'resnet8', '--t_model', teacher, '--s_name', 'resnet8', '--kd_mode', 'st', 'semckd')
    assert '--batch_size 32 x 4 processes' in fails('train_kd', *words, *TINY)


@pytest.mark.parametrize('missing', ['RANK', 'LOCAL_RANK', 'MASTER_ADDR', 'MASTER_PORT'])
def test_half_of_what_torchrun_sets(fails, monkeypatch, missing):
    for name in ('WORLD_SIZE', 'RANK', 'LOCAL_RANK', 'MASTER_ADDR', 'MASTER_PORT'):
        monkeypatch.setenv(name, '2')
    monkeypatch.delenv(missing)
    monkeypatch.setattr(engine.device, 'join_processes', lambda device: pytest.fail('it waits for others'))
    assert f'there is no {missing}: start with torchrun' in fails(*BASE)


def test_labels_are_stored_by_one_process(fails, monkeypatch, tmp_path):
    monkeypatch.setenv('WORLD_SIZE', '2')
    monkeypatch.setitem(sys.modules, 'pseudo_labels', tools.pseudo_labels)
    words = ('--t_name', 'resnet8', '--t_model', 'x', '--out', tmp_path / 'labels')
    assert 'one process only' in fails('pseudo_labels', *words)


def test_flags_are_offered_where_they_are_read(monkeypatch):
    assert '--print_freq' not in flags_of(train_dfkd, monkeypatch)


def test_a_missing_tensorboard_costs_nothing(fails, teacher, monkeypatch):
    monkeypatch.setitem(sys.modules, 'torch.utils.tensorboard', None)
    words = (*BASE, '--note', 'teacher', *TINY, '--resume', 'never')
    assert 'tensorboard is not installed' in fails(*words, '--tensorboard')
    assert teacher.exists() and teacher.with_name('last.pt').exists()


# ------------------------------------------------------------------------------ folders and their workers


def test_only_the_training_process_ends_workers(tmp_path):
    """Signals of others, as torchrun and a terminal send them to the whole group, change nothing."""
    program = (
        'import multiprocessing, subprocess, sys\n'
        'from dataset.folder import Folder\n'
        'test = Folder(sys.argv[1], "cpu", image_size=24, workers=1)\n'
        'batches = test.test_batches(1)\n'
        'next(batches)\n'
        '(worker,) = multiprocessing.active_children()\n'
        'for name in ("-TERM", "-INT"):\n'
        '    subprocess.run(["kill", name, str(worker.pid)], check=True)\n'
        'print(1 + len(list(batches)), "of", len(test))\n'
        'sys.left = test.test_batches(1)  # Python ends its worker as it ends itself\n'
        'next(sys.left)\n'
    )
    folder = write_folder(tmp_path) / 'val'
    done = fresh.run('-c', program, folder, timeout=60)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, '15 of 15', '')


@pytest.mark.parametrize(
    'said,kind',
    [('DataLoader worker (pid 7) is killed by signal: Killed. ', ValueError), ('else', RuntimeError)],
)
def test_the_end_of_a_worker_is_one_line(tmp_path, monkeypatch, said, kind):
    def end(*_, **__):
        raise RuntimeError(said)
        yield

    test = Folder(write_folder(tmp_path) / 'val', 'cpu', image_size=24, workers=1)
    monkeypatch.setattr(dataset.folder, 'DataLoader', end)
    with pytest.raises(kind) as caught:
        list(test.test_batches(1))
    assert said.strip() in str(caught.value) and ('--workers 0' in str(caught.value)) == (kind is ValueError)


def test_processes_without_an_image(tmp_path, monkeypatch):
    test = Folder(write_folder(tmp_path, per_class=1) / 'val', 'cpu', image_size=24, workers=0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 24 * 24, 3), nn.Unflatten(1, (1, 3)))
    stacked = lambda img: net(img).transpose(0, 1)  # noqa: E731
    stacked.eval, stacked.buffers = net.eval, net.buffers
    outs, target = engine.evaluate.outputs(stacked, test)
    assert outs.shape == (1, 3, 3)
    first = [(outs, target)]
    for rank in (3, 4):
        test.shard = (rank, 5)
        assert list(test.test_batches(2)) == []
        engine.evaluate.refuse_misfit('net', net, test)
        monkeypatch.setattr(engine.evaluate, 'processes', lambda: 2)
        monkeypatch.setattr(engine.evaluate, 'gathered', lambda mine: [first, mine])
        assert torch.equal(engine.evaluate.outputs(stacked, test)[0], outs)


def test_losses_see_the_whole_training_set(fails, monkeypatch):
    """Under torchrun, too, where the groups of tdd must be the same everywhere; steps are one process's."""
    seen = []

    def noted(term, net, probe, device):
        data = probe.train_set
        seen[:] = sum(len(img) for img, *_ in data.test_batches(32)), data.steps(16)
        raise UserError('enough')

    monkeypatch.setattr(engine.data, 'processes', lambda: 2)
    monkeypatch.setattr(engine.build, 'build_term', noted)
    fails(*ALONE, *TINY, '--batch_size', '16')
    assert seen == [96, 3]


class Labelled:
    def __init__(self, target, index):
        self.targets, self.index, self.read = target, index, 0

    def __len__(self):
        return len(self.index)

    def subset(self, index):
        return Labelled(self.targets[index], self.index[index])

    def test_batches(self, n):
        Labelled.read = len(self)
        return zip(self.index.split(n), self.targets.split(n), self.index.split(n))


def test_wkd_looks_at_a_few_images_of_each_class():
    torch.manual_seed(0)
    target, logits = torch.randint(3, (90,)), torch.randn(90, 3)
    teacher = lambda img: SimpleNamespace(out=logits[img])  # noqa: E731
    kd, plain = (wkd.WKDLogit(torch.zeros(3, 3)) for _ in 'ab')
    probe = SimpleNamespace(train_set=Labelled(target, torch.arange(90)), batch_size=8)
    wkd.before(kd, teacher, probe, per_class=5)
    assert Labelled.read == 15
    first = torch.cat([(target == y).nonzero()[:5, 0] for y in range(3)])
    plain.cost.copy_(wkd.cka_cost(logits[first].view(3, 5, 3)))
    assert torch.equal(kd.cost, plain.cost)


# --------------------------------------------------------------------------- what is kept and found again


def test_a_run_that_moves_is_whole_at_once(script, teacher, tmp_path):
    words = (*BASE, *TINY, '--note', 'moved', '--resume')
    assert script(*words, tmp_path / 'teacher').code == 0
    assert (tmp_path / 'moved' / 'last.pt').exists() and (tmp_path / 'moved' / 'metrics.csv').exists()
    shutil.rmtree(tmp_path / 'teacher')
    assert script(*words, 'auto').code == 0


def test_the_last_line_names_the_data(monkeypatch):
    args = SimpleNamespace(data_name='folder', img_root='my data', image_size=64, convert_rgb=True)
    line = models.how_to_load('net.pt', 'resnet8', data_words(args), 3)
    words = shlex.split(line.split('python tools/eval.py ')[1].split(' measures')[0])
    monkeypatch.setattr(sys, 'argv', ['eval.py', *words])
    read = tools.eval.parse_args()
    assert all(getattr(read, name) == value for name, value in vars(args).items()) and read.files == [
        'net.pt'
    ]
    usual = SimpleNamespace(data_name='shapes', img_root='./data', image_size=224, convert_rgb=False)
    assert data_words(usual) == 'shapes'


def test_a_weight_in_place_of_a_schedule_is_another_recipe(monkeypatch):
    words = '--t_name resnet20 --t_model x --s_name resnet8'.split()
    monkeypatch.setattr(sys, 'argv', sys.argv)
    own, fixed = (
        tools.missing.wanted('train_kd.py', 'cd_edt', [*words, *more]) for more in ([], ['--lambda_ce', '1'])
    )
    assert tools.missing.done(own, [own]) and tools.missing.done(fixed, [fixed])
    assert not tools.missing.done(own, [fixed]) and not tools.missing.done(fixed, [own])
    same = [tools.missing.wanted('train_kd.py', 'at', [*words, *more]) for more in ([], ['--lambda_ce', '1'])]
    assert same[0] == same[1] and 'ce_scheduled' not in {**own, **same[0]}


def test_soft_labels_on_a_full_disk(tmp_path, monkeypatch):
    def full(*_):
        raise OSError('12 requested and 0 written')

    monkeypatch.setattr(np, 'save', full)
    outs = [(torch.arange(4), torch.randn(4, 3))]
    with pytest.raises(ValueError, match=r'epoch_0000/index.npy: cannot be written \(12 requested'):
        write_epoch(tmp_path, 0, 4, outs, 'hard', 1.0, 3)


@pytest.mark.parametrize('missing', [*SAME, 'images', 'teacher', 'teacher_weights', 'teacher_top1', 'epochs'])
def test_a_store_that_does_not_say_everything(tmp_path, missing):
    write_epoch(tmp_path, 0, 4, [(torch.arange(4), torch.randn(4, 3))], 'hard', 1.0, 3)
    meta = dict.fromkeys((*SAME, 'images', 'teacher', 'teacher_weights', 'teacher_top1'), 1)
    meta |= {'kind': 'hard', 'num_classes': 3, 'epochs': 1}
    (tmp_path / 'meta.json').write_text(json.dumps(meta))
    SoftLabelStore(tmp_path)  # temp_t and own_images are newer than the first stores
    del meta[missing]
    (tmp_path / 'meta.json').write_text(json.dumps(meta))
    with pytest.raises(ValueError, match='no complete store'):
        SoftLabelStore(tmp_path)
