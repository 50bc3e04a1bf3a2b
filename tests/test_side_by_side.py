"""Students side by side: worker threads on the CPU, and recorded steps as far as they show without CUDA (a
stand-in records: it runs nothing at first and all at a replay)."""

import argparse
import copy
import gc
import json
import os
import subprocess
import sys
import weakref

import pytest
import torch

import engine.device
import engine.errors
import engine.meter
import engine.optimise
import engine.record
import engine.side_by_side
import train_kd
from benchmarks import cuda
from dataset import load
from engine import side_by_side
from engine.batch import Batch, InFloat32
from engine.teachers import Teachers
from methods import METHODS
from models import Feats, build
from tests.conftest import ROOT, TRANSFORMERS, Killed
from tests.test_contract import NoReadBack
from tests.test_train import rows

EVERY = [name for name, m in METHODS.items() if not m.own.peers and name not in TRANSFORMERS]
ROWS = [name for name in EVERY if not METHODS[name].limits.no_graph]


class StandIn:
    """benchmarks.cuda.stand_in, with counts."""

    def __init__(self):
        self.recorded = self.replayed = 0

    def __call__(self, *_):
        def capture(work):
            self.recorded += 1
            replay, returned = cuda.stand_in()(work)

            def counted():
                self.replayed += 1
                replay()

            return counted, returned

        return capture


# ------------------------------------------------------------------------------------------- worker threads


def same_files(a, b) -> None:
    first, second = (torch.load(folder / 'student.pt') for folder in (a, b))
    assert all(torch.equal(first[key], second[key]) for key in first), a.name
    assert rows(a) == rows(b)


def test_alone_equals_together_whatever_the_cores(script, teacher, tmp_path):
    """One student on one core, and five at once on two; bfloat16, further views, a last batch that is
    smaller, a row that draws, one that keeps a memory, a phase before the training."""
    words = ('--t_name', 'resnet8', '--t_model', teacher, '--s_name', 'resnet8', '--amp', 'bf16',
             '--data_name', 'shapes:100', '--batch_size', 16, '--epochs', 2)  # fmt: skip
    names = ('at', 'crd', 'fcfd', 'mlkd_strong', 'ab')
    done = script('train_kd', *words, '--kd_mode', *names, '--kd_args', 'crd.nce_n=20', '--note', 'all',
                  '--threads', 2)  # fmt: skip
    assert done.code == 0, done.err
    for name in names:
        options = ('--kd_args', 'nce_n=20') if name == 'crd' else ()
        done = script('train_kd', *words, '--kd_mode', name, *options, '--note', name, '--threads', 1)
        assert done.code == 0, done.err
        same_files(tmp_path / 'all' / name, tmp_path / name / name)
    torch.set_num_threads(1)


def test_a_student_of_several_threads(script, teacher, tmp_path):
    words = ('--t_name', 'resnet8', '--t_model', teacher, '--s_name', 'resnet8', '--kd_mode', 'st',
             '--data_name', 'shapes:64', '--batch_size', 16, '--epochs', 1, '--threads', 2)  # fmt: skip
    done = script('train_kd', *words, '--note', 'one')
    assert 'uses 1 of 2 cores (--student_threads 2' in done.out
    done = script('train_kd', *words, '--note', 'two', '--student_threads', 2)
    assert done.code == 0 and 'cores (' not in done.out
    torch.set_num_threads(1)


def test_workers_look_ahead_and_keep_the_order():
    workers = side_by_side.Workers(2, 1)
    looked, seen = [], []

    def look(k):
        looked.append(k)
        return f'batch {k}'

    for batch in workers.looks(look, [(k,) for k in range(5)]):
        workers.train(lambda run, what: seen.append((run, what)), ['a', 'b'], batch)
    assert looked == list(range(5))
    assert sorted(seen) == [(run, f'batch {k}') for run in 'ab' for k in range(5)]
    assert workers.each(lambda x: x * x, [3, 1, 2]) == [9, 1, 4]
    first = next(iter(workers.looks(look, [(k,) for k in range(5)])))  # left early
    assert first == 'batch 0' and looked[5:] in ([0], [0, 1])


def test_an_error_of_a_student_ends_the_training_with_its_words():
    workers, done = side_by_side.Workers(2, 1), []

    def step(run, seen):
        if run == 'bad':
            raise ValueError('of this student')
        done.append(run)

    with pytest.raises(ValueError, match='of this student'):
        workers.train(step, ['bad', 'good', 'fine'], None)
    assert sorted(done) == ['fine', 'good'], 'the others end their step first'


def test_a_failed_student_touches_no_other(script, teacher, tmp_path):
    words = ('--t_name', 'resnet8', '--t_model', teacher, '--s_name', 'resnet8', '--data_name', 'shapes:96',
             '--batch_size', 32, '--epochs', 2, '--threads', 2)  # fmt: skip
    done = script('train_kd', *words, '--kd_mode', 'at', 'st', 'sp', '--lambda_kd', 'at=1e39', '--note', 'g')
    assert done.code == 1 and 'at: the loss is not finite at epoch 1, step 1' in done.err
    assert script('train_kd', *words, '--kd_mode', 'st', 'sp', '--note', 'h').code == 0
    for name in ('st', 'sp'):
        same_files(tmp_path / 'g' / name, tmp_path / 'h' / name)
    torch.set_num_threads(1)


# -------------------------------------------------------------------------------------------- casts when read


def test_casts_are_made_when_they_are_read():
    maps = [torch.ones(2, 3, 4, 4, dtype=torch.bfloat16) for _ in range(4)]
    f = Feats(torch.ones(2, 5, dtype=torch.bfloat16), torch.ones(2, 3, dtype=torch.bfloat16), maps, maps)
    reads = set()
    s = InFloat32(f, reads)
    assert s.fms[-1].dtype == torch.float32 and s.fms[-1] is s.fms[3] and reads == {('fms', 3)}
    assert [x.dtype for x in s.fms[1:3]] == [torch.float32] * 2 and len(s.fms) == 4 and len(list(s.pres)) == 4
    assert s.out is s.out and s.extra is None and 'out' in reads
    with pytest.raises(IndexError):
        s.fms[4]
    again = InFloat32(f, reads)
    again.cast_ahead()
    assert set(again._cast) == reads
    again.freeze()
    assert again.feat is not again.feat, 'a later cast is not kept'
    full = Feats(*(x.float() for x in f[:2]), [x.float() for x in maps], maps)
    assert InFloat32(full).out is full.out, 'nothing to cast, nothing copied'


# --------------------------------------------------------------------------------------------- recorded steps


def test_a_recorded_run_is_the_usual_run(script, teacher, tmp_path, monkeypatch):
    """Students that can be recorded and one that cannot (fcfd), further views, a smaller last batch."""
    words = ('--kd_mode', 'at', 'crd', 'fcfd', 'cskd', 'lwm', '--t_name', 'resnet8', '--t_model', teacher,
             '--s_name', 'resnet8', '--data_name', 'shapes:100', '--batch_size', 16, '--epochs', 3,
             '--kd_args', 'crd.nce_n=20')  # fmt: skip
    assert script('train_kd', *words, '--note', 'usual').code == 0
    stand_in = StandIn()
    monkeypatch.setattr(side_by_side, 'cuda_capture', stand_in)
    monkeypatch.setattr(engine.side_by_side, 'graphs_wanted', lambda *_: True)
    done = script('train_kd', *words, '--note', 'recorded')
    assert done.code == 0, done.err
    # 7 batches an epoch, the last smaller: of 18 whole ones 3 are usual. Recordings are kept over epochs, but
    # the learning rate drops in the third: where it is no tensor, the four students begin anew
    assert stand_in.recorded == 1 + 4 * 2 and stand_in.replayed == (18 - 3) + 4 * (18 - 2 * 3)
    for name in ('at', 'crd', 'fcfd', 'cskd', 'lwm'):
        same_files(tmp_path / 'usual' / name, tmp_path / 'recorded' / name)
    before = stand_in.recorded
    base = ('--net_name', 'resnet8', *words[12:18])
    assert script('train_base', *base, '--note', 'usual-base').code == 0
    assert stand_in.recorded > before
    monkeypatch.undo()


def test_what_is_decided_begins_a_recording_anew():
    recorded, ran = [], []

    def capture(work):
        recorded.append(work)
        return work, None

    own = side_by_side.Repeated(capture)
    for decided, recordable in [*[('a', True)] * 6, ('a', False), ('a', True), *[('b', True)] * 5]:
        own(lambda: ran.append(None), decided, recordable)
    assert len(recorded) == 2 and len(ran) == 13, 'every call takes one step, recorded or not'


def test_a_loss_that_reads_the_epoch_is_recorded_for_that_epoch_only(runs):
    built, step = runs
    for name, reads in (('pskd', True), ('st', False), ('dkd', False), ('ctkd', False)):
        step(built[name], 0)
        assert built[name].reads_epoch is reads, name
        run, before = built[name], built[name].decided()
        run.now += 1
        assert (run.decided() != before) is reads
        run.now -= 1
    run, before = built['ctkd'], built['ctkd'].decided()
    run.inner = {'ctkd': 0.25}
    assert run.decided() != before, 'a schedule inside the loss'


def test_a_recording_that_fails_leaves_usual_steps(script, teacher, tmp_path, monkeypatch):
    words = ('--kd_mode', 'at', 'st', '--t_name', 'resnet8', '--t_model', teacher, '--s_name', 'resnet8',
             '--data_name', 'shapes:96', '--batch_size', 16, '--epochs', 2)  # fmt: skip
    assert script('train_kd', *words, '--note', 'usual').code == 0
    counted = []

    def fails(*_):
        def capture(work):
            if work.func is not side_by_side._settled and work.args[0].name == 'at':
                counted.append(work)
                raise RuntimeError('operation not permitted when stream is capturing')
            return cuda.stand_in()(work)

        return capture

    monkeypatch.setattr(side_by_side, 'cuda_capture', fails)
    monkeypatch.setattr(engine.side_by_side, 'graphs_wanted', lambda *_: True)
    done = script('train_kd', *words, '--note', 'recorded')
    assert done.code == 0 and done.out.count('at: its step cannot be recorded, usual steps follow') == 1
    assert len(counted) == 1
    for name in ('at', 'st'):
        same_files(tmp_path / 'usual' / name, tmp_path / 'recorded' / name)


def test_the_flag_means_nothing_without_cuda(script, teacher, tmp_path):
    words = ('--net_name', 'resnet8', '--data_name', 'shapes:96', '--batch_size', 32, '--epochs', 1)
    for note, more in (('plain', ()), ('graphs', ('--cuda_graphs',))):
        assert script('train_base', *words, '--note', note, *more).code == 0
    first, second = (torch.load(tmp_path / note / 'net.pt') for note in ('plain', 'graphs'))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_what_cannot_be_recorded_is_refused(monkeypatch):
    device = torch.device('cuda')
    args = argparse.Namespace(cuda_graphs=True, amp='bf16', optim='sgd')
    assert engine.side_by_side.graphs_wanted(args, device)
    assert not engine.side_by_side.graphs_wanted(args, torch.device('cpu'))
    assert not engine.side_by_side.graphs_wanted(argparse.Namespace(cuda_graphs=False, amp='fp16'), device)
    with pytest.raises(engine.errors.UserError, match='fp16'):
        engine.side_by_side.graphs_wanted(argparse.Namespace(cuda_graphs=True, amp='fp16'), device)
    with pytest.raises(engine.errors.UserError, match='sgd only'):
        engine.side_by_side.graphs_wanted(argparse.Namespace(**vars(args) | {'optim': 'adamw'}), device)
    monkeypatch.setenv('WORLD_SIZE', '2')
    with pytest.raises(engine.errors.UserError, match='one process'):
        engine.side_by_side.graphs_wanted(args, device)


def test_batches_go_where_the_recorded_one_lay(monkeypatch):
    monkeypatch.setattr(side_by_side, 'cuda_capture', cuda.stand_in)
    seen = []

    def look(img, target, index, views):
        seen.append((img.data_ptr(), img.stride(), float(img.sum()), int(target[0]), sorted(views)))
        return Batch(img, target, index, views)

    look.nets = ['a teacher']

    def batches():
        for k in range(7):
            img = torch.full((2, 3, 4, 4), float(k)).to(memory_format=torch.channels_last)
            yield img, torch.tensor([k, 0]), torch.tensor([0, 1]), {'second': img}

    graphs = side_by_side.Graphs(torch.device('cpu'))
    handed_on = [id(batch.img) for batch in graphs.looks(look, batches())]
    del seen[3]  # the stand-in looks once more when it records
    places, strides, sums, targets, views = zip(*seen)
    assert len(set(places)) == 1 and len(set(handed_on)) == 1
    assert len(set(strides)) == 1 and strides[0] == next(batches())[0].stride()
    assert sums == tuple(96.0 * k for k in range(7)) and targets == tuple(range(7))
    assert set(map(tuple, views)) == {('second',)}
    look.nets = []  # nobody is asked: no graph, which CUDA would call empty; batches go there all the same
    graphs = side_by_side.Graphs(torch.device('cpu'))
    monkeypatch.setattr(side_by_side, 'cuda_capture', lambda *_: pytest.fail('recorded'))
    sums = [float(batch.img.sum()) for batch in graphs.looks(look, batches())]
    assert sums == [96.0 * k for k in range(7)]


# ---------------------------------------------------------------------- what a row must be like for all this


@pytest.fixture(scope='module')
def runs(img_root, tmp_path_factory):
    """A student of every row, and a function that takes a step with one of them."""
    folder = tmp_path_factory.mktemp('runs')
    device, amp = torch.device('cpu'), engine.device.autocast(torch.device('cpu'), 'off')
    train, _ = load('shapes:96', str(img_root), device)
    batches = list(train.train_batches(16, 0, 0, ('pair', 'second', 'strong')))
    torch.manual_seed(0)
    net_t, net_s = build('resnet14', 10).eval().requires_grad_(False), build('resnet8', 10)
    teachers = Teachers([net_t, net_t], amp, ['pair', 'second', 'strong'], batches[0][0])
    words = ['--kd_mode', *EVERY, '--t_name', 'resnet14', 'resnet14', '--t_model', '-', '-', '--s_name',
             'resnet8', '--batch_size', '16', '--epochs', '10', '--resume', 'never', '--kd_args',
             'crd.nce_n=20', 'quest.num_words=8']  # fmt: skip
    args = train_kd.parse_args(words)
    wanted = train_kd.read_methods(args)
    built = train_kd.build_runs(
        args, wanted, folder, {'commit': None}, net_s, teachers, train, 'test', device
    )
    prepare = {run.name: {term.method.own.once_per_batch for term in run.terms} - {None} for run in built}

    def step(run, k):
        img, target, index, more = (copy.copy(x) for x in batches[k])
        teachers.prepare = prepare[run.name]
        train_kd.train_student(run, teachers(img, target, index, more))

    for run in built:
        train_kd.begin_epoch(run, 5, args)
        engine.optimise.set_learning_rate(run.opt, 0.01)
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


@pytest.mark.parametrize('name', EVERY)
def test_nothing_of_a_step_outlives_it(runs, name):
    """A cycle would keep the step's graph until the collector runs, and its nodes remember their stream: on
    CUDA a recording on another stream then fails."""
    built, step = runs
    run, alive = built[name], []
    run.step.register_forward_hook(lambda m, args, out: alive.extend(weakref.ref(x) for x in out[1].values()))
    gc.disable()
    gc.freeze()  # what is there already is not looked through
    try:
        step(run, 0)
        assert alive and not [x for x in alive if x() is not None]
        assert not [x for x in gc.get_objects() if type(x) is Batch], 'the batch is kept'
    finally:
        gc.enable()
        gc.unfreeze()
        run.step._forward_hooks.clear()


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
    run.meter.reset(7)
    assert places(run) == before, 'another epoch finds the sums where they were'


@pytest.mark.parametrize('name', ROWS)
def test_a_step_reads_nothing_back(runs, name, monkeypatch):
    """The whole step, student and update included; the guard looks at once on the CPU only."""
    built, step = runs
    monkeypatch.setattr(engine.meter.Meter, 'guard', lambda *_: True)
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


# ---------------------------------------------------------------------------- the optimiser that CUDA needs


def fused(*groups):
    args = argparse.Namespace(lr=0.1, momentum=0.9, weight_decay=1e-4)
    return engine.optimise.fused_sgd(list(groups), args), engine.optimise.sgd(list(groups), args)


def gradients(nets, late: int):
    """Three steps; the second weight has its first gradient in step `late`."""
    for k in range(3):
        for net in nets:
            net[0].weight.grad = torch.full_like(net[0].weight, k + 0.5)
            net[1].weight.grad = torch.full_like(net[1].weight, k - 0.7) if k >= late else None
        yield k


@pytest.mark.parametrize('late', (0, 1, 2))
def test_the_fused_optimiser_takes_a_late_first_gradient(late):
    torch.manual_seed(0)
    a = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    b = copy.deepcopy(a)
    first, second = fused(*a.parameters())[0], fused(*b.parameters())[1]
    for k in gradients((a, b), late):
        for opt in (first, second):
            engine.optimise.set_learning_rate(opt, 0.1 / (k + 1))
            opt.step()
    for x, y in zip(a.parameters(), b.parameters()):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-7)


def test_a_skipped_first_step_leaves_no_momentum():
    a = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    before = copy.deepcopy(a.state_dict())
    opt = fused(*a.parameters())[0]
    opt.found_inf = torch.tensor(1.0)
    next(gradients((a,), 0))
    opt.step()
    assert all(torch.equal(before[key], value) for key, value in a.state_dict().items())
    assert all((state['momentum_buffer'] == 0).all() for state in opt.state.values())


def test_a_checkpoint_moves_between_kinds_of_optimisers():
    """What CUDA wrote, the CPU reads, and the other way round: rate and fusing are the reader's own."""
    nets = [torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)) for _ in range(2)]
    opts = [fused(*nets[0].parameters())[0], fused(*nets[1].parameters())[1]]
    for _ in gradients(nets, 0):
        for opt in opts:
            opt.step()
    states = [opt.state_dict() for opt in opts]
    assert isinstance(states[0]['param_groups'][0]['lr'], float)
    for opt, state in ((opts[0], states[1]), (opts[1], states[0]), (opts[0], states[0])):
        opt.load_state_dict(copy.deepcopy(state))
        for _ in gradients(nets, 0):
            opt.step()
    assert opts[0].param_groups[0]['fused'] and isinstance(opts[0].param_groups[0]['lr'], torch.Tensor)
    assert not opts[1].param_groups[0]['fused'] and opts[1].param_groups[0]['lr'] == pytest.approx(0.1)
    engine.optimise.set_learning_rate(opts[0], 0.25)
    assert float(opts[0].param_groups[0]['lr']) == 0.25


def test_adamw_of_either_kind_reads_what_the_other_wrote(monkeypatch):
    """And the fused one, CUDA's, skips an update."""
    args = argparse.Namespace(lr=0.1, weight_decay=0.05, optim='adamw')
    nets = [torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    opts = []
    for net, kind in zip(nets, (True, False)):
        monkeypatch.setattr(engine.optimise, 'on_cuda', lambda _, kind=kind: kind)
        opts.append(engine.optimise.optimiser(net.parameters(), args))

    def alike():
        for x, y in zip(nets[0].parameters(), nets[1].parameters()):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)

    def learn():
        for _ in gradients(nets, 1):
            for opt in opts:
                opt.step()

    learn()
    alike()
    states = [copy.deepcopy(opt.state_dict()) for opt in opts]
    for opt, state in zip(opts, states[::-1]):
        opt.load_state_dict(state)
    learn()
    alike()
    assert [opt.param_groups[0]['fused'] for opt in opts] == [True, False]
    opts[0].found_inf = torch.tensor(1.0)
    before = copy.deepcopy(nets[0].state_dict())
    next(gradients(nets, 0))
    opts[0].step()
    assert all(torch.equal(before[key], value) for key, value in nets[0].state_dict().items())


def test_checkpoints_hold_cpu_copies(tmp_path):
    class Elsewhere(torch.Tensor):
        def cpu(self):
            return torch.zeros(2)

    far = torch.ones(2).as_subclass(Elsewhere)
    state = torch.nn.Linear(1, 1).state_dict()
    content = {'net': state, 'opt': [{'a': far}, (far, 1)], 'epoch': 3}
    engine.record.save_checkpoint(tmp_path / 'x.pt', content)
    back = torch.load(tmp_path / 'x.pt', weights_only=True)
    assert back['opt'][0]['a'].tolist() == [0, 0] and back['opt'][1][1] == 1 and back['epoch'] == 3
    assert content['opt'][0]['a'] is far, 'what is in training stays where it is'
    assert engine.record.on_cpu(state)._metadata == state._metadata


# --------------------------------------------------------------------------------------------- fewer kernels


def test_weights_cast_together_give_the_same_step():
    torch.manual_seed(0)
    one, two = build('resnet8', 10), None
    two = copy.deepcopy(one)
    img = torch.randn(8, 3, 32, 32)
    amp = engine.device.autocast(torch.device('cpu'), 'bf16')
    for net, cast in ((one, None), (two, torch.bfloat16)):
        student = train_kd.Student(net, [], amp, cast=cast)
        f = student.look_at(img)
        (f.out.logsumexp(1).sum() + f.fms[1].square().mean()).backward()
    for x, y in zip(one.parameters(), two.parameters()):
        assert torch.equal(x.grad, y.grad)
    two.zero_grad()
    f = train_kd.Student(two, [], amp, cast=torch.bfloat16).look_at(img)
    f.fms[1].square().mean().backward()
    assert two.fc.weight.grad is None, 'what was not used has no gradient, and no weight decay'


def test_counters_on_the_host_count_replays():
    net = build('resnet8', 10)
    counters = side_by_side.host_counters(net)
    assert len(counters) == 9 and all(
        net.get_buffer(key).data_ptr() in {c.data_ptr() for c in counters}
        for key in net.state_dict()
        if key.endswith('num_batches_tracked')
    )


# ------------------------------------------------------------------------------------- checks and provenance


def test_the_gpu_checks_rehearse(monkeypatch, capsys, tmp_path):
    out = tmp_path / 'cuda.json'
    words = ['cuda', 'agree', 'record', 'draws', 'waiting', '--device', 'cpu', '--out', str(out), '--rows']
    names = ['st', 'crd', 'kdsvd', 'ab', 'ft', 'mhgd', 'sobolev']
    monkeypatch.setattr(side_by_side, 'cuda_capture', side_by_side.cuda_capture)
    monkeypatch.setattr(sys, 'argv', [*words, *names])
    assert cuda.main() == 0
    rows = json.loads(out.read_text())['rows']
    said = [(r['goal'], r['what'], r['phase']) for r in rows]
    assert all(r['met'] for r in rows)
    phases = [('st', 'train'), ('crd', 'train'), ('kdsvd', 'train'), ('ab', 'init'), ('ab', 'train'),
              ('ft', 'pretrain'), ('ft', 'train'), ('mhgd', 'pretrain'), ('mhgd', 'train'),
              ('sobolev', 'train')]  # fmt: skip
    recorded = [p for p in phases if p[0] not in ('kdsvd', 'mhgd')]
    assert said == [*(('agree', *p) for p in phases), *(('record', *p) for p in recorded),
                    ('draws', 'crd', ''), *(('waiting', name, '') for name in names)]  # fmt: skip
    assert [r['draws'] for r in rows[:3]] == [False, True, False] and rows[0]['gradient'] == 0


def test_a_gpu_that_differs_is_noticed(monkeypatch, capsys, tmp_path):
    gradient, real_step = cuda.student_gradient, train_kd.train_student

    def another(name, phase, n, device, exact=False):  # the device adds up differently
        loss, gradients, drawn = gradient(name, phase, n, torch.device('cpu'), exact)
        away = 0.01 if device.type == 'meta' else 0
        return loss, {key: g + away * g.abs().max() for key, g in gradients.items()}, drawn

    monkeypatch.setattr(cuda, 'student_gradient', another)
    assert not cuda.agreement('st', 'train', torch.device('meta'))['met']
    assert cuda.agreement('crd', 'train', torch.device('meta'))['met'], 'it draws'

    steps = []

    def drifts(run, seen):  # one replayed step differs in one weight
        real_step(run, seen)
        steps.append(run.usual_only)
        if len(steps) == 13:
            with torch.no_grad():
                run.net.fc.bias[0] += 1e-6

    monkeypatch.setattr(side_by_side, 'cuda_capture', cuda.stand_in)
    monkeypatch.setattr(train_kd, 'train_student', drifts)
    assert cuda.repetition('st', 'train', torch.device('cpu'))['differ'] > 0
    monkeypatch.setattr(cuda, 'negatives', lambda device: 1 / 0)
    out = tmp_path / 'x.json'
    monkeypatch.setattr(
        sys, 'argv', ['cuda', 'draws', 'waiting', '--device', 'cpu', '--rows', 'st', '--out', str(out)]
    )
    assert cuda.main() == 1, 'a row that raises'
    assert [r['met'] for r in json.loads(out.read_text())['rows']] == [False, True]
    assert 'ZeroDivisionError' in capsys.readouterr().out

    monkeypatch.setattr(sys, 'argv', ['cuda', 'G9', '--device', 'cpu'])
    assert cuda.main() == 2
    assert 'no goal or method is called G9' in capsys.readouterr().err
    if not torch.cuda.is_available():
        monkeypatch.setattr(sys, 'argv', ['cuda'])
        assert cuda.main() == 2
        assert 'no CUDA device here' in capsys.readouterr().err


def test_without_git_and_without_history(tmp_path):
    """A copy on a machine without git: no commit, or the one that SOURCE_COMMIT names."""
    program = 'import torch, engine.record; print(engine.record.provenance(torch.device("cpu"))["commit"])'
    for more, said in (({}, 'None'), ({'SOURCE_COMMIT': 'abc'}, 'abc')):
        env = {**os.environ, 'PATH': str(tmp_path), **more}
        done = subprocess.run(
            [sys.executable, '-c', program], cwd=ROOT, env=env, capture_output=True, text=True
        )
        assert done.stdout.strip() == said, done.stderr


def test_lean_checkpoints(script, teacher, tmp_path, monkeypatch):
    """--save_every 3 of 5: a kill after the fourth epoch goes on from the third, and all ends as it would."""
    words = ('--kd_mode', 'st', 'vid', '--t_name', 'resnet8', '--t_model', teacher, '--s_name', 'resnet8',
             '--data_name', 'shapes:96', '--batch_size', 32, '--epochs', 5)  # fmt: skip
    assert script('train_kd', *words, '--note', 'whole').code == 0
    real = engine.record.Record.epoch_done

    def dies(record, row, save=True):
        real(record, row, save)
        if record.epoch == 4 and record.folder.name == 'vid':
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(engine.record.Record, 'epoch_done', dies)
        script('train_kd', *words, '--note', 'lean', '--save_every', 3)
    done = script('train_kd', *words, '--note', 'lean', '--save_every', 3, '--resume', 'auto')
    assert done.code == 0 and '3 of 5 epochs done' in done.out
    for name in ('st', 'vid'):
        same_files(tmp_path / 'whole' / name, tmp_path / 'lean' / name)
        best = [torch.load(tmp_path / note / name / 'best.pt') for note in ('whole', 'lean')]
        assert best[0]['epoch'] == best[1]['epoch']
        assert all(torch.equal(best[0]['net'][k], best[1]['net'][k]) for k in best[0]['net'])


# ---------------------------------------------------------------------------------- threads and deterministic


def test_the_cores_are_those_that_the_process_may_use(monkeypatch):
    monkeypatch.delenv('OMP_NUM_THREADS', raising=False)
    monkeypatch.setattr(os, 'sched_getaffinity', lambda _: set(range(6)))

    def quota(**files):
        class File:
            def __init__(self, root, file):
                assert root == '/sys/fs/cgroup'
                self.name = file.rpartition('/')[2].replace('.', '_')

            def read_text(self):
                if self.name not in files:
                    raise FileNotFoundError
                return files[self.name] + '\n'

        monkeypatch.setattr(engine.device, 'Path', File)
        return engine.device.cores()

    said = ('max 100000', '250000 100000', '50000 100000')
    assert [quota(), *(quota(cpu_max=text) for text in said)] == [6, 6, 3, 1]
    older = [quota(cpu_cfs_quota_us=text, cpu_cfs_period_us='100000') for text in ('-1', '250000')]
    assert older == [6, 3], 'cgroup v1'
    monkeypatch.setenv('OMP_NUM_THREADS', '4')
    assert engine.device.cores() == 4, 'what the user chose'


def test_threads_that_wait_sleep_unless_told_otherwise():
    program = (
        'import os, engine.threads; print(os.environ["OMP_WAIT_POLICY"], os.environ.get("GOMP_SPINCOUNT"))'
    )
    plain = {k: v for k, v in os.environ.items() if k not in ('OMP_WAIT_POLICY', 'GOMP_SPINCOUNT')}
    for more, said in (({}, 'passive 1000'), ({'OMP_WAIT_POLICY': 'active'}, 'active None')):
        words = [sys.executable, '-c', program]
        done = subprocess.run(words, cwd=ROOT, env={**plain, **more}, capture_output=True, text=True)
        assert done.stdout.strip() == said, done.stderr
    for path in [*ROOT.glob('train_*.py'), *(ROOT / 'tools').glob('[!_]*.py')]:
        lines = path.read_text().splitlines()
        first = next(i for i, line in enumerate(lines) if line.startswith('import engine.threads'))
        # what takes torch along, and NumPy and SciPy, which may bring an OpenMP of their own
        loads = 'torch engine models dataset methods report transferability numpy scipy'.split()
        loads += ['kd_losses', 'ka_losses', 'dfkd_losses', 'ka_settings', 'tools']
        ours = tuple(f'{word} {name}' for word in ('import', 'from') for name in loads)
        others = [i for i, line in enumerate(lines) if line.startswith(ours) and i != first]
        assert first < min(others), f'{path.name}: OpenMP reads its settings with torch'


def test_deterministic_settings(monkeypatch):
    """The choice of convolutions by timing is off, and no kernel fills empty tensors."""
    fill, benchmark = torch.utils.deterministic.fill_uninitialized_memory, torch.backends.cudnn.benchmark
    monkeypatch.setenv('CUBLAS_WORKSPACE_CONFIG', '')
    try:
        args = argparse.Namespace(threads=1, device='cpu', deterministic=True, seed=0)
        engine.device.setup(args)
        assert torch.are_deterministic_algorithms_enabled() and not torch.backends.cudnn.benchmark
        assert not torch.utils.deterministic.fill_uninitialized_memory
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = fill
        torch.backends.cudnn.benchmark = benchmark


@pytest.mark.parametrize('name', ['st', *(name for name in EVERY if METHODS[name].own.student)])
def test_casting_all_weights_at_once_changes_nothing(name):
    """--cuda_graphs casts them in one kernel; layers of a loss, which autocast leaves alone, stay exact."""
    ends = []
    for cast in (None, torch.bfloat16):
        train = cuda.data(32)
        (run,), teachers, args = cuda.students_of([name], 'resnet14', train, 'bf16', 16)
        run.step.cast = cast
        train_kd.begin_epoch(run, 0, args)
        for batch in train.train_batches(16, 0, 0, teachers.views):
            train_kd.train_student(run, teachers(*batch))
        assert not run.meter.failure
        ends.append(run.step.state_dict())
    assert all(torch.equal(ends[0][key], value) for key, value in ends[1].items())


def test_what_dlb_remembers_is_not_overwritten_by_the_next_batch():
    """Every whole batch lies in the same place under --cuda_graphs."""
    from kd_losses.dlb import DLB

    batches = [
        (torch.full((2, 3, 4, 4), float(k)), torch.tensor([k, k]), torch.arange(2), {}) for k in (1, 2)
    ]
    loss, seen = DLB(), []

    def look(img, target, index, views):
        return Batch(img, target, index, views)

    for batch in side_by_side.Graphs(torch.device('cpu')).looks(look, batches):
        if loss.last:
            seen += [float(loss.last[0].mean()), int(loss.last[1][0])]
        loss.remember(batch.img, batch.target, torch.zeros(2, 5))
    assert seen == [1.0, 1]
