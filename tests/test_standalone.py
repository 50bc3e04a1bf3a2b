"""Each loss file, copied alone into an empty folder, imports and runs in a fresh process.

A process that has imported torch and nothing else forks for every file: an interpreter each would spend three
seconds on importing torch, 78 times.
"""

import ast
import doctest
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests import methods

ROOT = Path(__file__).parent.parent
FILES = [
    p
    for folder in ('kd_losses', 'ka_losses', 'dfkd_losses')
    for p in sorted((ROOT / folder).glob('*.py'))
    if p.stem != '__init__'
]
ALLOWED = {'torch', 'math', 'typing'}
WITH_SCIPY = {'transformer_ka'}  # files whose page in the specification asks for scipy

# builds the file's class from its constructor's names, calls it with random tensors of its arguments' names
PROGRAM = """
import importlib, inspect, sys, torch
module = importlib.import_module(sys.argv[1])
classes = [c for c in vars(module).values() if inspect.isclass(c) and c.__module__ == module.__name__
           and issubclass(c, (torch.nn.Module, torch.optim.Optimizer)) and not c.__name__.startswith('_')]
assert classes
ours = ('kd_losses', 'ka_losses', 'dfkd_losses', 'models', 'dataset', 'engine', 'methods')
foreign = [m for m in sys.modules if m.split('.')[0] in ours]
assert not foreign, foreign

def make(t):
    values = {'s_channels': 4, 't_channels': t, 's_dim': 4, 't_dim': t, 'n_data': 20, 'num_samples': 20,
              'num_classes': 7, 'mid_dim': 4, 'feat_dim': 4, 'feat_dims': [4, 4], 'num_branches': 2,
              'batch_size': 5, 'dims': [4, 8], 'num_words': 5}
    return classes[0](**{k: v for k, v in values.items() if k in inspect.signature(classes[0]).parameters})

if issubclass(classes[0], torch.optim.Optimizer):
    p = torch.nn.Parameter(torch.ones(3))
    opt = classes[0]([p], lr=0.1)
    (p * torch.arange(3.0)).sum().backward()
    opt.step()
    assert torch.allclose(p, torch.tensor([1, 0.9, 0.8])), p
    print('ran', classes[0].__name__)
    sys.exit()
try:
    loss, c = make(6), 6
except ValueError:  # a method for equal channels
    loss, c = make(4), 4
maps = [(5, 4, 6, 6), (5, 8, 3, 3)]
pairs = [
    ((5, 7), 'out_s out_t out out_pair out_a out_b out_1 out_2 out_leader attacked_out_s attacked_out_t'),
    ((5, 4), 'feat_s feat_a feat_b feat feat_mid'), ((5, c), 'feat_t'), ((20, 28), 'joint_out'),
    ((5, 4, 6, 3), 'fm_s'), ((5, c, 6, 3), 'fm_t'), ((5, 7, 4, 4), 'cam_s'), ((5, 7, 8, 8), 'cam_t'),
    ((5, 7, 21), 'patch_s patch_t'), (maps[0], 'fm fm_s1 fm_t1'), (maps[1], 'fm_next fm_s2 fm_t2'),
]
shapes = {name: shape for shape, names in pairs for name in names.split()}
shapes |= {name: [(5, 7), (5, 7)] for name in 'outs outs_1 outs_2 outs_t peers outs_mix'.split()}
shapes |= {'feats': [(5, 4), (5, 4)], 'fms_s': maps, 'fms_t': maps}
given = {'target': torch.arange(5), 'index': torch.arange(5), 'classifier': torch.nn.Linear(c, 7), 'epoch': 3,
         'lam': 0.5, 'teacher_tail': lambda fm: fm.mean(dim=(2, 3)) @ torch.ones(c, 7)}

def tensor(shape, learns):
    if isinstance(shape, list):
        return [tensor(s, learns) for s in shape]
    return torch.randn(shape).requires_grad_(learns)

def leaves(x):
    return [x] if torch.is_tensor(x) else [y for z in x for y in leaves(z)] if isinstance(x, list) else []

torch.manual_seed(0)
inputs = {}
for name, parameter in inspect.signature(loss.forward).parameters.items():
    teacher = name.endswith('_t') or '_t' in name
    if name in given:
        inputs[name] = given[name]
    elif name == 'img':
        inputs[name] = torch.randn(5, 3, 8, 8, requires_grad=True)
    elif name in shapes and not (parameter.default is None and name not in ('peers',)):
        inputs[name] = tensor(shapes[name], not teacher)
value = loss(**inputs)
value.backward()
learnt = [x for v in inputs.values() for x in leaves(v) if x.requires_grad and x.is_leaf]
assert torch.isfinite(value) and all(torch.isfinite(x.grad).all() for x in learnt if x.grad is not None)
assert any(x.grad is not None for x in learnt)
print('ran', classes[0].__name__)
"""


# builds and calls it as the text says that tests/methods has, see ka_cases.py
GIVEN = """
import importlib, sys, torch
m = importlib.import_module(sys.argv[1])
ours = ('kd_losses', 'ka_losses', 'dfkd_losses', 'models', 'dataset', 'engine', 'methods')
foreign = [name for name in sys.modules if name.split('.')[0] in ours]
assert not foreign, foreign
torch.manual_seed(0)
n, K = 6, 7
learnt = []
def S(*shape):
    learnt.append(torch.randn(shape, requires_grad=True))
    return learnt[-1]
def T(*shape):
    return torch.randn(shape)
C = T
exec(sys.argv[2])
value = globals().get('call', loss)(**inputs)
value.backward()
assert torch.isfinite(value) and all(torch.isfinite(x.grad).all() for x in learnt if x.grad is not None)
assert any(x.grad is not None for x in learnt)
print('ran', type(loss).__name__)
"""

# answers every line [folder, program, arguments ...] with the exit code of the program, run in that folder
SERVER = """
import json, os, sys, traceback
import torch
for line in sys.stdin:
    folder, program, *sys.argv[1:] = json.loads(line)
    child = os.fork()
    if not child:
        code = 1
        for number, to in ((0, os.devnull), (1, f'{folder}.out'), (2, f'{folder}.err')):
            os.dup2(os.open(to, os.O_RDWR | os.O_CREAT), number)
        try:
            os.chdir(folder)
            exec(program, {'__name__': '__main__'})
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    print(json.dumps(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])), flush=True)
"""


@pytest.fixture(scope='module')
def server(tmp_path_factory):
    """server(folder, program, ...) -> exit code, out, err of the program in a process of its own."""
    pipe = {'stdin': subprocess.PIPE, 'stdout': subprocess.PIPE, 'text': True}
    with subprocess.Popen(
        [sys.executable, '-c', SERVER], cwd=tmp_path_factory.mktemp('cwd'), **pipe
    ) as process:

        def run(folder, *program):
            print(json.dumps([str(folder), *program]), file=process.stdin, flush=True)
            code = json.loads(process.stdout.readline())
            return code, *(Path(f'{folder}.{kind}').read_text() for kind in ('out', 'err'))

        yield run
        process.stdin.close()


@pytest.mark.parametrize('path', FILES, ids=lambda p: p.stem)
def test_runs_alone(path, tmp_path, server):
    (tmp_path / path.name).write_bytes(path.read_bytes())
    text = given(path)
    code, out, err = server(tmp_path, *([GIVEN, path.stem, text] if text else [PROGRAM, path.stem]))
    assert code == 0, err
    assert out.startswith('ran ')


def given(path) -> str | None:
    """The text that builds and calls it, where it is not to be guessed."""
    file = methods.name_of(path)
    own = methods.of(file) if methods.exists(file) else None
    return own.cases[path.stem] if hasattr(own, 'cases') else getattr(own, 'alone', None)


def test_a_file_is_really_alone(tmp_path, server):
    """Not one of our packages is in reach, nothing of one file is left for the next."""
    (tmp_path / 'leans.py').write_text('from kd_losses import st')
    code, _, err = server(tmp_path, PROGRAM, 'leans')
    assert code == 1 and "No module named 'kd_losses'" in err
    assert server(tmp_path, 'import torch; torch.mine = 1')[0] == 0
    assert server(tmp_path, 'import torch; assert not hasattr(torch, "mine")')[0] == 0


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
    assert re.search(r'^Taps?:', doc, re.M) and re.search(r'^Differences:', doc, re.M), (
        'no Tap:, Differences:'
    )
    assert len(doc.splitlines()) <= 45, 'longer than a screen'
    public = [n for n in tree.body if isinstance(n, ast.ClassDef) and not n.name.startswith('_')]
    assert public, 'the first public class is the method'
    said = ast.get_docstring(public[0]) or ''
    assert 'Shape:' in said and 'Raises:' in said, 'the class needs a docstring with Shape: and Raises:'
    init = [n for n in public[0].body if isinstance(n, ast.FunctionDef) and n.name == '__init__']
    for argument in [a.arg for a in init[0].args.args[1:]] if init else []:
        assert re.search(rf'\b{argument}\b', said), f'{argument} is not explained'


@pytest.mark.parametrize('path', FILES, ids=lambda p: p.stem)
def test_says_where_it_is_from_and_how_to_use_it(path, monkeypatch):
    """Source: repository and file, or 'formula only'. Use: runs as pasted, and fails without a gradient."""
    doc = ast.get_docstring(ast.parse(path.read_text()))
    source = re.search(r'^Source: (.+?)\n\n', doc, re.M | re.S)
    assert source and '\nUse:\n' in doc, 'the docstring needs the paragraphs Source: and Use:'
    source = source[1]
    assert source.startswith('formula only') or re.match(r'[\w-]+/[\w.-]+( at commit \w+)?, \w', source), (
        source
    )
    use = doctest.DocTestParser().get_doctest(doc.split('\nUse:\n')[1], {}, path.stem, str(path), 0)
    lines = ''.join(example.source for example in use.examples)
    assert f'from {path.stem} import ' in lines and '.backward()' in lines
    assert [example.want for example in use.examples if example.want] == ['tensor(True)\n']
    monkeypatch.syspath_prepend(path.parent)  # as if the file had been copied beside the reader's script
    monkeypatch.delitem(sys.modules, path.stem, raising=False)
    torch.manual_seed(0)
    said = []
    assert doctest.DocTestRunner().run(use, out=said.append).failed == 0, ''.join(said)
    sys.modules.pop(path.stem)  # it is a copy of kd_losses' or ka_losses'


def test_formulas_say_the_zoo_by_its_name():
    for path in FILES:
        doc = ast.get_docstring(ast.parse(path.read_text()))
        assert 'seed zoo' not in path.read_text() and not re.search(r'\b(elsewhere|theirs)\b', doc), path.stem


# helpers of one name that differ on purpose: in how many texts, and why
OWN = {
    '_kl': (4, 'reduced as its file needs it'),
    '_leading': (2, 'kdsvd keeps the singular values, mhgd the vectors alone'),
    '_log_probabilities': (3, 'sdd has an axis of regions more, rld and sdd take a mask'),
    '_mmd': (2, "cc's kernel of means, nst's discrepancy"),
    '_pearson': (2, 'distplus takes short vectors as constant ones, dist as they are'),
    '_pool': (2, 'fsp also by maximum'),
    '_separable': (2, 'exits of different networks'),
}


def test_helpers_of_one_name_are_one_text():
    """What stands in many files by design must not drift: mend one, mend all."""
    seen = {}
    for path in FILES:
        source = path.read_text()
        for node in ast.parse(source).body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith('_'):
                seen.setdefault(node.name, {}).setdefault(ast.get_source_segment(source, node), []).append(
                    path.stem
                )
    for name in (
        '_expect',
        '_full',
        '_labels',
        '_mean',
        '_run',
        '_exact',
        '_rounded',
        '_unit',
        '_no_autocast',
        '_is',
    ):
        assert sum(map(len, seen[name].values())) > 3, f'{name} is no longer shared'
    drifted = {name: list(texts.values()) for name, texts in seen.items() if len(texts) > 1}
    assert drifted.keys() == OWN.keys(), drifted
    assert {name: len(texts) for name, texts in drifted.items()} == {name: n for name, (n, _) in OWN.items()}


@pytest.mark.parametrize('path', [p for p in FILES if p.stem != 'dot'], ids=lambda p: p.stem)
def test_every_loss_guards_its_arguments(path):
    """Shapes with remedies, precision, and exact products: a new file has them too."""
    source = path.read_text()
    assert '_expect(' in source and '_full(' in source, 'copy both from kd_losses/st.py, and use them'
    code = source.split('"""', 2)[2]
    for product in re.findall(r'[^\n]*(?: @ |addmm|bmm)[^\n]*', code):
        assert '_exact' in code or path.stem in ('cfl', 'skds'), f'{product.strip()} is not exact'


@pytest.mark.parametrize('path', FILES, ids=lambda p: p.stem)
def test_every_refusal_says_what_it_got(path):
    """And where that is a shape or a length, what to do about it; each of the loss's own errors."""
    loss, *_ = re.split(r'\n# -+ how the training scripts use it', path.read_text())
    for node in ast.walk(ast.parse(loss)):
        if isinstance(node, ast.Raise) and node.exc is not None and 'ValueError' in ast.unparse(node.exc):
            said = ast.unparse(node.exc)
            assert 'got' in said, said
            if re.search(r'\.shape\)}|got {len\(', said):
                assert re.search(r'got.*: \S', said), f'no remedy: {said}'


def test_there_are_files():
    assert len(FILES) >= 12
