"""Several processes: gradients, evaluation, files, restarts, with two gloo processes on this machine."""

import json
import os
import runpy
import subprocess
import sys

import pytest
import torch

import dataset
import models
import models.dense
from dataset import annotated
from dataset import text as texts
from engine.dense_tasks import TASKS, Setting
from engine.device import autocast
from engine.evaluate import evaluate
from methods import METHODS
from models import lm
from tests.conftest import ROOT, TINY, torchrun
from tests.dense_processes import find_some, keep_statistics
from tests.lm_processes import EVERY, OWN, small
from tests.test_dense import results
from tests.test_train import rows, same, weights

PAIR = ('--t_name', 'resnet8', '--s_name', 'resnet8')


GRADIENTS = """
import sys, torch
import engine.device
import engine.evaluate
import engine.processes
from types import SimpleNamespace
from methods import METHODS
from models import Feats

names, path = sys.argv[1].split(','), sys.argv[2]
if engine.processes.processes() > 1:
    engine.processes.join_processes(torch.device('cpu'))
n, rank, many = 12, engine.processes.rank(), engine.processes.processes()

class Net(torch.nn.Module):  # no batch norm: that sees its own process only
    def __init__(self, seed, width):
        super().__init__()
        torch.manual_seed(seed)
        channels = [3, 4, 4, 4, width]
        self.convs = torch.nn.ModuleList(
            torch.nn.Conv2d(a, b, 3, 2, 1) for a, b in zip(channels, channels[1:]))
        self.fc = torch.nn.Linear(width, 5)
        self.double()

    def forward(self, x):
        fms, pres = [], []
        for conv in self.convs:
            pres.append(conv(x))
            x = pres[-1].relu()
            fms.append(x)
        feat = x.mean(dim=(2, 3))
        return Feats(self.fc(feat), feat, fms, pres)

class Step(torch.nn.Module):
    def __init__(self, net, kd, feed):
        super().__init__()
        self.net, self.kd, self.feed = net, kd, feed

    def forward(self, img, t, b):
        s, t, b = engine.processes.gather_batches(self.net(img), t, b)
        return self.feed(self.kd, s, t, b)

torch.manual_seed(1)
img, target = torch.randn(n, 3, 32, 32, dtype=torch.float64), torch.arange(n) % 5
mine = slice(rank * n // many, (rank + 1) * n // many)
net_t, found = Net(7, 8), {}
for name in names:
    method = METHODS[name]
    torch.manual_seed(3)
    net = Net(5, 4)
    e = SimpleNamespace(s=net(img[:2]), t=net_t(img[:2]))
    kd = method.build(method.loss, e).double()
    step = engine.processes.distributed(Step(net, kd, method.feed), torch.device('cpu'))
    b = SimpleNamespace(target=target[mine], epoch=5, epochs=10)
    with torch.no_grad():
        t = net_t(img[mine])
    step(img[mine], t, b).backward()
    found[name] = [p.grad for p in [*net.parameters(), *kd.parameters()] if p.grad is not None]
if rank == 0:
    torch.save(found, path)
if many > 1:  # a process that ends in the middle of it may crash
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
"""


def gradients(program: str, names: str, two, folder, monkeypatch) -> list[dict]:
    """{method: gradients} of one process and of two."""
    file = folder / 'gradients.py'
    file.write_text(program)
    monkeypatch.setattr(sys, 'argv', [str(file), names, str(folder / '1.pt')])
    runpy.run_path(str(file), run_name='__main__')
    done = two(file, names, folder / '2.pt')
    assert done.code == 0, done.err
    return [torch.load(folder / f'{many}.pt', weights_only=True) for many in (1, 2)]


def test_two_processes_give_the_gradient_of_one(two, tmp_path, monkeypatch):
    """2 x 6 samples with global relations = 1 x 12, for every relational loss and a plain one."""
    names = ','.join(['st', *(name for name, m in METHODS.items() if m.needs.relations)])
    one, two = gradients(GRADIENTS, names, two, tmp_path, monkeypatch)
    for name in one:
        assert len(one[name]) == len(two[name]) > 4
        scale = max(float(g.abs().max()) for g in one[name])
        for a, b in zip(one[name], two[name]):
            assert torch.allclose(a, b, rtol=1e-9, atol=1e-12 * scale), name


def test_relations_of_one_process_are_not_those_of_all(two, tmp_path, monkeypatch):
    """The test above can fail: without gathering, a relational loss has another gradient."""
    apart = GRADIENTS.replace('engine.processes.gather_batches(self.net(img), t, b)', '(self.net(img), t, b)')
    one, two = gradients(apart, 'rkd,st', two, tmp_path, monkeypatch)
    torch.testing.assert_close(one['st'][0], two['st'][0])
    assert (one['rkd'][0] - two['rkd'][0]).norm() > 0.1 * one['rkd'][0].norm()


@pytest.fixture
def root(img_root, tmp_path):
    return ('--img_root', img_root, '--save_root', tmp_path, '--threads', 1)


def test_training_on_two_processes(two, teacher, root, tmp_path):
    """Every script runs; the first process writes; accuracies are those of the weights in one process."""
    words = ('--batch_size', 16, '--data_name', 'shapes:96', '--epochs', 2)
    model = ('--t_model', teacher)
    kinds = ('st', 'vid', 'rkd', 'ab', 'simkd', 'sla')
    flags = (*PAIR, *model, *words, *root, '--note', 'two', '--global_relations')
    done = two('train_kd.py', '--kd_mode', *kinds, *flags)
    assert done.code == 0, done.err
    assert done.out.count('teacher resnet8: top-1') == 1 and '2 processes x 16 images' in done.out
    for token in kinds:
        result = json.loads((tmp_path / 'two' / token / 'results.json').read_text())
        assert result['processes'] == 2 and result['global_relations'] is True
    flags = (*PAIR, *model, *words, *root, '--note', 'apart')
    assert two('train_kd.py', '--kd_mode', 'st', 'rkd', *flags).code == 0
    alike = {name: rows(tmp_path / 'two' / name) == rows(tmp_path / 'apart' / name) for name in ('st', 'rkd')}
    assert alike == {'st': True, 'rkd': False}, 'the flag is for what relates samples'
    net = models.build('resnet8', 10)
    models.load_weights(net, tmp_path / 'two' / 'st' / 'student.pt')
    test = dataset.load('shapes:96', tmp_path)[1]
    alone = evaluate(net, test, autocast(torch.device('cpu'), 'off'))
    assert alone['top1'] == pytest.approx(float(rows(tmp_path / 'two' / 'st')[-1]['test_top1']), abs=1e-3)
    done = two('train_base.py', '--net_name', 'resnet8', *words, *root, '--note', 'base')
    assert done.code == 0, done.err
    nets = ('--net_names', 'resnet8', 'resnet8')
    done = two('train_dml.py', '--kd_mode', 'dml', *nets, *words, *root, '--note', 'dml')
    assert done.code == 0, done.err


def test_memory_banks_refuse(two, teacher, root):
    done = two('train_kd.py', '--kd_mode', 'crd', *PAIR, '--t_model', teacher, *TINY, *root)
    assert done.code == 2 and 'crd runs in one process only' in done.err


def test_a_killed_process_is_restarted(two, teacher, root, tmp_path):
    """A process dies in the third epoch, all begin again at the last checkpoint."""
    words = ('--kd_mode', 'st', 'vid', *PAIR, '--t_model', teacher, '--data_name', 'shapes:96')
    words += ('--batch_size', 16, '--epochs', 4, *root, '--resume', 'auto')
    done = two('train_kd.py', *words, '--note', 'whole')
    assert done.code == 0, done.err
    program = tmp_path / 'dies.py'
    program.write_text(
        'import os, signal, sys\n'
        f'sys.path.insert(0, {str(ROOT)!r})\n'
        'import train_kd, engine.errors, engine.processes\n'
        'real = train_kd.begin_epoch\n'
        'def begin(run, epoch, args):\n'
        f'    once = {str(tmp_path / "died")!r}\n'
        '    if epoch == 2 and engine.processes.rank() == 1 and not os.path.exists(once):\n'
        '        open(once, "w").close()\n'
        '        os.kill(os.getpid(), signal.SIGKILL)\n'
        '    return real(run, epoch, args)\n'
        'train_kd.begin_epoch = begin\n'
        'sys.argv[0] = "train_kd.py"\n'
        'try:\n'
        '    engine.errors.run(train_kd.main)\n'
        'finally:\n'
        '    assert not engine.processes.dist.is_initialized()\n'
    )
    command = torchrun('--max-restarts=2', program, *words, '--note', 'cut')
    env = {**os.environ, 'OMP_NUM_THREADS': '1'}
    done = subprocess.run(
        [*map(str, command)], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / 'died').exists() and '2 of 4 epochs done' in done.stdout
    for token in ('st', 'vid'):
        a, b = weights(tmp_path / 'whole' / token), weights(tmp_path / 'cut' / token)
        assert same(a['net'], b['net']) and same(a['opt'], b['opt'])
        assert rows(tmp_path / 'whole' / token) == rows(tmp_path / 'cut' / token)


def test_dense_training_on_two_processes(two, script, img_root, tmp_path, monkeypatch):
    """tests/dense_processes.py: 2 x 2 pictures are 1 x 4, a kill changes nothing, figures are of all."""
    quick = ('--data_name', 'scenes:24', '--size', 32, '--labelled', 6, '--t_steps', 2, '--optim', 'sgd')
    flags = (*quick, '--lr', 0.05, '--img_root', img_root, '--threads', 1)
    student, length = ('--s_name', 'lraspp:resnet10'), ('--steps', 4, '--eval_every', 2)
    both, one = tmp_path / 'both', tmp_path / 'one'
    both.mkdir()
    done = two('tests/dense_processes.py', both, *flags, '--batch_size', 2, '--save_root', both)
    assert done.code == 0, done.err
    assert done.out.count('teacher lraspp:resnet18: ') == 3 and '2 processes x 2 pictures' in done.out
    said = torch.load(both / 'said.pt', weights_only=True)
    assert len(said['states']) == 2 and same(*said['states']), 'weights, statistics, masks that were learnt'
    assert [text.rpartition('(')[2] for text in said['failures']] == ['in another process)', 'nan)']
    every, some, none = said['means']
    assert every.unique().tolist() == [1.5] and some.unique().tolist() == [0.5] and none is None

    keep_statistics(monkeypatch.setattr)
    find_some(monkeypatch.setattr)
    taught = ('st+cwd', 'skds_pair+maskd_seg')
    for batch in (2, 4):  # the teacher is made by the first, with batches of 2 as on two processes
        made = [word for path in one.glob('**/dense_teacher_segmentation_*')
                for word in ('--t_model', path, '--t_steps', 350)]  # fmt: skip
        done = script('train_dense', *flags, *student, *length, '--kd_mode', *taught, '--batch_size', batch,
                      '--save_root', one, '--note', batch, *made)  # fmt: skip
        assert done.code == 0, done.err
    for name in taught:
        mine, joint, less = (
            torch.cat([x.flatten().double() for x in weights(path / name)['net'].values()])
            for path in (both / 'whole', one / '4', one / '2')
        )
        assert (mine - joint).norm() < 1e-4 * (less - joint).norm(), name
        mine, joint = (results(path / name) for path in (both / 'half', one / '4'))
        assert mine['processes'] == mine['recipe']['processes'] == 2 and joint['processes'] == 1
        assert mine['recipe']['teacher'] == joint['recipe']['teacher'], 'it belongs to no number of processes'
    for name in ('alone', *taught):
        whole, half = (weights(both / note / name) for note in ('whole', 'half'))
        assert same(whole['net'], half['net']) and same(whole['kd'], half['kd']), name
    done = script('train_dense', *flags, *student, *length, '--kd_mode', 'alone', '--batch_size', 2,
                  '--save_root', both, '--note', 'half', '--resume', 'auto', '--t_steps', 350)  # fmt: skip
    assert done.code == 2 and 'cannot resume, processes was 2, is 1' in done.err, done.err
    for task, name, net in (('segmentation', 'half/alone', 'lraspp:resnet10'),
                            ('detection', 'boxes/maskd', 'fasterrcnn:resnet10')):  # fmt: skip
        test = annotated.load(task, 'scenes:24', img_root, 32)[2]
        net = models.dense.build(task, net, len(test.class_names), 32).eval()
        models.load_weights(net, both / name / 'student.pt')
        cpu = torch.device('cpu')
        setting = Setting(test, len(test.class_names), cpu, autocast(cpu, 'off'), 0, 1, None, 6)
        figures = TASKS[task](setting, net).measure(net)
        last = results(both / name)['last']
        assert 0 < min(figures.values()) and figures == pytest.approx({key: last[key] for key in figures}), (
            task
        )


def test_language_models_on_two_processes(two, script, tmp_path, monkeypatch):
    """tests/lm_processes.py: 2 x 2 texts are 1 x 4, also what students write, and a kill changes nothing."""
    both, one, file = tmp_path / 'both', tmp_path / 'one', tmp_path / 'a.txt'
    both.mkdir()
    file.write_text((ROOT / 'README.md').read_text())
    flags = ('--data_name', file, '--t_steps', 2, '--init_steps', 2, '--steps', 4, '--eval_every', 2)
    flags += ('--threads', 1)
    done = two('tests/lm_processes.py', both, *flags, '--batch_size', 2, '--save_root', both)
    assert done.code == 0, done.err
    assert done.out.count('teacher: trained') == 1 and '2 processes x 2 texts' in done.out
    said = torch.load(both / 'said.pt', weights_only=True)
    assert len(said['states']) == 2 and same(*said['states']), 'weights, what losses keep, own texts'
    assert [text.rpartition('(')[2] for text in said['failures']] == ['in another process)', 'nan)']

    small(monkeypatch.setattr)
    for words, note in ((('--kd_mode', *EVERY), 'whole'), (OWN, 'own')):
        done = script('train_lm', *flags, *words, '--batch_size', 4, '--save_root', one, '--note', note)
        assert done.code == 0, done.err
    x = texts.load(str(file)).held_out()[:9, :-1]
    (start,) = one.glob('lm_start_*')
    for name in (*EVERY[:-1], OWN[1]):  # dskd_cma divides by deviations within a process
        note = 'whole' if name in EVERY else 'own'
        folders = [place / note / name for place in (both, one)]
        with torch.no_grad():
            mine, joint, before = (
                lm.from_state(torch.load(path))(x) for path in (*(f / 'student.pt' for f in folders), start)
            )
        assert (mine - joint).norm() < 1e-4 * (before - joint).norm(), name
        mine, joint = map(results, folders)
        assert mine['last'] == pytest.approx(joint['last'], rel=1e-4), name
        assert mine['processes'] == mine['recipe']['processes'] == 2 and joint['processes'] == 1
        assert mine['recipe']['teacher'] == joint['recipe']['teacher'], 'it belongs to no number of processes'
    for name, whole, half in (
        ('taid', 'whole', 'half'),
        ('minillm', 'whole', 'half'),
        ('fkl', 'own', 'half own'),
    ):
        whole, half = (weights(both / note / name) for note in (whole, half))
        assert same(whole['net'], half['net']) and same(whole['kd'], half['kd']), name


def test_what_is_found_before_a_training_reaches_every_process(two, teacher, root, tmp_path):
    """wkd's costs are a buffer that every process fills; where they differ, the first one's count."""
    program = tmp_path / 'costs.py'
    program.write_text(
        'import sys\n'
        f'sys.path.insert(0, {str(ROOT)!r})\n'
        'import torch, train_kd, engine.build, engine.errors, engine.processes\n'
        'real, same = train_kd.begin_epoch, engine.build.same_buffers\n'
        'def other(step):\n'
        '    step.losses[0].cost.add_(engine.processes.rank())\n'
        '    same(step)\n'
        'engine.build.same_buffers = other\n'
        'def begin(run, epoch, args):\n'
        f'    place = {str(tmp_path)!r} + "/cost" + str(engine.processes.rank()) + ".pt"\n'
        '    torch.save(run.terms[0].loss.cost, place)\n'
        '    return real(run, epoch, args)\n'
        'train_kd.begin_epoch = begin\n'
        'try:\n'
        '    engine.errors.run(train_kd.main)\n'
        'finally:\n'
        '    train_kd.begin_epoch, engine.build.same_buffers = real, same  # the modules stay\n'
    )
    done = two(program, '--kd_mode', 'wkd', *PAIR, '--t_model', teacher, *TINY, '--epochs', 1, *root)
    assert done.code == 0, done.err
    first, second = (torch.load(tmp_path / f'cost{k}.pt', weights_only=True) for k in (0, 1))
    assert torch.equal(first, second) and first.fill_diagonal_(1).min() > 0


def test_statistics_that_a_loss_has_made_are_those_of_every_process(two, teacher, root, tmp_path):
    """ft's paraphraser learns before the training, in every process on its share, and then stays as it is."""
    program = tmp_path / 'statistics.py'
    program.write_text(
        'import sys\n'
        f'sys.path.insert(0, {str(ROOT)!r})\n'
        'import torch, train_kd, engine.errors, engine.processes\n'
        'real = train_kd.begin_epoch\n'
        'def begin(run, epoch, args):\n'
        '    real(run, epoch, args)\n'
        f'    place = {str(tmp_path)!r} + "/" + str(engine.processes.rank()) + ".pt"\n'
        '    torch.save(dict(run.terms[0].loss.named_buffers()), place)\n'
        'train_kd.begin_epoch = begin\n'
        'try:\n'
        '    engine.errors.run(train_kd.main)\n'
        'finally:\n'
        '    train_kd.begin_epoch = real  # the module stays\n'
    )
    words = ('--kd_mode', 'ft', *PAIR, '--t_model', teacher, *TINY, '--pretrain_epochs', 1, '--epochs', 1)
    done = two(program, *words, *root)
    assert done.code == 0, done.err
    first, second = (torch.load(tmp_path / f'{k}.pt', weights_only=True) for k in (0, 1))
    assert any('running_mean' in name for name in first) and same(first, second)


def test_processes_that_find_unlike_checkpoints_do_not_train(two, root, tmp_path):
    """As on two machines with disks of their own."""
    words = ('--net_name', 'resnet8', *TINY, '--epochs', 1, *root, '--note', 'net', '--resume', 'auto')
    assert two('train_base.py', *words).code == 0
    program = tmp_path / 'elsewhere.py'
    program.write_text(
        'import os, sys\n'
        f'sys.path.insert(0, {str(ROOT)!r})\n'
        'import train_base, engine.errors\n'
        'if os.environ["RANK"] == "1":\n'
        f'    sys.argv += ["--save_root", {str(tmp_path / "other")!r}]\n'
        'engine.errors.run(train_base.main)\n'
    )
    done = two(program, *words)
    assert done.code == 2 and 'has epochs done: [1], another: [0]; --save_root must be' in done.err
