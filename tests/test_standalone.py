"""Each loss file, copied alone into an empty folder, imports and runs in a fresh interpreter."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = [
    p
    for folder in ('kd_losses', 'ka_losses')
    for p in sorted((ROOT / folder).glob('*.py'))
    if p.stem != '__init__'
]
ALLOWED = {'torch', 'math', 'typing', 'collections', 'contextlib', 'copy'}
WITH_SCIPY = set()  # files whose page in the specification asks for scipy

# builds the file's class from its constructor's names, calls it with random tensors of its arguments' names
PROGRAM = """
import importlib, inspect, sys, torch
module = importlib.import_module(sys.argv[1])
classes = [c for c in vars(module).values() if inspect.isclass(c) and issubclass(c, torch.nn.Module)
           and c.__module__ == module.__name__ and not c.__name__.startswith('_')]
assert classes

def make(t_channels):
    values = {'s_channels': 4, 't_channels': t_channels, 's_dim': 4, 't_dim': t_channels, 'n_data': 20}
    if module.__name__ == 'reviewkd':  # one entry per level
        values = {'s_channels': [4, 8], 't_channels': [4, 8]}
    return classes[0](**{k: v for k, v in values.items() if k in inspect.signature(classes[0]).parameters})

try:
    loss, c = make(6), 6
except ValueError:  # a method for equal channels
    loss, c = make(4), 4
shapes = {'out': (5, 7), 'patch': (5, 7, 21), 'feat_s': (5, 4), 'feat_t': (5, c)}
shapes |= {'fm_s': (5, 4, 6, 3), 'fm_t': (5, c, 6, 3)}
lists = {'irg': [(5, 4, 6, 6), (5, 8, 3, 3), (5, 8), (5, 7)], 'fms': [(5, 4, 6, 6), (5, 8, 3, 3)]}
inputs = {}
for name in inspect.signature(loss.forward).parameters:
    if name == 'target':
        inputs[name] = torch.arange(5)
    elif name[:-2] in lists:
        inputs[name] = [torch.randn(s).requires_grad_(name.endswith('_s')) for s in lists[name[:-2]]]
    elif name == 'index':
        inputs[name] = torch.arange(5)
    elif name == 'classifier':
        inputs[name] = torch.nn.Linear(c, 7)
    elif name not in ('mask', 'generator', 'args', 'sample_idx', 'out_s_strong', 'out_t_strong'):
        inputs[name] = torch.randn(shapes.get(name) or shapes[name[:-2]]).requires_grad_(name.endswith('_s'))
value = loss(**inputs)
value.backward()
leaves = [x for v in inputs.values() for x in (v if isinstance(v, list) else [v]) if torch.is_tensor(x)]
assert torch.isfinite(value) and all(torch.isfinite(x.grad).all() for x in leaves if x.requires_grad)
ours = ('kd_losses', 'ka_losses', 'models', 'dataset', 'utils')
foreign = [m for m in sys.modules if m.split('.')[0] in ours]
assert not foreign, foreign
print('ran', classes[0].__name__)
"""


@pytest.mark.parametrize('path', FILES, ids=lambda p: p.stem)
def test_runs_alone(path, tmp_path):
    (tmp_path / path.name).write_bytes(path.read_bytes())
    done = subprocess.run(
        [sys.executable, '-c', PROGRAM, path.stem], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith('ran ')


@pytest.mark.parametrize('path', FILES, ids=lambda p: p.stem)
def test_imports_only_torch(path):
    allowed = ALLOWED | ({'scipy'} if path.stem in WITH_SCIPY else set())
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            assert {alias.name.split('.')[0] for alias in node.names} <= allowed
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module.split('.')[0] in allowed


@pytest.mark.parametrize('path', FILES, ids=lambda p: p.stem)
def test_explains_itself(path):
    """The module's docstring is the method on one screen; the class says shapes and errors."""
    tree = ast.parse(path.read_text())
    doc = ast.get_docstring(tree)
    assert re.search(r'(19|20)\d\d', doc), 'no year of the paper'
    assert 'loss =' in doc, 'no equation'
    assert re.search(r'^Taps?:', doc, re.M) and re.search(r'^Differences:', doc, re.M)
    assert len(doc.splitlines()) <= 45, 'longer than a screen'
    public = [n for n in tree.body if isinstance(n, ast.ClassDef) and not n.name.startswith('_')]
    assert public, 'the first public class is the method'
    said = ast.get_docstring(public[0])
    assert 'Shape:' in said and 'Raises:' in said
    init = [n for n in public[0].body if isinstance(n, ast.FunctionDef) and n.name == '__init__']
    for argument in [a.arg for a in init[0].args.args[1:]] if init else []:
        assert re.search(rf'\b{argument}\b', said), f'{argument} is not explained'


def test_there_are_files():
    assert len(FILES) >= 12
