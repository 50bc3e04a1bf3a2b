"""Nothing that goes wrong costs a checkpoint or lets a bad number through."""

import json
import os
import resource
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import engine.errors
import engine.meter
import engine.optimise
import engine.record
from dataset import text as texts
from engine.errors import NonFinite
from engine.ka_tools import sound
from kd_losses.dot import DOT
from tests.conftest import ROOT, TINY
from tests.test_train import weights


def test_a_kill_during_the_write_leaves_the_old_file(tmp_path):
    """os._exit in the middle of the second save, in another process: no handler, no cleanup."""
    program = """
import os, sys, torch, engine.record
from pathlib import Path
path = Path(sys.argv[1])
engine.record.save_checkpoint(path, {'epoch': 1, 'net': torch.zeros(1000)})
os.fsync = lambda fd: os._exit(9)
engine.record.save_checkpoint(path, {'epoch': 2, 'net': torch.ones(1000)})
"""
    path = tmp_path / 'last.pt'
    done = subprocess.run(
        [sys.executable, '-c', program, str(path)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 9, done.stderr
    assert torch.load(path, weights_only=True)['epoch'] == 1
    assert len(list(tmp_path.iterdir())) == 2, 'the half-written file lies beside it'
    engine.record.Record(tmp_path, {}, {}, {}, 'test')
    assert [p.name for p in tmp_path.iterdir()] == ['last.pt'], 'and the next start removes it'


def test_disk_full(tmp_path, img_root, teacher):
    """A limit on file sizes stands for a full disk: exit code 2, one line, the old checkpoint survives."""
    command = [
        sys.executable,
        str(ROOT / 'train_base.py'),
        '--net_name',
        'resnet8',
        '--note',
        'full',
        '--save_root',
        str(tmp_path),
        '--img_root',
        str(img_root),
        '--threads',
        '1',
        *TINY,
        '--epochs',
        '40',
        '--resume',
        'auto',
    ]
    env = {**os.environ, 'OMP_NUM_THREADS': '1'}
    stopper = (
        'import sys, train_base, engine.record; real = engine.record.Record.epoch_done\n'
        'def two(r, row, save):\n    real(r, row)\n'
        '    if r.epoch == 2: raise engine.errors.UserError("enough")\n'
        'engine.record.Record.epoch_done = two; engine.errors.run(train_base.main)'
    )
    first = subprocess.run(
        [sys.executable, '-c', stopper, *command[2:]], cwd=ROOT, capture_output=True, text=True, env=env
    )
    assert 'enough' in first.stderr, first.stderr
    last = tmp_path / 'full' / 'last.pt'
    before = last.read_bytes()
    assert torch.load(last, weights_only=True)['epoch'] == 2

    def small_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, 400_000))

    second = subprocess.run(command, capture_output=True, text=True, env=env, preexec_fn=small_files)
    assert second.returncode == 2, second.stderr
    assert (
        second.stderr.count('\n') == 1 and 'cannot be written' in second.stderr and 'intact' in second.stderr
    )
    assert last.read_bytes() == before
    assert not list((tmp_path / 'full').glob('.*.tmp'))


def spoiled(path, tmp_path, value):
    state = torch.load(path, weights_only=True)
    state['fc.bias'][3] = value
    torch.save(state, tmp_path / 'spoiled.pt')
    return tmp_path / 'spoiled.pt'


@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_a_non_finite_teacher_is_refused(script, teacher, tmp_path, value):
    done = script(
        'train_kd',
        '--kd_mode',
        'st',
        '--t_name',
        'resnet8',
        '--t_model',
        spoiled(teacher, tmp_path, value),
        '--s_name',
        'resnet8',
        '--note',
        'x',
        *TINY,
    )
    assert done.code == 2 and 'teacher is not finite' in done.err and done.err.count('\n') == 1
    assert not (tmp_path / 'x' / 'st').exists()


def test_a_diverging_run_stops_before_the_update(script, tmp_path):
    done = script('train_base', '--net_name', 'resnet8', '--note', 'd', *TINY, '--lr', '1e30')
    assert done.code == 1 and done.err.count('\n') == 1
    assert 'resnet8: the loss is not finite at epoch 1, step ' in done.err
    assert not (tmp_path / 'd' / 'last.pt').exists() and not (tmp_path / 'd' / 'results.json').exists()


def test_divergence_after_a_checkpoint_leaves_it_finite(script, tmp_path, monkeypatch):
    rate = engine.optimise.learning_rate
    huge = lambda args, epoch: 1e30 if epoch >= 1 else rate(args, epoch)  # noqa: E731
    monkeypatch.setattr(engine.optimise, 'learning_rate', huge)
    done = script('train_base', '--net_name', 'resnet8', '--note', 'd', *TINY)
    assert done.code == 1 and 'at epoch 2, step ' in done.err
    state = weights(tmp_path / 'd')
    assert state['epoch'] == 1 and all(torch.isfinite(v).all() for v in state['net'].values())


def test_a_bad_gradient_of_a_good_loss_never_reaches_the_disk(train_kd, tmp_path, monkeypatch):
    """One step per epoch: the loss of that step is finite, the weights after it are not."""
    from methods import KD, Method
    from methods.shared import embeddings

    class Steep(torch.nn.Module):
        def forward(self, feat_s, feat_t):
            return (0 * feat_s).sum().sqrt()  # 0, with slope 0 * inf

    monkeypatch.setitem(KD, 'steep', Method(Steep, 1.0, embeddings))
    one_step = ('--data_name', 'shapes:32', '--batch_size', '32', '--epochs', '2')
    done = train_kd('steep', '--note', 's', *one_step)
    assert done.code == 1 and 'steep: a weight is not finite after epoch 1, step 1' in done.err
    assert not (tmp_path / 's' / 'steep' / 'last.pt').exists()


def test_one_bad_student_does_not_stop_the_others(train_kd, tmp_path):
    """The bad one is named with its step; the good ones equal themselves trained without it."""
    done = train_kd('st', 'at', 'sp', '--note', 'g', '--lambda_kd', 'at=1e39')
    assert done.code == 1 and 'at: the loss is not finite at epoch 1, step 1 (inf)' in done.err
    assert not (tmp_path / 'g' / 'at' / 'last.pt').exists()
    assert train_kd('st', 'sp', '--note', 'h').code == 0
    for token in ('st', 'sp'):
        assert json.loads((tmp_path / 'g' / token / 'results.json').read_text())['epochs'] == 2
        a, b = weights(tmp_path / 'g' / token)['net'], weights(tmp_path / 'h' / token)['net']
        assert all(torch.equal(a[k], b[k]) for k in a)


def test_a_teacher_that_turns_non_finite_is_named(train_kd, monkeypatch, tmp_path):
    """It passed the test set, but on some training batch it gives NaN."""
    from engine.teachers import Teachers

    real = Teachers.teachers_on

    def spoil(teachers, img):
        (t,) = real(teachers, img)
        if len(img) > 2:  # not where the losses are built
            t._f = t._f._replace(out=t._f.out * float('nan'))
        return [t]

    monkeypatch.setattr(Teachers, 'teachers_on', spoil)
    done = train_kd('st', '--note', 'n')
    assert done.code == 1 and 'the teacher gives non-finite logits' in done.err


def test_the_guard_looks_at_what_teachers_say():
    """A loss may not look at all of it. A class that a teacher masks with -inf is legal."""
    meter, loss = engine.meter.Meter('x', 0, torch.device('cpu')), torch.ones(())
    fine, masked = torch.zeros(2, 3), torch.tensor([[0.0, -torch.inf]])
    assert meter.guard(loss, None, fine, masked) and not meter.failure
    for bad in (torch.nan, torch.inf):
        assert not meter.guard(loss, None, fine, torch.tensor([[0.0, bad]]))
        assert 'the teacher gives non-finite logits' in meter.failure
    assert not meter.guard(loss * torch.nan, None, masked) and '(nan)' in meter.failure
    for said, message in (((loss, fine, masked), ''), ((loss, fine * torch.nan), 'teacher gives'),
                          ((loss * torch.inf, masked), 'inf')):  # fmt: skip
        try:
            sound(*said)
            assert not message
        except NonFinite as error:
            assert message and message in str(error)


def test_the_device_side_guard(monkeypatch):
    """The CUDA form, tried on the CPU: the fused optimiser skips the update, the step is reported later."""
    device = torch.device('cpu')
    weight = torch.nn.Parameter(torch.ones(3))
    opt = torch.optim.SGD([weight], lr=0.1, momentum=0.9, fused=True)
    meter = engine.meter.Meter('x', 4, device)
    out, target = torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)

    class OnDevice:  # a loss that says it is not on the CPU
        def __init__(self, value):
            self.value, self.device = value, torch.device('cuda')

        def detach(self):
            return self.value

    for step, factor in enumerate([1.0, float('nan'), 1.0, float('inf')]):
        loss = (weight * factor).sum()
        before = weight.detach().clone()
        assert meter.guard(OnDevice(loss.detach()), opt)
        opt.zero_grad()
        loss.backward()
        opt.step()
        meter.add(out, target, ce=torch.zeros(()))
        assert torch.equal(weight, before) == (step in (1, 3))
        assert torch.isfinite(weight).all()
    assert meter.read() == {} and 'epoch 5, step 2' in meter.failure
    # of several processes one alone reads for its progress bar: it must not stop a student there
    meter.failure = ''
    monkeypatch.setattr(engine.meter, 'processes', lambda: 2)
    assert meter.read() and not meter.failure


def test_an_optimiser_that_cannot_be_told_is_not_let_go():
    """Also on the device: DOT, and those of a second update, have no kernel that skips."""
    weight = torch.nn.Parameter(torch.ones(3))
    meter = engine.meter.Meter('x', 4, torch.device('cpu'))
    value, cuda = torch.tensor(torch.nan), torch.device('cuda')
    loss = SimpleNamespace(device=cuda, detach=lambda: value, item=value.item)
    for opt in (DOT([weight], 0.1), torch.optim.Adam([weight])):
        meter.reset(4)
        assert not meter.guard(loss, opt) and 'epoch 5, step 1 (nan)' in meter.failure


HALF = ('--data_name', 'shapes:96', '--batch_size', 32, '--epochs', 1)
GUARDED = {
    'train_base': (*HALF, '--net_name', 'resnet8', '--optim', 'adamw'),
    'train_kd': (*HALF, '--kd_mode', 'st', '--t_name', 'resnet8', '--s_name', 'resnet8', '--t_model', '{t}'),
    'train_dml': (*HALF, '--kd_mode', 'dml', '--net_names', 'resnet8', 'resnet8'),
    'train_ka': (*HALF, '--ka_mode', 'concat', '--t_name', 'resnet8', '--t_model', '{0}', '{1}'),
    'train_dfkd': ('--data_name', 'shapes:96', '--kd_mode', 'dafl', '--t_name', 'resnet8', '--t_model', '{t}',
                   '--s_name', 'resnet8', '--dry_run', '--width', 4),
    'train_dense': ('--data_name', 'scenes:24', '--size', 32, '--labelled', 6, '--batch_size', 4, '--kd_mode',
                    'alone', '--steps', 2),
    'train_dense ': ('--data_name', 'scenes:24', '--size', 32, '--labelled', 6, '--batch_size', 4,
                     '--kd_mode', 'alone', '--steps', 2, '--optim', 'sgd'),
    'train_lm': ('--data_name', 'markov', '--kd_mode', 'ce', '--steps', 2, '--init_steps', 0),
    'tools.graphs': ('--train', 3, '--test', 2, '--nodes', 30, '--batch_size', 2, '--t_width', 4, '--epochs',
                     1, '--kd_mode', 'teacher'),
    'tools.sequences': ('--train', 48, '--test', 12, '--t_width', 16, '--batch_size', 16, '--epochs', 1,
                        '--kd_mode', 'audio'),
}  # fmt: skip


@pytest.mark.parametrize('name', GUARDED)
def test_whoever_asks_the_guard_can_skip_on_the_device(script, tmp_path, monkeypatch, name):
    """As on CUDA, where `guard` tells the optimiser: one without a fused kernel refuses to be told."""
    monkeypatch.setattr(texts, 'SIZE', 20_000)
    parts = {f'{{{part}}}': ('--num_parts', 2, '--part', part) for part in (0, 1)}
    files = {word: tmp_path / word.strip('{}') / 'net.pt' for word in ('{t}', *parts)}
    for word in set(GUARDED[name]) & set(files):
        note = ('--note', word.strip('{}'))
        done = script('train_base', *HALF, '--net_name', 'resnet8', *note, *parts.get(word, ()))
        assert done.code == 0, done.err
    words = [files.get(word, word) for word in GUARDED[name]]
    told, real = [], engine.meter.Meter.guard

    def guard(meter, loss, opt, *teachers):
        opt.found_inf = torch.zeros(())
        told.append(opt)
        return real(meter, loss, opt, *teachers)

    monkeypatch.setattr(engine.optimise, 'on_cuda', lambda parameters: True)
    monkeypatch.setattr(engine.meter.Meter, 'guard', guard)
    place = () if name.startswith('train') else ('--save_root', tmp_path, '--threads', 1)
    done = script(name.strip(), *words, *place, '--note', 'told')
    assert done.code == 0, done.err
    assert told and all(group['fused'] for opt in told for group in opt.param_groups)


def test_a_checkpoint_changes_no_kernel(monkeypatch):
    """Adam's state of a device without the fused kernel goes on with it, and the other way round."""
    for fused in (True, False):
        opts = []
        for now in (not fused, fused):
            monkeypatch.setattr(engine.optimise, 'on_cuda', lambda parameters, now=now: now)
            weight = torch.nn.Parameter(torch.ones(3))
            opts.append((weight, engine.optimise.adam([weight], 0.1)))
        (weight, opt), (other, again) = opts
        weight.grad = torch.ones(3)
        opt.step()
        again.load_state_dict(opt.state_dict())
        other.grad = torch.ones(3)
        if fused:
            again.found_inf = torch.zeros(())
        again.step()
        assert again.param_groups[0]['fused'] is fused and other.max() < 1
