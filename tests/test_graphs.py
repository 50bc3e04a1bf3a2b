"""Recorded steps, as far as they show without CUDA: the logic around the recording, and what a row of METHODS
must be like for a recording to be right. A stand-in records: it runs nothing at first and all at a replay."""

import argparse
import copy
import json
import sys

import pytest
import torch

import train_kd
import utils
from dataset import load
from kd_losses import METHODS
from models import build
from tests.test_contract import NoReadBack

ROWS = [name for name, m in METHODS.items() if not (m.peers or m.eager)]


class StandIn:
    """Records like CUDA: the recorded step runs at each replay, on the recorded tensors."""

    def __init__(self):
        self.recorded = self.replayed = 0

    def __call__(self, generators):
        def record(step):
            self.recorded += 1
            late = Late()

            def replay():
                self.replayed += 1
                late.content = step()

            return replay, late

        return record


class Late:
    """What a recorded step returned: known after a replay."""

    def __iter__(self):
        return iter(self.content)


def test_a_recorded_run_is_the_usual_run(script, teacher, tmp_path, monkeypatch):
    """Students that can be recorded and one that cannot (fcfd), further views, a smaller last batch."""
    words = ('--kd_mode', 'at', 'crd', 'fcfd', 'cskd', '--t_name', 'resnet8', '--t_model', teacher,
             '--s_name', 'resnet8', '--data_name', 'shapes:100', '--batch_size', 16, '--epochs', 2,
             '--kd_args', 'crd.nce_n=20')  # fmt: skip
    assert script('train_kd', *words, '--note', 'usual').code == 0
    stand_in = StandIn()
    monkeypatch.setattr(utils, 'cuda_graph', stand_in)
    monkeypatch.setattr(utils, 'graphs_wanted', lambda *_: True)
    done = script('train_kd', *words, '--note', 'recorded')
    assert done.code == 0, done.err
    assert (stand_in.recorded, stand_in.replayed) == (2, 6)  # each epoch: 3 usual, 3 replayed, 1 smaller
    for name in ('at', 'crd', 'fcfd', 'cskd'):
        first, second = (torch.load(tmp_path / run / name / 'student.pt') for run in ('usual', 'recorded'))
        assert all(torch.equal(first[key], second[key]) for key in first), name
    done = script('train_base', '--net_name', 'resnet8', *words[11:17], '--note', 'base')
    assert done.code == 0, done.err
    assert (stand_in.recorded, stand_in.replayed) == (4, 12)


def test_the_flag_means_nothing_without_cuda(script, teacher, tmp_path):
    words = ('--net_name', 'resnet8', '--data_name', 'shapes:96', '--batch_size', 32, '--epochs', 1)
    for note, more in (('plain', ()), ('graphs', ('--cuda_graphs',))):
        assert script('train_base', *words, '--note', note, *more).code == 0
    first, second = (torch.load(tmp_path / note / 'net.pt') for note in ('plain', 'graphs'))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_what_cannot_be_recorded_is_refused(monkeypatch):
    device = torch.device('cuda')
    args = argparse.Namespace(cuda_graphs=True, amp='bf16')
    assert utils.graphs_wanted(args, device)
    assert not utils.graphs_wanted(args, torch.device('cpu'))
    assert not utils.graphs_wanted(argparse.Namespace(cuda_graphs=False, amp='fp16'), device)
    with pytest.raises(utils.UserError, match='fp16'):
        utils.graphs_wanted(argparse.Namespace(cuda_graphs=True, amp='fp16'), device)
    monkeypatch.setenv('WORLD_SIZE', '2')
    with pytest.raises(utils.UserError, match='one process'):
        utils.graphs_wanted(args, device)


def test_batches_go_where_the_recorded_one_lay():
    seen = []

    def step(img, target, index, more):
        seen.append((img.data_ptr(), img.stride(), float(img.sum()), int(target[0]), sorted(more)))
        return len(seen)

    replayed = utils.Replayed(step, StandIn()([]))
    for k in range(7):
        img = torch.full((2, 3, 4, 4), float(k)).to(memory_format=torch.channels_last)
        replayed(img, torch.tensor([k, 0]), torch.tensor([0, 1]), {'second': img})
    places, strides, sums, targets, views = zip(*seen)
    assert len(set(places[3:])) == 1 and set(strides) == {img.stride()}
    assert sums == tuple(96.0 * k for k in range(7)) and targets == tuple(range(7))
    assert set(map(tuple, views)) == {('second',)}


@pytest.fixture(scope='module')
def runs(img_root, tmp_path_factory):
    """A student of every recordable row, and a function that takes a step with one of them."""
    folder = tmp_path_factory.mktemp('graphs')
    device, amp = torch.device('cpu'), utils.autocast(torch.device('cpu'), 'off')
    train, _ = load('shapes:96', str(img_root), device)
    batches = list(train.train_batches(16, 0, 0, ('pair', 'second', 'strong')))
    torch.manual_seed(0)
    net_t, net_s = build('resnet14', 10).eval().requires_grad_(False), build('resnet8', 10)
    world = train_kd.Look([net_t, net_t], amp, ['pair', 'second', 'strong'], batches[0][0])
    words = ['train_kd.py', '--kd_mode', *ROWS, '--t_name', 'resnet14', 'resnet14', '--t_model', '-', '-',
             '--s_name', 'resnet8', '--batch_size', '16', '--epochs', '10', '--resume', 'never',
             '--kd_args', 'crd.nce_n=20', 'quest.num_words=8']  # fmt: skip
    argv, sys.argv = sys.argv, words
    args = train_kd.parse_args()
    sys.argv = argv
    wanted = train_kd.read_methods(args)
    built = train_kd.build_runs(args, wanted, folder, {'commit': None}, net_s, world, train, 'test', device)

    def step(run, k, epoch=5):
        img, target, index, more = (copy.copy(x) for x in batches[k])
        b = train_kd.SimpleNamespace(img=img, target=target, index=index, views=more, epoch=epoch, epochs=10,
                                     teacher=world.teacher, net_t=world.net_t)  # fmt: skip
        ts = world.teachers_on(img)
        b.shared = world.prepared([run], ts, b)
        train_kd.train_student(run, b, ts)

    for run in built:
        train_kd.begin_epoch(run, 0, args, device)
    return {run.name: run for run in built}, step


def places(run) -> dict:
    """Where everything lies that outlives a step."""
    state = {f'state.{key}': value for key, value in run.step.state_dict(keep_vars=True).items()}
    for name, module in run.step.losses.named_modules():
        kept = {key: value for key, value in vars(module).items() if isinstance(value, torch.Tensor)}
        state |= {f'{name}.{key}': value for key, value in {**kept, **module._buffers}.items()}
    for k, moments in enumerate(run.opt.state.values()):
        state |= {f'opt.{k}.{key}': value for key, value in moments.items()}
    state |= {f'meter.{key}': value for key, value in run.meter.sums.items()}
    state |= {'meter.steps': run.meter.steps, 'meter.bad_step': run.meter.bad_step}
    return {key: value.data_ptr() for key, value in state.items() if isinstance(value, torch.Tensor)}


def decided(run) -> dict:
    """What Python keeps in the losses: numbers, texts, flags, lists of them."""
    plain = (bool, int, float, str, tuple, list, type(None))
    return {
        f'{name}.{key}': copy.deepcopy(value)
        for name, module in run.step.losses.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, plain) and not key.startswith('_')
    }


@pytest.mark.parametrize('name', ROWS)
def test_a_step_leaves_everything_where_it_was(runs, name):
    """A replay works on the recorded addresses, and repeats what Python decided."""
    built, step = runs
    run = built[name]
    step(run, 0)
    step(run, 1)
    before, choices = places(run), decided(run)
    step(run, 2)
    assert not run.meter.failure
    assert places(run) == before
    assert decided(run) == choices


@pytest.mark.parametrize('name', ROWS)
def test_a_step_reads_nothing_back(runs, name, monkeypatch):
    """The whole step, student and update included; the guard looks at once on the CPU only."""
    built, step = runs
    monkeypatch.setattr(utils.Meter, 'guard', lambda *_: True)
    step(built[name], 3)
    with NoReadBack():
        step(built[name], 4)


def test_a_step_that_moves_its_state_is_noticed(runs):
    built, step = runs
    run = built['crd']
    step(run, 0)
    before = places(run)
    for module in run.step.losses.modules():
        for key, buffer in list(module._buffers.items()):
            module._buffers[key] = buffer.clone()
    assert places(run) != before


def test_the_gpu_benchmark_rehearses(monkeypatch, capsys, tmp_path):
    from benchmarks import cuda

    monkeypatch.setattr(cuda, 'ROWS', ['st', 'crd', 'kdsvd'])
    out = tmp_path / 'cuda.json'
    monkeypatch.setattr(sys, 'argv', ['cuda', 'agree', 'G3', '--device', 'cpu', '--out', str(out)])
    assert cuda.main() == 0
    rows = json.loads(out.read_text())['rows']
    assert [(r['goal'], r['what'], r['met']) for r in rows] == [
        (goal, name, True) for goal in ('agree', 'G3') for name in cuda.ROWS
    ]
    assert [r['draws'] for r in rows[:3]] == [False, True, False] and rows[0]['gradient'] == 0

    gradient = cuda.student_gradient

    def another(name, n, device):  # the device adds up differently
        loss, gradients, drawn = gradient(name, n, torch.device('cpu'))
        away = 0.01 if device.type == 'meta' else 0
        return loss, {key: g + away * g.abs().max() for key, g in gradients.items()}, drawn

    monkeypatch.setattr(cuda, 'student_gradient', another)
    met = {row['what']: row['met'] for row in cuda.agree(torch.device('meta'))}
    assert met == {'st': False, 'crd': True, 'kdsvd': False}

    monkeypatch.setattr(sys, 'argv', ['cuda', 'G9', '--device', 'cpu'])
    assert cuda.main() == 2
    assert 'no goal is called G9' in capsys.readouterr().err
    if not torch.cuda.is_available():
        monkeypatch.setattr(sys, 'argv', ['cuda'])
        assert cuda.main() == 2
        assert 'no CUDA device here' in capsys.readouterr().err
