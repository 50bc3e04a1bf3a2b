"""README and docs: generated parts are fresh, code runs, commands parse, and what they name exists."""

import ast
import importlib
import itertools
import re
import shlex
import subprocess
import sys
import textwrap

import pytest

from engine.errors import UserError
from methods import KA as KA_METHODS
from methods import LM, METHODS
from methods.dense import DENSE
from methods.dfkd import DFKD
from report import pages, refresh
from report.pages import parser_of
from tests import fresh
from tests.conftest import ROOT
from tests.test_cli import parsed

PAGES = [ROOT / 'README.md', *sorted((ROOT / 'docs').glob('*.md'))]
TEXT = {page: page.read_text() for page in PAGES}


def blocks(language: str) -> list[tuple[str, str]]:
    """[(page and number, block)] of all pages."""
    found = [
        (page.stem, textwrap.dedent(block))
        for page, text in TEXT.items()
        for block in re.findall(rf'```{language}\n(.*?)^ *```', text, re.S | re.M)
    ]
    return [(f'{page}-{k}', block) for k, (page, block) in enumerate(found)]


def test_nothing_generated_is_stale(monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['report', '--check'])
    assert refresh.main() == 0, f'run python -m report refresh: {capsys.readouterr().out}'


def test_a_stale_page_is_named(monkeypatch, capsys):
    page = ROOT / 'docs' / 'flags.md'
    monkeypatch.setattr(sys, 'argv', ['report', '--check'])
    monkeypatch.setattr(refresh, 'texts', lambda trust: {page: 'other'})
    before = page.read_text()
    assert refresh.main() == 1 and 'stale: docs/flags.md' in capsys.readouterr().out
    assert page.read_text() == before


def test_every_result_is_of_a_clean_commit_and_names_its_command():
    results = refresh.table.read_results([str(ROOT / 'results')])
    assert results
    for result in results:
        assert re.fullmatch(r'[0-9a-f]{40}', result['commit']), 'a result must come from a clean commit'
        assert result['command'].startswith('python t') and '/tmp' not in result['command']
        assert result['machine']['cpu'] and isinstance(result['seed'], int)


def test_the_readme_is_short_and_there_is_code():
    assert TEXT[PAGES[0]].count('\n') <= 130
    assert len(blocks('python')) >= 5 and len(commands()) >= 20


@pytest.mark.parametrize('page,block', blocks('python'), ids=[page for page, _ in blocks('python')])
def test_the_code_runs(page, block, tmp_path):
    """As pasted, in a folder that holds what the text says: rkd.py copied, or the checkout on the path."""
    (tmp_path / 'rkd.py').write_bytes((ROOT / 'kd_losses' / 'rkd.py').read_bytes())
    env = {'PATH': '/usr/bin:/bin', 'OMP_NUM_THREADS': '1'}
    env |= {} if 'from rkd' in block else {'PYTHONPATH': str(ROOT)}
    if 'PYTHONPATH' in env:
        done = fresh.run('-c', block, cwd=tmp_path, env=env)
    else:  # torch alone
        words = [sys.executable, '-c', block]
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr


def of_scripts() -> list[str]:
    """The commands that the scripts show in their docstrings, without what stands beside them."""
    paths = [*sorted(ROOT.glob('train_*.py')), *sorted((ROOT / 'tools').glob('*.py'))]
    texts = [(ast.get_docstring(ast.parse(path.read_text())) or '') for path in paths]
    lines = '\n'.join(re.sub(r'\\\n *', '', text) for text in texts).splitlines()
    return [re.split(' {2,}', line.strip())[0] for line in lines if re.match(' +(python|torchrun) ', line)]


def commands() -> list[list[str]]:
    """Every command of the bash blocks, without the variables before it and the comment after it."""
    lines = '\n'.join(block for _, block in blocks('bash')).replace('\\\n', ' ').splitlines()
    made = [shlex.split(line, comments=True) for line in [*lines, *of_scripts()]]
    for words in made:
        while words and re.match(r'[A-Z_0-9]+=', words[0]):
            words.pop(0)
    return [words for words in made if words]


@pytest.mark.parametrize('words', commands(), ids=lambda words: ' '.join(words[:5]))
def test_the_commands_are_right(words, monkeypatch):
    """Python commands are parsed by their script, those of the example script run with --dry-run."""
    if words[0] == 'torchrun':  # and its own flags
        words = ['python', *itertools.dropwhile(lambda word: not word.endswith('.py'), words)]
    if words[:2] == ['bash', 'example_train_script.sh']:
        line = ['bash', str(ROOT / words[1]), '--dry-run', *words[2:]]
        done = subprocess.run(line, capture_output=True, text=True)
        assert done.returncode == 0 and 'python train_' in done.stdout, done.stderr
    elif words[0] == 'python' and '...' not in words and not words[1].startswith('tools/gpu'):
        module, rest = (words[2], words[3:]) if words[1] == '-m' else (words[1], words[2:])
        module = module.removesuffix('.py').replace('/', '.')
        if module == 'report':
            module, rest = f'report.{rest[0]}', rest[1:]
        if not module.startswith('train_'):
            parser_of(module).parse_args(rest)
            return
        args = parsed([f'{module}.py', *rest], monkeypatch)
        if module in ('train_lm', 'train_dense'):
            importlib.import_module(module).read_methods(args)
    else:
        assert words[0] in ('bash', 'export', 'python', 'sbatch', 'torchrun')
        assert all((ROOT / word).exists() for word in words if re.fullmatch(r'[\w/]+\.(py|sh)', word))


@pytest.mark.parametrize(
    'command',
    [
        'python train_ka.py --ka_mode nonsense --t_name resnet8 --t_model x',
        'python train_ka.py --ka_mode cfl --ka_args nonsense=1 --t_name resnet8 --t_model x',
        'python train_dml.py --kd_mode nonsense --net_names resnet8 resnet8',
        'python train_dfkd.py --kd_mode nonsense --t_name resnet8 --t_model x --s_name resnet8',
        'torchrun --nproc_per_node=2 train_kd.py --kd_mode nonsense --s_name resnet8',
    ],
)
def test_a_wrong_command_would_be_noticed(monkeypatch, capsys, command):
    with pytest.raises((SystemExit, UserError)):
        test_the_commands_are_right(command.split(), monkeypatch)


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.stem)
def test_links_and_files_exist(page):
    for target in re.findall(r'\]\(([^)#]+?)(?:#[\w-]+)?\)', TEXT[page]):
        assert target.startswith('http') or (page.parent / target).exists(), target
    for path in re.findall(r'`((?:[\w.]+/)*[\w.]+\.(?:py|sh|toml))`', TEXT[page]):
        places = [ROOT / folder / path for folder in ('', 'kd_losses', 'tools/gpu')]
        assert path in ('kd_losses/mine.py', 'tests/methods/mine.py') or any(
            place.exists() for place in places
        ), path


def test_every_table_is_linked():
    """From docs/results.md, or from the page that tells of it."""
    told = ' '.join(TEXT.values())
    for path in ROOT.glob('results/*/table.md'):
        assert f'results/{path.parent.name}/table.md)' in told, path.parent.name


def test_every_link_to_a_difference_has_its_line():
    there = set(re.findall(r'<a id="(\w+)">', TEXT[ROOT / 'docs' / 'differences.md']))
    assert set(re.findall(r'differences\.md#(\w+)\)', TEXT[ROOT / 'docs' / 'methods.md'])) <= there
    rows = METHODS.keys() | KA_METHODS.keys() | LM.keys() | DFKD.keys() | DENSE.keys()
    assert there <= rows | {path.stem for path in ROOT.glob('*_losses/[!_]*.py')}


def test_the_table_of_methods_says_who_trains_a_loss_and_where_more_is_said():
    """Of losses without a row, too, and what was found in published code of the method."""
    lines = {line.split('`')[1]: line for line in pages.methods_page().splitlines() if '](../' in line}
    for name, tool in (('c2kd', 'sequences'), ('libs', 'sequences'), ('lsp', 'graphs')):
        line = lines[f'kd_losses/{name}.py']
        assert f'../tools/{tool}.py' in line and f'differences.md#{name})' in line
    assert '../tools/fedka.py' in lines['ka_losses/fedka.py'] and 'errata.md' in lines['ka_losses/fedka.py']
    assert 'tools/' not in lines['kd_losses/ld.py'] and 'errata.md' not in lines['adain']
    assert 'errata.md' in lines['mlkd'] and 'patch tokens' in lines['vitkd']
    assert ' tokens,' in lines['minillm'] and 'patch' not in lines['minillm']


def test_the_readme_counts_what_is_verified():
    """Rows of docs/differences.md, a method of two tables once; cross-entropy alone is no loss of ours."""
    verified, column = {}, 1
    for line in TEXT[ROOT / 'docs' / 'differences.md'].splitlines():
        cells = line.strip('| ').split(' | ')
        if 'verified against' in cells:
            column = cells.index('verified against')
        elif name := re.match(r'(?:<a id="|`(?:\w+/)?)(\w+)', cells[0]) if line.startswith('| ') else None:
            verified.setdefault(name[1], cells[column])
    verified = {name: said for name, said in verified.items() if said != 'no loss of its own'}
    authors = [name for name, said in verified.items() if said.startswith("authors' code")]
    for counted in (f'{len(verified)} losses and recipes: ', f'{len(authors)} of them against their authors'):
        assert counted in TEXT[PAGES[0]].replace('\n', ' '), f'README.md must say: {counted}'
    page = (ROOT / 'docs' / 'index.html').read_text()
    shown = re.search(r'id="count"[^>]*>(\d+) methods', page)[1]
    assert f'({shown} with their variants)' in TEXT[PAGES[0]], 'README.md counts the page otherwise'


def test_the_followed_step_exists():
    """At most nine jumps, and every name is in its file."""
    section = TEXT[ROOT / 'docs' / 'extending.md'].split('## Follow one step')[1]
    rows = re.findall(r'^\| \d+ \| `([\w/]+\.py)` \| (.*?) \|', section, re.M)
    assert 5 <= len(rows) <= 9
    for path, names in rows:
        for name in re.findall(r'`([\w.]+)`', names):
            where = ast.parse((ROOT / path).read_text())
            for part in name.split('.'):
                where = next(node for node in where.body if getattr(node, 'name', '') == part)


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.stem)
def test_things_are_called_by_their_names(page):
    """Not the numbers of goals, not nicknames."""
    text = re.sub(r'`[^`\n]*`', '', TEXT[page])  # an argument may be called T2
    assert not re.search(r'seed zoo' if page.stem == 'gpu' else r'seed zoo|\b[TL]\d{1,2}\b', text)


LISTS = [
    ('train_kd', '--kd_mode', 'rkd'),
    ('train_dml', '--kd_mode', 'dml'),
    ('train_ka', '--ka_mode', 'cfl'),
    ('train_lm', '--kd_mode', 'gkd'),
    ('train_dense', '--kd_mode', 'cwd'),
    ('train_dfkd', '--kd_mode', 'cmi'),
]


@pytest.mark.parametrize('name,flag,method', LISTS)
def test_list_prints_every_method(script, name, flag, method):
    done = script(name, flag, 'list')
    assert done.code == 0, done.err
    (line,) = [line for line in done.out.splitlines() if line.startswith(f'{method} ')]
    assert re.search(r'\d{4}; ', line), line
    assert max(map(len, done.out.splitlines())) <= 110
    assert len(script(name, '--help').out.splitlines()) < 185


def test_what_a_list_says_of_a_method(script):
    text = re.sub(r'\n {24}', ' ', script('train_kd', '--kd_mode', 'list').out)
    assert 'Park et al., CVPR 2019; embeddings, relations in the batch; w_dist=25.0, w_angle=50.0\n' in text
    assert re.search(r'^ab +10  Heo et al., .*margin=2.0', text, re.M), "what the row's build sets"


@pytest.mark.parametrize(
    'words,code', [('', 2), ('nonsense', 2), ('table', 2), ('--help', 0), ('ka --help', 0)]
)
def test_report_explains_itself_and_refuses_in_one_line(words, code):
    done = fresh.run('-m', 'report', *words.split())
    assert done.returncode == code and done.stderr.count('\n') == (code > 0), done.stderr
