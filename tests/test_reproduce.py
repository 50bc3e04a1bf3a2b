"""The tables fill themselves: what is there is not trained again, what was stopped continues."""

import importlib
import json
import shlex
import signal
import subprocess
import sys
import time
from argparse import Namespace

import pytest

from tests import fresh
from tests.conftest import ROOT


class Training(fresh.Popen):
    """A training as tools.reproduce starts it, forked: it need not import torch."""

    def wait(self, timeout=None) -> int:
        out, err = self.communicate(timeout)
        sys.stdout.write(out)
        sys.stderr.write(err)
        return self.returncode


@pytest.fixture
def reproduce(tmp_path, img_root, script, monkeypatch):
    """The script in this process; what it trains are other processes."""
    monkeypatch.setattr('tools.reproduce.start', lambda words: Training(*words))
    grid = [{'name': 'tiny', 'data': 'shapes:60', 'teacher': 'resnet14', 'student': 'resnet8', 'epochs': 2,
             'seeds': [2, 3], 'methods': ['st', 'at', 'rkd'], 'group': 2,
             'flags': '--batch_size 32 --threads 1'}]  # fmt: skip
    (tmp_path / 'grid.json').write_text(json.dumps(grid))

    def call(*words):
        places = ['--grid', tmp_path / 'grid.json', '--results', tmp_path / 'results', '--img_root', img_root,
                  '--save_root', tmp_path / 'save']  # fmt: skip
        done = script('tools.reproduce', *places, *words)
        return Namespace(returncode=done.code, stdout=done.out, stderr=done.err)

    return call


def test_what_is_missing_is_trained_once(reproduce, tmp_path):
    planned = reproduce('--dry_run').stdout.splitlines()
    assert len(planned) == 8  # per seed: teacher, student, two groups
    (table,) = json.loads((tmp_path / 'grid.json').read_text())
    (tmp_path / 'grid.json').write_text(json.dumps([table | {'seeds': [3]}]))  # a seed is enough to train
    done = reproduce()
    assert done.returncode == 0, done.stderr
    kept = sorted(path.name for path in (tmp_path / 'results' / 'tiny').iterdir())
    names = ('at', 'st', 'rkd', 'baseline-resnet8', 'teacher-resnet14')
    assert kept == sorted(f'{name}-s3.json' for name in names)
    assert reproduce('--dry_run').stdout == ''
    (tmp_path / 'grid.json').write_text(json.dumps([table]))
    assert len(reproduce('--dry_run').stdout.splitlines()) == 4, 'the other seed'
    (tmp_path / 'grid.json').write_text(json.dumps([table | {'seeds': [3]}]))
    (tmp_path / 'results' / 'tiny' / 'at-s3.json').unlink()
    again = reproduce('--dry_run').stdout.splitlines()
    assert len(again) == 3 and '--kd_mode at --t_name' in again[-1] and '--seed 3' in again[-1]


def test_a_published_network_stays(tmp_path, capsys):
    """Trained again for lacking methods; students that are kept were compared with it, or taught by it."""
    from tools.reproduce import Job

    def written(path, top1, initial='a', **recipe):
        recipe = {'lr': 0.1, 'initial': initial} | recipe
        path.write_text(json.dumps({'last': {'top1': top1}, 'curve': [top1], 'recipe': recipe}))
        return path

    def said(kept, new, needed=False):
        source, place = written(tmp_path / 'new.json', *new), written(tmp_path / 'kept.json', *kept)
        stays = Job([], {}, needed, base=True).stays(source, place)
        return stays, capsys.readouterr().out.replace(str(place), 'PLACE').splitlines()

    assert said((50.0, 'a'), (50.0, 'a')) == (True, [])
    there = "PLACE is kept; this machine's run gave 51.00 instead of 50.00"
    other = 'warning: students trained now {} another network than those kept beside PLACE'
    assert said((50.0, 'a'), (51.0, 'a')) == (True, [there]), 'the students began the same'
    assert said((50.0, 'a'), (51.0, 'b')) == (True, [there, other.format('begin as')])
    assert said((50.0, 'a'), (51.0, 'a'), needed=True) == (True, [there, other.format('are taught by')])
    written(tmp_path / 'kept.json', 50.0, lr=0.2)
    assert not Job([], {}, base=True).stays(tmp_path / 'new.json', tmp_path / 'kept.json'), 'another recipe'
    assert not Job([], {}, base=True).stays(tmp_path / 'new.json', tmp_path / 'nothing.json')


def test_budget_stops_at_a_checkpoint_and_continues(reproduce, tmp_path):
    (table,) = json.loads((tmp_path / 'grid.json').read_text())
    table |= {'seeds': [3], 'methods': ['rkd'], 'epochs': 12}
    (tmp_path / 'grid.json').write_text(json.dumps([table]))
    first = reproduce('--budget', 0.02)  # a second is not enough for three trainings
    assert first.returncode == 128 + signal.SIGTERM, first.stderr
    assert not (tmp_path / 'results' / 'tiny' / 'rkd-s3.json').exists()
    for attempt in range(1, 9):  # a slow machine needs longer to get through an epoch
        done = reproduce('--budget', 0.1 * attempt)
        if done.returncode == 0:
            break
        assert done.returncode == 128 + signal.SIGTERM, done.stderr
    result = json.loads((tmp_path / 'results' / 'tiny' / 'rkd-s3.json').read_text())
    assert len(result['curve']) == 12


def test_a_diverging_method_does_not_stop_the_others(reproduce, tmp_path):
    (table,) = json.loads((tmp_path / 'grid.json').read_text())
    table |= {'seeds': [3], 'epochs': 1, 'methods': ['st']}
    wild = {'seeds': [2], 'teacher_flags': table['flags'], 'flags': f'{table["flags"]} --lr 1e30'}
    (tmp_path / 'grid.json').write_text(json.dumps([table | wild, table]))
    done = reproduce()
    assert done.returncode == 1 and 'st: ' in done.stderr and 'not finite' in done.stderr
    results = tmp_path / 'results' / 'tiny'
    assert (results / 'st-s3.json').exists() and not (results / 'st-s2.json').exists()


def test_a_teacher_that_diverges_does_not_stop_the_grid(reproduce, tmp_path):
    """Its students are left out; nothing is kept of a run that was refused."""
    (table,) = json.loads((tmp_path / 'grid.json').read_text())
    table |= {'seeds': [3], 'epochs': 1, 'methods': ['st']}
    wild = {'seeds': [2], 'teacher_flags': f'{table["flags"]} --lr 1e30'}
    (tmp_path / 'grid.json').write_text(json.dumps([table | wild, table]))
    done = reproduce()
    assert done.returncode == 1 and 'resnet14: ' in done.stderr
    results = tmp_path / 'results' / 'tiny'
    assert sorted(path.name for path in results.iterdir()) == [
        'baseline-resnet8-s3.json', 'st-s3.json', 'teacher-resnet14-s3.json'
    ]  # fmt: skip
    (results / 'st-s3.json').unlink()
    (tmp_path / 'grid.json').write_text(json.dumps([table | {'weights': {'st': 0.5}}]))
    assert reproduce().returncode == 2 and not (results / 'st-s3.json').exists()


@pytest.mark.parametrize('codes, code', [([0, 1, 0], 1), ([0, 2, 0], 2), ([-9, 0], 137), ([0, 143], 143)])
def test_exit_codes_of_trainings(tmp_path, monkeypatch, codes, code):
    """1 diverged or failed: the grid goes on; a signal or a refusal ends it."""
    import tools.reproduce
    from tools.reproduce import NEEDED

    ran = []
    made = [Namespace(do=lambda end, c=c: ran.append(c) or c, needed=False) for c in codes]
    monkeypatch.setattr(
        sys, 'argv', ['reproduce.py', '--results', str(tmp_path), '--grid', str(tmp_path / 'grid.json')]
    )
    monkeypatch.setattr(tools.reproduce, 'jobs', lambda *_: [made.pop(0)] if made else [])
    (tmp_path / 'grid.json').write_text(
        json.dumps([{**dict.fromkeys(NEEDED, 'x'), 'nets': [], 'epochs': 1, 'seeds': [*range(len(codes))]}])
    )
    assert tools.reproduce.main() == code
    assert ran == codes[: next((k + 1 for k, c in enumerate(codes) if c not in (0, 1)), len(codes))]


def test_called_from_elsewhere(tmp_path, monkeypatch):
    """Trainings run in the checkout: relative folders are the caller's."""
    import tools.reproduce

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'argv', ['reproduce.py', '--results', 'r', '--save_root', 's', '--budget', '1'])
    seen = []
    monkeypatch.setattr(tools.reproduce, 'jobs', lambda table, seed, args: seen.append(args) or [])
    assert tools.reproduce.main() == 0
    assert seen[0].save_root == str(tmp_path / 's') and seen[0].results == tmp_path / 'r'


def test_other_recipes_are_not_joined():
    """Only runs that differ in their seed are; a student is compared with its own recipe's baseline."""
    from report.table import group, table

    def run(method, seed, top1, **recipe):
        recipe = {'seed': seed, 'lr': 0.1, 'batch_size': 128, 'amp': 'off', **recipe}
        last = {'top1': top1, 'selected_on': 'test'}
        return {'method': method, 'seed': seed, 'data': 'x', 'teacher': None, 'student': 'resnet8',
                'epochs': 2, 'recipe': recipe, 'machine': {'device': 'cpu'}, 'curve': [], 'last': last,
                'best': last}  # fmt: skip

    alone = [run('baseline', 2, 50.0), run('baseline', 3, 51.0)]
    other = [run('baseline', 2, 40.0, lr=0.01)]
    assert [len(runs) for runs in group(alone).values()] == [2]
    groups = group([*alone, *other])
    assert {key[3]: len(runs) for key, runs in groups.items()} == {
        'baseline (lr 0.1)': 2, 'baseline (lr 0.01)': 1
    }  # fmt: skip
    rows = table([*alone, *other, run('byot', 2, 42.0, lr=0.01)]).splitlines()
    assert any('| byot |' in row and '+2.00' in row for row in rows), rows
    rows = table([*alone, run('byot', 2, 42.0, labelled=0.5)]).splitlines()
    (row,) = [row for row in rows if '| byot |' in row]
    assert '50 % of the labels' in row and '-8' not in row


def test_a_stopped_script_leaves_no_training_behind(tmp_path, img_root):
    """Or the next start would train beside it in the same folder."""
    table = {'name': 'tiny', 'data': 'shapes:60', 'teacher': 'resnet14', 'student': 'resnet8', 'epochs': 500,
             'seeds': [2], 'methods': ['st'], 'flags': '--batch_size 32 --threads 1'}  # fmt: skip
    (tmp_path / 'grid.json').write_text(json.dumps([table]))
    places = ['--grid', tmp_path / 'grid.json', '--results', tmp_path / 'results', '--img_root', img_root,
              '--save_root', tmp_path / 'save']  # fmt: skip
    process = fresh.Popen(ROOT / 'tools' / 'reproduce.py', *places, cwd=tmp_path)
    (log,) = wait_for(lambda: list((tmp_path / 'save').glob('*/metrics.csv')))
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    epochs = log.read_text()
    time.sleep(2)  # an epoch takes much less
    assert log.read_text() == epochs


def wait_for(look, seconds: float = 60):
    for _ in range(int(seconds * 10)):
        if found := look():
            return found
        time.sleep(0.1)
    raise AssertionError(f'nothing after {seconds} s')


def test_mistakes(reproduce, tmp_path):
    (table,) = json.loads((tmp_path / 'grid.json').read_text())
    assert 'no table is called huge' in reproduce('--only', 'huge').stderr
    assert 'no table is called tin' in reproduce('--only', 'tin').stderr
    (tmp_path / 'grid.json').write_text('[')
    done = reproduce()
    assert done.returncode == 2 and 'grid.json' in done.stderr and done.stderr.count('\n') == 1
    less = {key: value for key, value in table.items() if key != 'epochs'}
    for wrong, said in (
        (table | {'weight': {'st': 0.5}}, 'table tiny has the unknown weight; keys are args, data, '),
        (less | {'epoch': 2}, 'table tiny has no epochs and has the unknown epoch; keys are'),
    ):
        (tmp_path / 'grid.json').write_text(json.dumps([wrong]))
        done = reproduce('--dry_run')
        assert done.returncode == 2 and said in done.stderr and done.stderr.count('\n') == 1, done.stderr


def test_weights_arguments_and_flags_of_a_method(reproduce, tmp_path):
    """They reach the command, methods with other flags train apart, and the results are recognised."""
    (table,) = json.loads((tmp_path / 'grid.json').read_text())
    own = {'name': 'tiny-own', 'seeds': [2], 'epochs': 1, 'methods': ['st', 'at', 'dkd', 'rkd+st'],
           'weights': {'st': 0.9, 'dkd': 2}, 'args': {'dkd': {'beta': 2.0}, 'st': {'T': 3.0}},
           'layers': {'at': '1:0.5,3'}, 'method_flags': {'st': '--lambda_ce 0.1', 'dkd': '--ramp_epochs 1'},
           'recipe': 'own'}  # fmt: skip
    (tmp_path / 'grid.json').write_text(json.dumps([table | own, table]))
    planned = reproduce('--dry_run', '--only', 'tiny-own', '--table').stdout.splitlines()
    teacher, student, st, at, dkd, made = planned
    assert '-own' in student and '--lambda_ce' not in teacher + student
    assert '--kd_mode st --t_name' in st and st.endswith('--lambda_ce 0.1')
    assert '--lambda_kd st=0.9 --kd_args st.T=3.0 ' in st
    assert '--kd_mode at rkd+st' in at
    assert '--lambda_kd st=0.9 --kd_args st.T=3.0 --kd_layers at=1:0.5,3 ' in at
    assert '--lambda_kd dkd=2 --kd_args dkd.beta=2.0 ' in dkd and dkd.endswith('--ramp_epochs 1')
    assert made.startswith('python -m report table')
    done = reproduce('--only', 'tiny-own', '--table')
    assert done.returncode == 0, done.stderr
    place = tmp_path / 'results' / 'tiny-own'
    st = json.loads((place / 'st-s2.json').read_text())['recipe']
    assert st['methods'] == [['st', 0.9, {'T': 3.0}]] and st['ce'] == 0.1
    at = json.loads((place / 'at-s2.json').read_text())['recipe']
    assert at['methods'] == [['at', 1000.0, {}, '1:0.5,3']]
    assert '| rkd+st (st.T=3.0, st.weight 0.9) |' in (place / 'table.md').read_text()
    assert reproduce('--dry_run', '--only', 'tiny-own').stdout == ''
    (tmp_path / 'grid.json').write_text(json.dumps([table | own | {'layers': {}}, table]))
    *_, todo = reproduce('--dry_run', '--only', 'tiny-own').stdout.splitlines()
    assert '--kd_mode at --t_name' in todo, 'a result of other stages is another result'
    assert '--save_root' in reproduce('--dry_run', '--only', 'tiny').stdout, 'tiny itself is not there yet'


def test_all_methods_are_those_that_the_networks_can_do(reproduce, tmp_path):
    (table,) = json.loads((tmp_path / 'grid.json').read_text())
    for student, teacher, there in (('vit_64_3', 'vit_64_4', True), ('resnet8', 'resnet14', False)):
        table |= {'methods': 'all', 'seeds': [2], 'student': student, 'teacher': teacher}
        (tmp_path / 'grid.json').write_text(json.dumps([table]))
        methods = reproduce('--dry_run').stdout.split()
        assert ('vitkd' in methods) is there and 'deit' in methods and 'dgkd' not in methods


def test_a_teacher_from_a_file(reproduce, tmp_path):
    (table,) = json.loads((tmp_path / 'grid.json').read_text())
    table |= {'teacher_file': 'wise.pt', 'seeds': [2], 'student': 'torchvision:resnet18'}
    (tmp_path / 'grid.json').write_text(json.dumps([table]))
    student, first, _ = reproduce('--dry_run').stdout.splitlines()
    assert '--net_name torchvision:resnet18 ' in student
    assert (
        '/wise.pt --s_name torchvision:resnet18 ' in first
        and ':' not in first.split('--s_init')[1].split()[0]
    )


def test_plain_momentum(tmp_path):
    """--no_nesterov is torch's SGD without it, and is written down; the default is not, as in old results."""
    import torch

    import train_base
    from engine.optimise import sgd
    from engine.recipe import math_args

    def steps(opt, p):
        for _ in range(3):
            opt.zero_grad()
            p.square().sum().backward()
            opt.step()
        return p.detach()

    args = Namespace(lr=0.1, momentum=0.9, weight_decay=0.01, nesterov=False)
    moved = {}
    for nesterov in (False, True):
        ours, theirs = (torch.nn.Parameter(torch.arange(4.0)) for _ in range(2))
        args.nesterov = nesterov
        moved[nesterov] = steps(sgd([ours], args), ours)
        plain = torch.optim.SGD([theirs], 0.1, 0.9, weight_decay=0.01, nesterov=nesterov)
        assert torch.equal(moved[nesterov], steps(plain, theirs))
    assert not torch.equal(moved[False], moved[True])
    recipes = []
    for words in ([], ['--no_nesterov', '--pad', 'zero']):
        sys.argv = ['train_base.py', '--net_name', 'resnet8', *words]
        recipes.append(math_args(train_base.parse_args()))
    assert not recipes[0].keys() & {'nesterov', 'pad'}
    assert recipes[1] == recipes[0] | {'nesterov': False, 'pad': 'zero'}


GRID = json.loads((ROOT / 'results' / 'grid.json').read_text())


def test_the_grid_of_the_project_parses():
    from methods import METHODS
    from methods.dense import DENSE
    from tools.reproduce import refuse_misspelt

    for table in GRID:
        refuse_misspelt('grid.json', table)
        known = DENSE if 'task' in table else METHODS
        parts = {part for name in table['methods'] for part in name.split('+')}
        every = table['methods'] == 'all'
        assert every or parts <= set(known), table['name']
        methods = set(known if every else table['methods'])
        for of_methods in ('weights', 'args', 'layers', 'method_flags'):
            assert set(table.get(of_methods, {})) <= methods, (table['name'], of_methods)


@pytest.mark.parametrize('name', sorted({table['name'] for table in GRID}))
def test_every_table_is_one_command(name, tmp_path):
    """What would be trained parses, with legal weights and arguments; no data, no GPU, nothing trained."""
    from tools.reproduce import jobs

    args = Namespace(save_root=tmp_path / 'save', img_root=str(tmp_path), results=tmp_path / 'results')
    tables = [table for table in GRID if table['name'] == name]
    wanted = {(seed, method) for table in tables for seed in table['seeds'] for method in table['methods']
              if table['methods'] != 'all'}  # fmt: skip
    planned = [job.words for table in tables for seed in table['seeds'] for job in jobs(table, seed, args)]
    assert not list(tmp_path.iterdir())
    for script, *given in planned:
        module = importlib.import_module(script.removesuffix('.py'))
        sys.argv = [script, *given]
        args = module.parse_args()
        if script == 'train_kd.py':
            for token, terms in module.read_methods(args).items():
                wanted.discard((args.seed, token))
                table = next(t for t in tables if t['methods'] == 'all' or token in t['methods'])
                for term in terms:
                    assert term.weight == table.get('weights', {}).get(term.name, term.weight)
                    assert term.options == table.get('args', {}).get(term.name, {})
                    assert str(term.stages) == table.get('layers', {}).get(term.name, str(term.stages))
        if script == 'train_dense.py':
            for token, terms in module.read_methods(args).items():
                wanted.discard((args.seed, token))
                table = tables[0]
                for name, (_, weight, options) in terms.items():
                    assert weight == table['weights'].get(name, weight)
                    assert options == table['args'].get(name, {})
        if script == 'train_dml.py':
            _, weight, _ = module.read_method(args)
            assert weight > 0
            wanted.discard((args.seed, args.kd_mode[0]))
    assert not wanted


def test_a_dry_run_of_published_tables(tmp_path):
    """A name stands for all tables that begin with it."""
    words = ['--dry_run', '--table', '--only', 'kd-zoo-cifar10', 'mdistiller-imagenet']
    done = fresh.run(ROOT / 'tools' / 'reproduce.py', *words, '--results', tmp_path)
    assert done.returncode == 0, done.stderr
    lines = list(map(shlex.split, done.stdout.splitlines()))
    made = [line[4].split('/')[-1] for line in lines if line[1:4] == ['-m', 'report', 'table']]
    pairs = ('resnet20-resnet20', 'resnet110-resnet20', 'resnet110-resnet110')
    assert made[:3] == [f'kd-zoo-cifar10-{pair}' for pair in pairs] and len(made) == 5
    assert sum(line[1] == 'train_dml.py' for line in lines) == 9 and not list(tmp_path.iterdir())


def test_the_example_script_fills_a_table():
    script = ['bash', str(ROOT / 'example_train_script.sh'), '--dry-run', 'table']
    done = subprocess.run([*script, 'kd-zoo-cifar100'], capture_output=True, text=True)
    download, fill = map(shlex.split, done.stdout.splitlines())
    assert done.returncode == 0 and download[:4] == ['python', '-m', 'dataset.download', 'cifar100']
    assert fill[:5] == ['python', 'tools/reproduce.py', '--only', 'kd-zoo-cifar100', '--table']
    done = subprocess.run(script, capture_output=True, text=True)
    assert done.returncode == 2 and 'say table NAME' in done.stderr and done.stderr.count('\n') == 1
