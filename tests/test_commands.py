"""Commands that a person types or pastes: nothing is ignored, and what they read was made before."""

import os
import re
import subprocess

import pytest

from tests.conftest import ROOT


def example(*words, **variables):
    command = ['bash', str(ROOT / 'example_train_script.sh'), *words]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **variables})


@pytest.mark.parametrize(
    'words,told',
    [
        (['st', 'at'], 'kd METHOD...'),
        (['base', 'x'], 'got x'),
        (['dfkd', 'cmi'], 'got cmi'),
        (['quick', '--dry-run'], '--dry-run comes first'),
        (['kd'], 'say kd METHOD...'),
        (['kd', '--phases', 'inside'], 'say kd METHOD...'),
        (['kd', 'st', '--epochs', '3'], '--epochs: the script sets it; say EPOCHS=3 in front of bash'),
        (['kd', 'st', '--lr', '0.1', '--save_root=x'], 'say SAVE_ROOT=FOLDER in front of bash'),
        (['kd', 'st', '--note', 'mine'], '--note: the script sets it'),
        (['dml', 'st'], 'dml st'),
        (['dml', 'dml', 'kdlc'], 'dml kdlc: say one of'),
        (['table', 'a', 'b'], 'say table NAME'),
    ],
)
def test_words_that_would_be_ignored_are_refused(words, told):
    done = example('--dry-run', *words)
    assert done.returncode == 2 and not done.stdout
    assert told in done.stderr and done.stderr.count('\n') == 1


@pytest.mark.parametrize(
    'command,variables',
    [('ka_claims', {}), ('dfkd', {'DFKD_DATA': 'cifar10'}), ('base', {'DATA': 'cifar10:500'})],
)
def test_cifar10_is_fetched_first(command, variables):
    """Whatever part of it is trained on; of another data set in DATA nothing is fetched."""
    done = example('--dry-run', command, **{'DATA': 'shapes', **variables})
    fetching = [line for line in done.stdout.splitlines() if 'dataset.download' in line]
    assert done.returncode == 0 and done.stdout.startswith(fetching[0])
    assert len(fetching) == 1 and fetching[0].split()[3] == 'cifar10'


@pytest.mark.parametrize('command', [['dml'], ['kd', 'st']], ids=' '.join)
def test_a_mistake_in_the_flags_stops_the_script(tmp_path, command):
    """tools/missing.py, which is asked first, reads the flags and ends with 2."""
    fake = tmp_path / 'python3'
    fake.write_text('#!/bin/sh\n[ "$1" = tools/missing.py ] && exit 2\nexit 0\n')
    fake.chmod(0o755)
    assert example(*command, PATH=f'{tmp_path}:{os.environ["PATH"]}').returncode == 2


def test_what_is_said_of_a_method_goes_to_its_training():
    """Not to those of other teachers, which would refuse it; what names nothing is left for these."""
    words = '--lambda_kd st=0.5 aekd=2 rdk=1 --kd_args tfkd_self.T=2 --lr 0.1 --kd_layers at=2'.split()
    done = example('--dry-run', 'kd', 'tfkd_self', 'st+at', 'aekd', *words)
    twin, pair, _, several, _ = done.stdout.splitlines()
    assert '--lambda_kd rdk=1 --kd_args tfkd_self.T=2 --lr 0.1 --data_name' in twin
    assert '--lambda_kd st=0.5 rdk=1 --lr 0.1 --kd_layers at=2 --data_name' in pair
    assert '--lambda_kd aekd=2 rdk=1 --lr 0.1 --data_name' in several


def test_a_table_is_of_the_folders_that_are_there(tmp_path):
    """Where results/ has every method, none was trained: its folder would be refused."""
    fake = tmp_path / 'python3'
    fake.write_text('#!/bin/sh\n[ "$1" = -m ] && echo "$@"\nexit 0\n')  # tools/missing.py names none
    fake.chmod(0o755)
    there = [tmp_path / name for name in ('base-cifar10-resnet20-s2', 'dml-cifar10-resnet20-s2')]
    for folder in there:
        folder.mkdir()
    done = example('kd', 'st', SAVE_ROOT=str(tmp_path), PATH=f'{tmp_path}:{os.environ["PATH"]}')
    assert done.stdout.startswith(f'-m report table {there[0]} {there[1]} --out '), done.stdout


def test_the_commands_of_a_page_make_the_files_that_they_read():
    """Pasted from top to bottom; a folder is one thing only."""
    page = (ROOT / 'docs' / 'amalgamation.md').read_text()
    blocks = re.findall(r'```bash\n(.*?)```', page, re.S)
    made = []
    for line in '\n'.join(blocks).replace('\\\n', ' ').splitlines():
        for note, numbers in re.findall(r'save/([\w-]+)(?:\{([\d,]+)\})?/', line):
            assert {note + number for number in numbers.split(',')} <= {*made}, line
        made += re.findall(r'--note (\S+)', line)
    assert len(made) == len({*made}) > 10
