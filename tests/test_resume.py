"""A run that was interrupted and resumed equals the undisturbed one bit for bit (CPU)."""

import json
import os
import shutil
import signal
import time

import pytest
import torch

import engine.optimise
import engine.record
import engine.session
import models
from engine.errors import UserError
from engine.recipe import forget, resume_point
from engine.record import Record
from tests import fresh
from tests.conftest import TINY, Killed
from tests.test_train import rows, same, weights

FOUR = ('--data_name', 'shapes:96', '--batch_size', '32', '--epochs', '4')
# one of each kind: plain, adapters with batch norm, learned variances, a ramp, a sum
GROUP = ('st', 'ofd', 'vid', 'dkd', 'pkt+st')


def check_equal(a, b):
    """All state and all results of two run folders."""
    x, y = weights(a), weights(b)
    for part in ('net', 'kd', 'opt', 'scaler'):
        if part in x:
            assert same(x[part], y[part]), f'{part} differs'
    momentum = [
        torch.equal(p['momentum_buffer'], q['momentum_buffer'])
        for p, q in zip(x['opt']['state'].values(), y['opt']['state'].values())
    ]
    assert momentum and all(momentum)
    assert rows(a) == rows(b)
    first, second = (json.loads((folder / 'results.json').read_text()) for folder in (a, b))
    assert all(first[key] == second[key] for key in ('last', 'best', 'curve', 'recipe'))
    best = [torch.load(folder / 'best.pt', weights_only=True)['net'] for folder in (a, b)]
    assert same(*best)


def test_killed_at_any_write(train_kd, tmp_path, monkeypatch):
    """Killed in an epoch just before a file of one student is replaced: others are then an epoch ahead."""
    assert train_kd(*GROUP, '--note', 'whole', *FOUR).code == 0
    real, rate = engine.record.write_atomic, engine.optimise.learning_rate
    # the file, the epoch and the victim's place among the students matter on their own: every value of each
    moments = (('best.pt', 1, 'st'), ('metrics.csv', 2, 'vid'), ('last.pt', 3, 'st'),
               ('best.pt', 4, 'pkt+st'), ('last.pt', 4, 'pkt+st'))  # fmt: skip
    for file, epoch, victim in moments:
        note, epochs_begun = f'cut{file}{epoch}{victim}', []

        def dies(path, content, file=file, folder=tmp_path / note / victim, epoch=epoch, begun=epochs_begun):
            # best.pt is only written in a best epoch: else die at metrics.csv, the next file to be written
            due = path.name in (file, 'metrics.csv') if file == 'best.pt' else path.name == file
            if due and path.parent == folder and begun[-1] == epoch:
                raise Killed
            real(path, content)

        def rated(args, e, begun=epochs_begun):
            begun.append(int(e) + 1)
            return rate(args, e)

        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(engine.optimise, 'learning_rate', rated)
            patch.setattr(engine.record, 'write_atomic', dies)
            train_kd(*GROUP, '--note', note, *FOUR)
        assert sorted(set(epochs_begun)) == list(range(1, epoch + 1))
        again = train_kd(*GROUP, '--note', note, *FOUR, '--resume', 'auto')
        assert again.code == 0, again.err
        assert f'{epoch - 1} of 4 epochs done' in again.out, 'at most the epoch that was running is lost'
        for token in GROUP:
            check_equal(tmp_path / 'whole' / token, tmp_path / note / token)


def test_base_killed_and_resumed(script, tmp_path, monkeypatch):
    net = ('--net_name', 'resnet8', *FOUR)
    assert script('train_base', *net, '--note', 'whole').code == 0
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_after(2, patch)
        script('train_base', *net, '--note', 'cut')
    done = script('train_base', *net, '--note', 'cut', '--resume', 'auto')
    assert done.code == 0 and '2 of 4 epochs done' in done.out
    check_equal(tmp_path / 'whole', tmp_path / 'cut')


def test_adamw_resumes(script, tmp_path, monkeypatch):
    """Transformers learn with it; its rate where none is said is its own."""
    words = ('--net_name', 'deit_64_3', *TINY, '--optim', 'adamw')
    assert script('train_base', *words, '--note', 'whole').code == 0
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_after(1, patch)
        script('train_base', *words, '--note', 'cut')
    assert script('train_base', *words, '--note', 'cut', '--resume', 'auto').code == 0
    one, two = (weights(tmp_path / note) for note in ('whole', 'cut'))
    assert same(one['net'], two['net']) and rows(tmp_path / 'whole') == rows(tmp_path / 'cut')
    assert one['args']['optim'] == 'adamw' and one['args']['lr'] == 1e-3
    assert len(one['opt']['state']) == len(two['opt']['state']) > 9
    for a, b in zip(one['opt']['state'].values(), two['opt']['state'].values()):
        assert a.keys() == {'step', 'exp_avg', 'exp_avg_sq'} and same(a, b)


def killed_after(epochs: int, monkeypatch):
    """In this context a run dies once its record holds so many epochs."""
    real = engine.record.Record.epoch_done

    def dies(record, row, save=True):
        real(record, row, save)
        if record.epoch == epochs:
            raise Killed

    monkeypatch.setattr(engine.record.Record, 'epoch_done', dies)


def test_resume_from_a_path_and_with_other_company(train_kd, tmp_path, monkeypatch):
    """A student of a group may go on alone, elsewhere, from its file, its folder, or the group's folder."""
    assert train_kd('vid', 'st', '--note', 'whole', *FOUR).code == 0
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_after(2, patch)
        train_kd('vid', 'st', '--note', 'cut', *FOUR)
    places = (tmp_path / 'cut' / 'vid' / 'last.pt', tmp_path / 'cut' / 'vid', tmp_path / 'cut')
    for i, place in enumerate(places):
        done = train_kd('vid', '--note', f'moved{i}', *FOUR, '--resume', place)
        assert done.code == 0 and '2 of 4 epochs done' in done.out, done.err
        check_equal(tmp_path / 'whole' / 'vid', tmp_path / f'moved{i}' / 'vid')
    # a group in which a run has not begun: it begins, but not over one that is there
    shutil.move(tmp_path / 'cut' / 'st', tmp_path / 'group' / 'st')
    before = (tmp_path / 'moved0' / 'vid' / 'last.pt').read_bytes()
    done = train_kd('vid', '--note', 'moved0', *FOUR, '--resume', tmp_path / 'group')
    assert done.code == 2 and 'no checkpoint there' in done.err, done.err
    assert (tmp_path / 'moved0' / 'vid' / 'last.pt').read_bytes() == before
    done = train_kd('vid', '--note', 'moved0', *FOUR, '--resume', tmp_path / 'whole')
    assert done.code == 2 and 'already holds another run' in done.err, done.err
    assert (tmp_path / 'moved0' / 'vid' / 'last.pt').read_bytes() == before
    done = train_kd('vid', 'st', '--note', 'both', *FOUR, '--resume', tmp_path / 'group')
    assert done.code == 0 and 'there is no run vid, it begins' in done.out, done.err
    check_equal(tmp_path / 'whole' / 'vid', tmp_path / 'both' / 'vid')
    check_equal(tmp_path / 'whole' / 'st', tmp_path / 'both' / 'st')


def test_what_never_removes(tmp_path):
    """All that a run writes of its training: one that stops must not have another's weights."""
    gone = {'last.pt', 'best.pt', 'results.json', 'metrics.csv', 'net.pt', 'net1.pt', 'net12.pt',
            'student.pt', 'peers.pt', 'ka.pt', 'epoch8.pt'}  # fmt: skip
    kept = {'initial.pt', 'mine.pt', 'network.pt', 'log.txt'}
    for name in gone | kept:
        (tmp_path / name).write_text('x')
    assert resume_point('never', tmp_path) is None
    assert {path.name for path in tmp_path.iterdir()} == gone | kept, 'not before all is known to fit'
    for choice in (None, 'auto'):
        forget(choice, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == gone | kept
    forget('never', tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == kept


def test_memory_and_random_draws_survive(train_kd, tmp_path, monkeypatch):
    """CRD's bank and constants come back, and each run draws the numbers it would have drawn."""
    words = ('crd', 'mgd', *FOUR, '--kd_args', 'crd.nce_n=16')
    assert train_kd(*words, '--note', 'whole').code == 0
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_after(2, patch)
        train_kd(*words, '--note', 'cut')
    assert train_kd(*words, '--note', 'cut', '--resume', 'auto').code == 0
    for token in ('crd', 'mgd'):
        check_equal(tmp_path / 'whole' / token, tmp_path / 'cut' / token)
    assert train_kd('mgd', *FOUR, '--note', 'alone').code == 0
    check_equal(tmp_path / 'whole' / 'mgd', tmp_path / 'alone' / 'mgd')


def test_a_finished_run_is_left_alone(train_kd, tmp_path):
    assert train_kd('st', '--note', 'x', *FOUR).code == 0
    before = (tmp_path / 'x' / 'st' / 'last.pt').read_bytes()
    again = train_kd('st', 'at', '--note', 'x', *FOUR, '--resume', 'auto')
    assert again.code == 0 and (tmp_path / 'x' / 'st' / 'last.pt').read_bytes() == before
    assert 'epoch 1/4  at' in again.out and 'epoch 1/4  st' not in again.out


def test_origin_is_kept(script, tmp_path, monkeypatch):
    """results.json names the commit of the first start, and those of resumes beside it."""
    net = ('--net_name', 'resnet8', '--note', 'o', *FOUR, '--resume', 'auto')
    for number in range(4):
        commit = 'abc'[min(number, 2)] * 40
        origin = {'command': f'call {number}', 'commit': commit, 'machine': {}}
        monkeypatch.setattr('train_base.provenance', lambda device, origin=origin: dict(origin))
        at_once = lambda stop, unit='': setattr(stop, 'signal', 15)  # noqa: E731
        monkeypatch.setattr(engine.session.StopAfterEpoch, '__init__', at_once)
        assert script('train_base', *net).code == (128 + 15 if number < 3 else 0)
    result = json.loads((tmp_path / 'o' / 'results.json').read_text())
    assert result['command'] == 'call 0' and result['commit'] == 'a' * 40
    assert result['resumed_with'] == ['b' * 40, 'c' * 40]


@pytest.fixture(scope='module')
def st(train, trained, tmp_path_factory):
    """Where the finished run m/st lies; for tests in which a refusal leaves it as it is."""
    root = tmp_path_factory.mktemp('st')
    pair = ('--t_name', 'resnet8', '--t_model', trained / 'net.pt', '--s_name', 'resnet8')
    train('train_kd', *pair, '--kd_mode', 'st', '--save_root', root, '--note', 'm', *FOUR)
    return root


@pytest.mark.parametrize(
    'flag,value,named',
    [
        ('--lr', '0.05', 'lr was 0.1'),
        ('--batch_size', '24', 'batch_size'),
        ('--epochs', '5', 'epochs was 4'),
        ('--seed', '9', 'seed'),
        ('--lambda_kd', '7', 'weights, arguments or stages of methods differ: was'),
        ('--kd_args', 'T=2', '; --note NAME starts another run'),
        ('--amp', 'bf16', 'amp was'),
    ],
)
def test_other_mathematics_are_refused(train_kd, st, flag, value, named):
    before = (st / 'm' / 'st' / 'last.pt').read_bytes()
    words = list(FOUR)
    if flag in words:
        words[words.index(flag) + 1] = value
    else:
        words += [flag, value]
    done = train_kd('st', '--save_root', st, '--note', 'm', *words, '--resume', 'auto')
    assert done.code == 2 and 'cannot resume' in done.err and named in done.err and done.err.count('\n') == 1
    assert (st / 'm' / 'st' / 'last.pt').read_bytes() == before


def test_a_flag_that_is_missing_now_is_refused(train_kd):
    """A recipe names some flags only where they are set."""
    assert train_kd('st', '--note', 'm', *FOUR, '--pad', 'zero').code == 0
    done = train_kd('st', '--note', 'm', *FOUR, '--resume', 'auto')
    assert done.code == 2 and "pad was 'zero', is 'reflect'" in done.err and done.err.count('\n') == 1


def test_another_teacher_is_refused(train_kd, teacher):
    assert train_kd('st', '--note', 'm', *FOUR).code == 0
    state = torch.load(teacher, weights_only=True)
    torch.save({k: v * 1.01 if v.is_floating_point() else v for k, v in state.items()}, teacher)
    done = train_kd('st', '--note', 'm', *FOUR, '--resume', 'auto')
    assert done.code == 2 and 'the teacher (--t_model, or' in done.err


def test_a_state_of_another_version_is_a_line(tmp_path):
    old, new = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    record = Record(tmp_path, {'net': old}, {'epochs': 2}, {'commit': 'a'}, 'test')
    record.epoch_done({'epoch': 1, 'test_top1': 50.0})
    new.register_buffer('later', torch.zeros(1))
    with pytest.raises(UserError, match='its net is of another version of this code, .*later.*--note NAME'):
        Record(tmp_path, {'net': new}, {'epochs': 2}, {'commit': 'a'}, 'test').resume(tmp_path / 'last.pt')


def test_nothing_is_overwritten_unasked(train_kd, tmp_path):
    assert train_kd('st', '--note', 'm', *FOUR).code == 0
    before = (tmp_path / 'm' / 'st' / 'last.pt').read_bytes()
    done = train_kd('st', '--note', 'm', *FOUR)
    assert done.code == 2 and '--resume auto' in done.err
    assert (tmp_path / 'm' / 'st' / 'last.pt').read_bytes() == before
    done = train_kd(
        'st', 'fsp', '--note', 'm', *FOUR, '--resume', 'never', '--phases', 'inside', '--init_epochs', 4
    )
    assert 'leaves none to train' in done.err
    assert done.code == 2 and (tmp_path / 'm' / 'st' / 'last.pt').read_bytes() == before, 'nor for a mistake'
    assert train_kd('st', '--note', 'm', *FOUR, '--seed', '5', '--resume', 'never').code == 0
    assert (tmp_path / 'm' / 'st' / 'last.pt').read_bytes() != before


# ----------------------------------------------------------------------------------------- real signals


def start(tmp_path, img_root, teacher, *words) -> fresh.Popen:
    pair = ('--t_name', 'resnet8', '--t_model', teacher, '--s_name', 'resnet8')
    place = ('--img_root', img_root, '--save_root', tmp_path, '--threads', 1)
    length = ('--data_name', 'shapes:160', '--batch_size', 32, '--epochs', 6)
    words = (*pair, *place, *length, *words)
    env = {**os.environ, 'OMP_NUM_THREADS': '1'}
    return fresh.Popen('train_kd.py', '--kd_mode', 'vid', 'pkt+st', *words, env=env)


def wait_for_epoch(folder, process, epochs):
    deadline = time.time() + 120
    while time.time() < deadline and process.poll() is None:
        if (folder / 'metrics.csv').exists() and len(
            (folder / 'metrics.csv').read_text().splitlines()
        ) > epochs:
            return
        time.sleep(0.01)
    raise AssertionError(f'the run never reached epoch {epochs}: {process.communicate()}')


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory, img_root):
    """An untrained teacher, and the folder of a run that nothing stops; once for all signals."""
    folder = tmp_path_factory.mktemp('undisturbed')
    torch.manual_seed(1)
    torch.save(models.build('resnet8', 10).state_dict(), folder / 'teacher.pt')
    process = start(folder, img_root, folder / 'teacher.pt', '--note', 'whole')
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return folder / 'teacher.pt', folder / 'whole'


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_signals(tmp_path, img_root, undisturbed, number):
    """SIGTERM and Ctrl-C end after the epoch's checkpoint, SIGKILL at once; both resume exactly."""
    teacher, whole = undisturbed
    cut = start(tmp_path, img_root, teacher, '--note', 'cut')
    wait_for_epoch(tmp_path / 'cut' / 'vid', cut, 2)
    cut.send_signal(number)
    out, err = cut.communicate(timeout=300)
    if number == signal.SIGKILL:
        assert cut.returncode == -signal.SIGKILL
    else:
        assert cut.returncode == 128 + number and 'stopped after epoch' in out and 'Traceback' not in err
        epochs = [weights(tmp_path / 'cut' / token)['epoch'] for token in ('vid', 'pkt+st')]
        assert epochs[0] == epochs[1] < 6
    again = start(tmp_path, img_root, teacher, '--note', 'cut', '--resume', 'auto')
    out, err = again.communicate(timeout=300)
    assert again.returncode == 0, err
    for token in ('vid', 'pkt+st'):
        check_equal(whole / token, tmp_path / 'cut' / token)


class Dropping(torch.nn.Module):
    """resnet8 with a dropout before its classifier."""

    def __init__(self, net):
        super().__init__()
        self.net, net.fc = net, torch.nn.Sequential(torch.nn.Dropout(0.5), net.fc)

    def forward(self, *args):
        return self.net(*args)


@pytest.mark.parametrize('name', ['train_base', 'train_kd', 'train_ka', 'train_dml', 'train_dfkd'])
def test_dropout_resumes(script, teacher, tmp_path, monkeypatch, name):
    """What it draws is a function of seed, epoch and step; nor do students take numbers from each other."""
    pair = ('--t_name', 'resnet8', '--t_model', teacher, '--s_name', 'drops')
    halves = [tmp_path / f'half{part}' / 'net.pt' for part in (0, 1)]
    kinds = {
        'train_base': ('--net_name', 'drops'), 'train_kd': ('--kd_mode', 'st', 'logits', *pair),
        'train_dml': ('--kd_mode', 'dml', '--net_names', 'drops', 'drops'),
        'train_ka': ('--ka_mode', 'concat', 'mse', '--t_name', 'resnet8', '--t_model', *halves, '--s_name',
                     'drops'),
        'train_dfkd': ('--kd_mode', 'dfad', 'dafl', *pair, '--ep_steps', 2, '--kd_steps', 1, '--g_steps', 1,
                       '--synth_batch_size', 32, '--width', 4, '--nz', 6, '--warmup', 0),
    }  # fmt: skip
    for part in (0, 1) if name == 'train_ka' else ():
        flags = ('--num_parts', 2, '--part', part, '--note', f'half{part}')
        assert script('train_base', '--net_name', 'resnet8', *TINY, *flags).code == 0
    monkeypatch.setitem(
        models.MODELS, 'drops', lambda num_classes: Dropping(models.build('resnet8', num_classes))
    )
    words = (*kinds[name], *FOUR, '--note')
    done = script(name, *words, 'whole')
    assert done.code == 0, done.err
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_after(2, patch)
        script(name, *words, 'cut')
    assert script(name, *words, 'cut', '--resume', 'auto').code == 0
    groups = {'train_kd': ('st', 'logits'), 'train_ka': ('concat', 'mse'), 'train_dfkd': ('dfad', 'dafl')}
    runs = groups.get(name, ('',))
    for run in runs:
        one, two = (weights(tmp_path / note / run) for note in ('whole', 'cut'))
        assert same(one['net'], two['net']), run
    if len(runs) > 1:
        alone = [runs[1] if word == runs[0] else word for word in words if word != runs[1]]
        assert script(name, *alone, 'alone').code == 0
        one, two = (weights(tmp_path / note / runs[1]) for note in ('whole', 'alone'))
        assert same(one['net'], two['net'])
