"""The house keeps its shape: README and table agree, scripts know no method names, the code is clean."""

import ast
import re
import subprocess
import sys
import textwrap

import pytest

from ka_losses import METHODS as KA_METHODS
from methods import METHODS
from tests.conftest import ROOT

README = (ROOT / 'README.md').read_text()


def test_ruff_is_clean():
    for words in (['check', '.'], ['format', '--check', '.']):
        done = subprocess.run(
            [sys.executable, '-m', 'ruff', *words], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr


def test_every_method_is_a_file_of_its_name():
    files = {p.stem for p in (ROOT / 'kd_losses').glob('*.py')} - {'__init__'}
    used = {m.loss.__module__.split('.')[-1] for m in METHODS.values()}
    assert files == used | {'dot'} and files <= set(METHODS)  # dot.py is an optimiser
    for name, method in METHODS.items():  # mlkd_strong is a row of mlkd.py
        assert name == 'dot' or name.startswith(method.loss.__module__.split('.')[-1])


def test_the_scripts_know_no_method():
    """No string in a training script is the name of a method: wiring is the table's business."""
    for path in ROOT.glob('train_*.py'):
        tree = ast.parse(path.read_text())
        words = {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
        assert not words & set(METHODS), f'{path.name} names {words & set(METHODS)}'


def method_rows() -> dict[str, list[str]]:
    """The README's method table: {name: cells}."""
    rows = [line for line in README.splitlines() if re.match(r'\| `[a-z0-9_]+` \|', line)]
    cells = {
        line.split('`')[1]: [cell.strip() for cell in line.strip('|').split('|')]
        for line in rows
        if line.count('|') == 7
    }
    return cells


def test_the_readme_lists_every_method():
    rows = method_rows()
    assert list(rows) == sorted(METHODS)
    for name, cells in rows.items():
        method = METHODS[name]
        assert f'kd_losses/{name.split("_")[0]}.py' in cells[1], name
        assert f'{method.weight:g}' == cells[4], (
            f'{name}: weight {cells[4]} in the README, {method.weight:g} in the table'
        )


def code_blocks(language: str) -> list[str]:
    return re.findall(rf'```{language}\n(.*?)^ *```', README, re.S | re.M)


@pytest.mark.parametrize('number', range(len(code_blocks('python'))))
def test_the_readme_code_runs(number, tmp_path):
    """As pasted, in a folder that holds what the text says: rkd.py copied, or the checkout on the path."""
    (tmp_path / 'rkd.py').write_bytes((ROOT / 'kd_losses' / 'rkd.py').read_bytes())
    block = textwrap.dedent(code_blocks('python')[number])
    env = {'PATH': '/usr/bin:/bin', 'OMP_NUM_THREADS': '1'} | (
        {} if 'from rkd' in block else {'PYTHONPATH': str(ROOT)}
    )
    done = subprocess.run(
        [sys.executable, '-c', block], cwd=tmp_path, capture_output=True, text=True, env=env
    )
    assert done.returncode == 0, done.stderr


def test_the_readme_has_code():
    assert len(code_blocks('python')) >= 2 and len(code_blocks('bash')) >= 2


def test_the_readme_tables_are_those_of_the_results():
    """What stands between the markers is what tools/table.py makes of results/ today; so is the figure."""
    from PIL import Image

    from tools.table import read_results, source_of_figure, table

    names = [n for n in re.findall(r'<!-- ([\w/-]+):begin -->', README) if n.startswith('cifar')]
    assert names
    for name in names:
        shown = re.search(rf'<!-- {name}:begin -->\n(.*?)<!-- {name}:end -->', README, re.S)[1]
        results = read_results([str(ROOT / 'results' / name)])
        assert shown == table(results), f'run tools/table.py for {name}'
        for r in results:
            check_origin(r)
        with Image.open(ROOT / 'results' / name / 'accuracy.png') as figure:
            assert figure.info['Source'] == source_of_figure(results), f'draw the figure of {name} again'
        assert f'](results/{name}/accuracy.png)' in README


def check_origin(result: dict) -> None:
    assert re.fullmatch(r'[0-9a-f]{40}', result['commit']), 'a result must come from a clean commit'
    assert result['command'].startswith('python train_') and '/tmp' not in result['command']
    assert result['machine']['cpu'] and isinstance(result['seed'], int)


def test_paths_named_in_the_readme_exist():
    for path in re.findall(r'`((?:[\w.]+/)*[\w.]+\.(?:py|sh|toml))`', README):
        if path != 'kd_losses/mine.py':  # the one the reader is told to write
            assert (ROOT / path).exists() or (ROOT / 'kd_losses' / path).exists(), path


def test_the_package_is_the_losses_only():
    """pip install . must offer kd_losses and nothing that would clash, like models or utils."""
    pyproject = (ROOT / 'pyproject.toml').read_text()
    assert 'include = ["kd_losses", "ka_losses"]' in pyproject and 'dependencies = ["torch>=' in pyproject


def test_the_readme_lists_every_amalgamation():
    """Every file and every row of ka_losses, in the table of that section."""
    section = README.split('## Amalgamation')[1].split('\n## ')[0]
    rows = [line.split('|') for line in section.splitlines() if 'ka_losses/' in line and line.startswith('|')]
    files = {p.stem for p in (ROOT / 'ka_losses').glob('[!_]*.py')}
    assert {re.search(r'ka_losses/(\w+)\.py', row[2])[1] for row in rows} == files
    named = {word.strip() for row in rows for word in row[1].split(',')} - {'-'}
    assert named | {'scratch'} == set(KA_METHODS)


def test_the_readme_amalgamation_tables_are_those_of_the_results():
    from tools.ka_table import NOTE, read_results, tables, text_of

    names = re.findall(r'<!-- (ka-[\w-]+):begin -->', README)
    assert names, 'no results of train_ka.py in the README'
    for name in names:
        results = read_results([str(ROOT / 'results' / name)])
        for r in results:
            check_origin(r)
        shown = README.split(f'<!-- {name}:begin -->\n')[1].split(f'<!-- {name}:end -->')[0]
        assert shown == text_of(tables(results)), f'{name}: run tools/ka_table.py with --readme'
        assert NOTE in shown


def test_the_readme_benchmarks_are_those_of_the_results():
    from benchmarks.table import table

    shown = README.split('<!-- benchmarks:begin -->\n')[1].split('<!-- benchmarks:end -->')[0]
    assert shown == table(), 'run python -m benchmarks.table --readme README.md'
