"""The tables fill themselves: what is there is not trained again, what was stopped continues."""

import json
import signal
import subprocess
import sys
import time

import pytest

from tests.conftest import ROOT


@pytest.fixture
def reproduce(tmp_path, img_root):
    grid = [{'name': 'tiny', 'data': 'shapes:60', 'teacher': 'resnet14', 'student': 'resnet8', 'epochs': 2,
             'seeds': [2, 3], 'methods': ['st', 'at', 'rkd'], 'group': 2,
             'flags': '--batch_size 32 --threads 1'}]  # fmt: skip
    (tmp_path / 'grid.json').write_text(json.dumps(grid))

    def call(*words):
        places = ['--grid', tmp_path / 'grid.json', '--results', tmp_path / 'results', '--img_root', img_root,
                  '--save_root', tmp_path / 'save']  # fmt: skip
        command = [sys.executable, ROOT / 'tools' / 'reproduce.py', *places, *words]
        return subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=tmp_path)

    return call


def test_what_is_missing_is_trained_once(reproduce, tmp_path):
    planned = reproduce('--dry_run').stdout.splitlines()
    assert len(planned) == 8  # per seed: teacher, student, two groups
    done = reproduce()
    assert done.returncode == 0, done.stderr
    kept = sorted(path.name for path in (tmp_path / 'results' / 'tiny').iterdir())
    names = ('at', 'st', 'rkd', 'baseline-resnet8', 'teacher-resnet14')
    assert kept == sorted(f'{name}-s{seed}.json' for seed in (2, 3) for name in names)
    assert reproduce('--dry_run').stdout == ''
    (tmp_path / 'results' / 'tiny' / 'at-s3.json').unlink()
    again = reproduce('--dry_run').stdout.splitlines()
    assert len(again) == 3 and '--kd_mode at --t_name' in again[-1] and '--seed 3' in again[-1]


def test_budget_stops_at_a_checkpoint_and_continues(reproduce, tmp_path):
    (table,) = json.loads((tmp_path / 'grid.json').read_text())
    (tmp_path / 'grid.json').write_text(json.dumps([table | {'seeds': [3], 'methods': ['rkd']}]))
    first = reproduce('--budget', 0.05)  # three seconds
    assert first.returncode == 128 + signal.SIGTERM, first.stderr
    assert not (tmp_path / 'results' / 'tiny' / 'rkd-s3.json').exists()
    for attempt in range(1, 9):  # a slow machine needs longer to get through an epoch
        done = reproduce('--budget', 0.15 * attempt)
        if done.returncode == 0:
            break
        assert done.returncode == 128 + signal.SIGTERM, done.stderr
    assert (tmp_path / 'results' / 'tiny' / 'rkd-s3.json').exists()


def test_a_diverging_method_does_not_stop_the_others(reproduce, tmp_path):
    (table,) = json.loads((tmp_path / 'grid.json').read_text())
    table |= {'seeds': [3], 'epochs': 1, 'methods': ['st']}
    wild = {'seeds': [2], 'teacher_flags': table['flags'], 'flags': f'{table["flags"]} --lr 1e30'}
    (tmp_path / 'grid.json').write_text(json.dumps([table | wild, table]))
    done = reproduce()
    assert done.returncode == 1 and 'st: ' in done.stderr and 'not finite' in done.stderr
    results = tmp_path / 'results' / 'tiny'
    assert (results / 'st-s3.json').exists() and not (results / 'st-s2.json').exists()


def test_a_stopped_script_leaves_no_training_behind(tmp_path, img_root):
    """Or the next start would train beside it in the same folder."""
    table = {'name': 'tiny', 'data': 'shapes:60', 'teacher': 'resnet14', 'student': 'resnet8', 'epochs': 500,
             'seeds': [2], 'methods': ['st'], 'flags': '--batch_size 32 --threads 1'}  # fmt: skip
    (tmp_path / 'grid.json').write_text(json.dumps([table]))
    places = ['--grid', tmp_path / 'grid.json', '--results', tmp_path / 'results', '--img_root', img_root,
              '--save_root', tmp_path / 'save']  # fmt: skip
    command = [sys.executable, ROOT / 'tools' / 'reproduce.py', *places]
    process = subprocess.Popen(list(map(str, command)), cwd=tmp_path)
    (log,) = wait_for(lambda: list((tmp_path / 'save').glob('*/metrics.csv')))
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 128 + signal.SIGTERM
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
    assert 'no table is called huge' in reproduce('--only', 'huge').stderr
    (tmp_path / 'grid.json').write_text('[')
    done = reproduce()
    assert done.returncode == 2 and 'grid.json' in done.stderr and done.stderr.count('\n') == 1


def test_the_grid_of_the_project_parses():
    from methods import METHODS

    for table in json.loads((ROOT / 'results' / 'grid.json').read_text()):
        assert table['methods'] == 'all' or set(table['methods']) <= set(METHODS), table['name']
