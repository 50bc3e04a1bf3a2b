"""A method is added in three places and with one command: done here, in a copy of the checkout.

The three: kd_losses/mine.py; one row in methods/kd.py; tests/methods/mine.py with its vector beside it. The
command: `python -m report refresh`.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import ROOT

ADAPTER = '''"""How mine.npz feeds kd_losses/mine.py."""

from kd_losses.mine import Mine
from tests.methods.shared import case

exceptions = {'one_logit': 'differences of logits'}


def golden(z):
    yield case(z, Mine(), 'out_s', 'out_t')
'''
# trains with the new method, then makes the table; the folder is the argument
TRAIN = """
import sys, pathlib, train_base, train_kd, report.table
def call(script, *words):
    sys.argv = ['x', *map(str, words)]
    assert not script.main()
root = pathlib.Path(sys.argv[1])
data = '--data_name', 'shapes:96', '--batch_size', 32, '--threads', 1
data += '--save_root', root, '--img_root', root / 'data'
call(train_base, '--net_name', 'resnet8', '--note', 'teacher', '--epochs', 1, *data)
pair = '--t_name', 'resnet8', '--t_model', root / 'teacher' / 'net.pt', '--s_name', 'resnet8'
call(train_kd, '--kd_mode', 'mine', *pair, '--note', 'x', '--epochs', 2, *data)
call(report.table, root / 'x', '--out', root)
"""
# `python -m report refresh`, which tries the new method on unlike pairs of networks; the methods that were
# there take the verdicts of docs/pairs.md, which tests/test_pairs.py tries
REFRESH = """
import sys
from report import pairs, refresh
known, tried = refresh.known_verdict(refresh.ROOT / 'docs' / 'pairs.md'), pairs.one_step
pairs.one_step = lambda name, kind: tried(name, kind) if name == 'mine' else (known(name, kind), '')
sys.exit(refresh.main())
"""
NOT_COPIED = ('.*', '__pycache__', 'data', 'save', 'build', '*.egg-info', 'golden')


@pytest.fixture(scope='module')
def house(tmp_path_factory) -> Path:
    """The checkout with the method `mine`: the fourth power of the differences of logits."""
    folder = tmp_path_factory.mktemp('checkout') / 'house'
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*NOT_COPIED))

    # (1) the loss, from one that is near
    text = (folder / 'kd_losses' / 'logits.py').read_text()
    for old, new in (
        ('Logits', 'Mine'),
        ('logits import', 'mine import'),
        (r'F\.mse_loss\((_full\(out_s\)), (_full\(out_t.*\))\)', r'(\1 - \2).pow(4).mean()'),
    ):
        text = re.sub(old, new, text)
    assert 'class Mine' in text and '.pow(4).mean()' in text
    (folder / 'kd_losses' / 'mine.py').write_text(text)

    # (2) the row, and the import of its file
    rows = (folder / 'methods' / 'kd.py').read_text()
    row = "    'mine':     Method(mine.Mine,              0.1, shared.logits),\n"
    for before, new in (('    mlkd,\n', '    mine,\n'), ("    'mlkd': ", row)):
        assert rows.count(before) == 1
        rows = rows.replace(before, new + before)
    (folder / 'methods' / 'kd.py').write_text(rows)

    # (3) the adapter and the vector, which knows nothing of torch
    out_s, out_t = np.random.default_rng(0).standard_normal((2, 5, 7))
    gap = out_s - out_t
    tests = folder / 'tests' / 'methods'
    (tests / 'mine.py').write_text(ADAPTER)
    loss, grad = (gap**4).mean(), 4 * gap**3 / gap.size
    np.savez(tests / 'mine.npz', in_out_s=out_s, in_out_t=out_t, loss=loss, grad_out_s=grad)
    return folder


def run(folder: Path, *words) -> str:
    """Run python in the folder; returns what it prints."""
    env = {key: value for key, value in os.environ.items() if key not in ('PYTHONPATH', 'GOLDEN_DIR')}
    env |= {'OMP_NUM_THREADS': '1', 'MKL_NUM_THREADS': '1'}
    command = [sys.executable, *map(str, words)]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


ONLY = ' or '.join(f'{name}] or [{name}- or -{name}-' for name in ('mine', 'logits'))


def test_it_has_the_checks_of_every_method(house):
    """They pass, and there are as many as for its near relation."""
    files = ('tests/test_golden.py', 'tests/test_contract.py', 'tests/test_standalone.py')
    words = ('-m', 'pytest', '-v', '-p', 'no:xdist', '-p', 'no:cacheprovider', '-k', ONLY)
    said = run(house, *words, *files)
    mine, logits = (
        re.findall(rf'::(\w+)\[(?:.*-)?{name}(?:-.*)?\] PASSED', said) for name in ('mine', 'logits')
    )
    assert sorted(mine) == sorted(logits) and len(set(mine)) > 30
    assert not re.search('FAILED|ERROR|SKIPPED|XFAIL', said)


def test_without_its_vector_or_adapter_a_test_says_so(house, tmp_path):
    """The third place cannot be forgotten."""
    for forgotten, said in (('mine.npz', 'mine.npz is missing'), ('mine.py', 'no tests/methods/mine.py')):
        place = house / 'tests' / 'methods' / forgotten
        place.rename(tmp_path / forgotten)
        words = ('-m', 'pytest', '-q', '-p', 'no:cacheprovider', 'tests/test_golden.py', '-k', 'mine')
        done = subprocess.run([sys.executable, *words], cwd=house, capture_output=True, text=True)
        (tmp_path / forgotten).rename(place)
        assert done.returncode == 1 and said in done.stdout, done.stdout


def test_it_is_trained_and_in_the_table(house, tmp_path):
    """Two epochs with a resnet8 that has learned for one."""
    run(house, '-c', TRAIN, tmp_path)
    (path,) = (tmp_path / 'x').rglob('results.json')
    result = json.loads(path.read_text())
    assert result['method'] == 'mine' and len(result['curve']) == 2
    assert re.search(r'^\| mine \|', (tmp_path / 'table.md').read_text(), re.M)


def test_one_command_does_the_rest(house):
    """Imports, the script's block and docs/methods.md know it."""
    run(house, '-c', REFRESH)
    assert re.search(r'^\| mine \|( works \|| refuses \|)+$', (house / 'docs' / 'pairs.md').read_text(), re.M)
    assert 'from .mine import Mine' in (house / 'kd_losses' / '__init__.py').read_text()
    assert run(house, '-c', 'from kd_losses import Mine; print(Mine.__name__)') == 'Mine\n'
    script = (house / 'example_train_script.sh').read_text()
    assert re.search(r'^mine\(\) +\{ kd mine +--lambda_kd 0\.1; \}$', script, re.M)
    assert re.search(r"^METHODS='.*\bmine\b.*'$", script, re.M)
    page = (house / 'docs' / 'methods.md').read_text()
    assert re.search(r'^\| \[`mine`\]\(\.\./kd_losses/mine\.py\) \|', page, re.M)
    run(house, '-m', 'report', 'refresh', '--check')  # nothing is stale
