"""The house keeps its shape: files and rows agree, scripts know no method names, the code is clean."""

import ast
import importlib
import subprocess
import sys

import pytest

from methods import LM, METHODS
from methods.dense import DENSE
from methods.dfkd import DFKD
from tests import methods
from tests.conftest import ROOT


def test_ruff_is_clean():
    for words in (['check', '.'], ['format', '--check', '.']):
        done = subprocess.run(
            [sys.executable, '-m', 'ruff', *words], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr


def test_every_method_is_a_file_of_its_name():
    files = {p.stem for p in (ROOT / 'kd_losses').glob('*.py')} - {'__init__'}
    every = METHODS | LM | DENSE
    used = {m.loss.__module__.split('.')[-1] for name, m in every.items() if name not in ('ce', 'alone')}
    # losses that no script trains say in tests/methods how they are called; dot.py is an optimiser
    alone = {f for f in methods.files('kd_losses') if methods.exists(f) and hasattr(methods.of(f), 'cases')}
    assert files == used | {'dot'} | alone and files - alone <= set(every)
    for name, method in METHODS.items():  # mlkd_strong is a row of mlkd.py
        assert name == 'dot' or name.startswith(method.loss.__module__.split('.')[-1])


def test_the_scripts_know_no_method():
    """No string in a training script is the name of a method: wiring is the table's business."""
    for path in ROOT.glob('train_*.py'):
        tree = ast.parse(path.read_text())
        words = {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
        named = words & {*METHODS, *DFKD}
        assert not named, f'{path.name} names {named}'


def test_what_flows_through_a_step_has_named_fields():
    """Dataclasses, which a reader and an editor can follow."""
    for folder in ('engine', 'methods', 'ka_settings', 'kd_losses', 'ka_losses', 'dfkd_losses', '.'):
        for path in (ROOT / folder).glob('*.py'):
            assert 'SimpleNamespace' not in path.read_text(), path


def test_every_data_free_loss_has_a_row():
    files = {p.stem for p in (ROOT / 'dfkd_losses').glob('[!_]*.py')}
    assert files == {row.loss.__module__.split('.')[-1] for name, row in DFKD.items() if name != 'kd_pool'}


def test_the_package_is_the_losses_only():
    """pip install . must offer kd_losses and nothing that would clash, like models or utils."""
    pyproject = (ROOT / 'pyproject.toml').read_text()
    assert (
        'include = ["kd_losses", "ka_losses", "dfkd_losses"]' in pyproject
        and 'dependencies = ["torch>=' in pyproject
    )


@pytest.mark.parametrize('name', sorted(path.stem for path in (ROOT / 'benchmarks').glob('[a-z]*.py')))
def test_benchmarks_can_be_imported(name):
    """They are run by hand: a name that moved would be noticed last."""
    importlib.import_module(f'benchmarks.{name}')
