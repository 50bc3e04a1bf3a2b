"""Rewrite every generated file of the repository: `python -m report refresh`.

    imports and __all__ of kd_losses/, ka_losses/ ...      from their files
    the block of methods in example_train_script.sh        from the rows
    docs/methods.md, docs/pairs.md, docs/flags.md          from rows, trials, parsers
    docs/index.html, docs/page/*.html                      from rows, loss files, docs/ and results/
    results/*/table.md, table.csv, accuracy.png            from the result files beside them
    what stands between <!-- NAME:begin --> and <!-- NAME:end --> in README.md and docs/

With --check nothing is written: stale files are named, and the exit code is 1 if there are any. It trusts the
verdicts of docs/pairs.md about methods that are there (trying them takes half a minute).
"""

import re
from pathlib import Path

from engine.errors import UserError
from engine.parser import Parser
from engine.record import write_atomic
from report import code, dense, dfkd, explain, ka, lm, page, pages, pairs, speed, table, tasks, transfer

ROOT = Path(__file__).parent.parent
MARK = re.compile(r'<!-- ([\w/-]+):begin -->')


def texts(trust: bool) -> dict[Path, str]:
    """{file: its text as it must be}; trust: take the verdicts about pairs as they stand."""
    made = {folder / '__init__.py': code.package(folder) for folder in sorted(ROOT.glob('*_losses'))}
    script = ROOT / 'example_train_script.sh'
    marks = '# methods:begin (python -m report refresh)', '# methods:end'
    made[script] = code.between(script.read_text(), *marks, code.script_block(), script.name)
    docs = ROOT / 'docs'
    made |= {docs / 'methods.md': pages.methods_page(), docs / 'flags.md': pages.flags_page()}
    made[docs / 'pairs.md'] = pairs.page(*([known_verdict(docs / 'pairs.md')] if trust else []))
    for folder in result_folders():
        made |= tables_of(folder)
    for path in (ROOT / 'README.md', *sorted(docs.glob('*.md'))):
        text = made.get(path) or path.read_text()
        for name in MARK.findall(text):
            text = table.between(text, name, part(name), path.name)
        made[path] = text
    return made | page.texts(made[docs / 'pairs.md'])


def known_verdict(page: Path):
    said = pairs.verdicts(page.read_text()) if page.exists() else {}
    return lambda name, kind: said.get(name, ['?'] * len(pairs.PAIRS))[list(pairs.PAIRS).index(kind)]


def result_folders() -> list[Path]:
    return sorted(path for path in (ROOT / 'results').iterdir() if path.is_dir())


def tables_of(folder: Path) -> dict[Path, str]:
    """table.md of a folder of results, and table.csv of an amalgamation."""
    if made := ka.tables(ka.read_results([str(folder)])):
        return {folder / 'table.md': ka.text_of(made), folder / 'table.csv': ka.csv_of(made)}
    results = table.read_results([str(folder)])
    if {r.get('script') for r in results} & {'train_kd', 'train_dml'}:
        return {folder / 'table.md': table.table(results)}
    if dfkd.mine(results):
        return {folder / 'table.md': dfkd.table(results)}
    if dense.mine(results):
        return {folder / 'table.md': dense.text_of(dense.mine(results))}
    return {}


def part(name: str) -> str:
    """What belongs between the marks of this name."""
    kind, _, folder = name.rpartition('/')
    if name in (made := speed.PARTS | transfer.PARTS | explain.PARTS):
        return made[name]()
    results = ROOT / 'results' / folder
    if not results.is_dir():
        raise UserError(f'<!-- {name}:begin -->: there is no results/{folder}')
    if kind == 'lm':
        return lm.text_of(results)
    if kind == 'tasks':
        return tasks.text_of(results)
    if kind == 'summary':
        return table.summary(table.read_results([str(results)]))
    return tables_of(results)[results / 'table.md']


def stale_figures() -> list[Path]:
    """Figures that do not show the results beside them; the PNG says what it shows."""
    try:
        from PIL import Image
    except ImportError:
        return []
    stale = []
    for path in sorted((ROOT / 'results').glob('*/accuracy.png')):
        with Image.open(path) as image:
            if image.info.get('Source') != table.source_of_figure(table.read_results([str(path.parent)])):
                stale.append(path)
    return stale


def main() -> int:
    parser = Parser(__doc__)
    parser.add_argument('--check', action='store_true', help='write nothing; name what is stale')
    check = parser.parse_args().check
    made = texts(trust=check)
    stale = [path for path, text in made.items() if not path.exists() or path.read_bytes() != text.encode()]
    figures, left = stale_figures(), page.left_over(made)
    for path in [*stale, *figures, *left]:
        print(f'{"stale" if check else "written"}: {path.relative_to(ROOT)}')
    if check:
        return 1 if stale or figures or left else 0
    for path in stale:
        path.parent.mkdir(exist_ok=True)
        write_atomic(path, made[path].encode())
    for path in left:
        path.unlink()
    for path in figures:
        table.figure(table.read_results([str(path.parent)]), path)
    return 0
