"""The house keeps its shape: files and rows agree, scripts know no method names, the code is clean."""

import ast
import importlib
import re
import subprocess
import sys

import pytest

from methods import KA, LM, METHODS
from methods.dense import DENSE
from methods.dfkd import DFKD
from report import code
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


def test_nobody_branches_on_the_name_of_a_method():
    """Neither scripts nor what is behind them: no comparison with a method's name (deit is a network's)."""
    every = {*METHODS, *DFKD, *KA, *LM, *DENSE} - {'ce', 'alone', 'baseline', 'scratch', 'logits', 'deit'}
    for folder in ('.', 'engine', 'ka_settings', 'models', 'dataset', 'methods'):
        for path in (ROOT / folder).glob('*.py'):
            for node in ast.walk(ast.parse(path.read_text())):
                sides = [node.left, *node.comparators] if isinstance(node, ast.Compare) else []
                sides = [part for side in sides for part in getattr(side, 'elts', [side])]
                named = every & {side.value for side in sides if isinstance(side, ast.Constant)}
                assert not named, f'{path.relative_to(ROOT)}:{node.lineno} asks for {named}'


def test_what_flows_through_a_step_has_named_fields():
    """Dataclasses, which a reader and an editor can follow."""
    for folder in ('engine', 'methods', 'ka_settings', 'kd_losses', 'ka_losses', 'dfkd_losses', '.'):
        for path in (ROOT / folder).glob('*.py'):
            assert 'SimpleNamespace' not in path.read_text(), path


def test_every_data_free_loss_has_a_row():
    files = {p.stem for p in (ROOT / 'dfkd_losses').glob('[!_]*.py')}
    assert files == {row.loss.__module__.split('.')[-1] for name, row in DFKD.items() if name != 'kd_pool'}


def test_whoever_steps_in_fp16_scales_gradients():
    """A script with --amp that calls backward has a GradScaler, says that fp16 is refused, or asks a module
    that does; else small gradients would be 0, silently."""
    for path in [*ROOT.glob('train_*.py'), *(ROOT / 'tools').glob('[!_]*.py')]:
        source = path.read_text()
        if '.backward()' in source and re.search(r'add_(machine|common)_flags|--amp', source):
            scales = ('GradScaler', 'run.scaler.', 'refuse_fp16(args)', 'ka_tools import', 'dfkd_flags')
            scales += ('refuse_amp(args)',)
            assert any(word in source for word in scales), f'{path.name}: --amp fp16 without a GradScaler'
        if path.parent.name == 'tools' and 'add_machine_flags(' in source:
            assert re.search(r'args\.amp|refuse_amp', source), f'{path.name} has --amp and does not read it'
    for name in ('ka_tools', 'dfkd_flags'):
        assert re.search('refuse_fp16|--amp fp16', (ROOT / 'engine' / f'{name}.py').read_text())


OPTIONAL = {'tqdm', 'matplotlib', 'tensorboard', 'safetensors', 'pycocotools', 'transformers'}


def test_optional_packages_are_imported_where_they_may_be_missing():
    """Inside a try with ImportError, or after one: what needs them says so in a line."""

    def packages(node) -> set:
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ''] if isinstance(node, ast.ImportFrom) else []
        return {name.removeprefix('torch.utils.').split('.')[0] for name in names} & OPTIONAL

    folders = '. tools report engine dataset models methods ka_settings transferability'
    for path in [p for folder in folders.split() for p in (ROOT / folder).glob('*.py')]:
        tree, tried = ast.parse(path.read_text()), set()
        for block in [node for node in ast.walk(tree) if isinstance(node, ast.Try)]:
            if any('ImportError' in ast.unparse(handler) for handler in block.handlers):
                tried |= {name for line in block.body for name in packages(line)}
        asked = {name for node in ast.walk(tree) for name in packages(node)}
        assert asked == tried, f'{path.name}: {asked - tried} may be missing'
        assert not any(packages(node) for node in tree.body), f'{path.name} needs it to be imported'


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


def test_git_is_asked_in_one_place():
    """There may be none: engine/origin.py knows; another call would end a script with a traceback."""
    for path in [*ROOT.glob('*.py'), *ROOT.glob('*/*.py'), *ROOT.glob('tools/*/*.py')]:
        name = str(path.relative_to(ROOT))
        if name.startswith('tests/') or name == 'engine/origin.py':
            continue
        lists = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, (ast.List, ast.Tuple))]
        words = [n.elts[0].value for n in lists if n.elts and isinstance(n.elts[0], ast.Constant)]
        assert 'git' not in words, f'{name}: commit_of() of engine/origin.py does this'


def test_every_update_is_guarded():
    """What is not finite stops a training before the update: guard, sound or isfinite before backward."""
    allowed = {
        'engine/lm_networks.py:trained': 'its network is looked at before it is kept',
        'engine/dense_setting.py:learn_from_labels': 'its network is looked at before it is kept',
        'engine/dense_build.py:learn_masks': 'a dozen steps; the loss that reads the masks is guarded',
        'kd_losses/dot.py:update': 'train_kd.py, which calls it, has asked the guard',
        'ka_settings/backbones.py:fit_probe': 'a probe, whose accuracy is all that is kept',
        'tools/transferability.py:train_head': 'a probe, whose accuracy is all that is kept',
    }
    seen = set()
    for path in [*ROOT.glob('train_*.py'), *ROOT.glob('engine/*.py'), *ROOT.glob('tools/*.py'),
                 *ROOT.glob('ka_settings/*.py'), *ROOT.glob('*_losses/*.py')]:  # fmt: skip
        source = path.read_text()
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef):
                text = ast.get_source_segment(source, node)
                if '.backward()' in text and re.search(r'\.step\(', text):
                    name = f'{path.relative_to(ROOT)}:{node.name}'
                    guards = ('guard(', 'sound(', 'refuse_non_finite(', 'isfinite(')
                    guarded = any(word in text for word in guards)
                    assert guarded or name in allowed, f'{name} updates without a guard'
                    seen.add(name)
    assert allowed.keys() <= seen, 'an exception for nothing'


def test_a_class_that_two_files_have_is_refused(tmp_path):
    """One of them would be what `from losses import Same` gives."""
    (tmp_path / '__init__.py').write_text("from .a import Same\n\n__all__ = ['Same']\n")
    for name in 'ab':
        (tmp_path / f'{name}.py').write_text('class Same:\n    pass\n')
    with pytest.raises(ValueError, match=r'b\.py: has a class Same, as \S*a\.py has'):
        code.package(tmp_path)
    (tmp_path / 'b.py').unlink()
    assert 'from .a import Same' in code.package(tmp_path)
