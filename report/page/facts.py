"""What the page says of a method, gathered from its row, its file, docs/differences.md and docs/pairs.md.

Every row of every table in methods/ is an entry, whatever tables there are, and so is every loss file that no
row uses. References without a loss of their own (cross-entropy, images made before) are none.
"""

import ast
import importlib
import inspect
import re
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from dataset.views import VIEWS
from engine import listing
from report.pairs import PAIRS, verdicts

ROOT = Path(__file__).parent.parent.parent
ORDER = ('kd', 'peers', 'lm', 'ka', 'dfkd')  # files of methods/; further ones follow
PARADIGMS = {
    'kd': 'teacher and student',
    'self': 'self-distillation',
    'peers': 'networks teach each other',
    'lm': 'language models',
    'dense': 'dense prediction',
    'ka': 'amalgamation',
    'dfkd': 'without data',
    'copy': 'losses to copy',
}
SCRIPTS = {'kd': 'train_kd.py', 'self': 'train_kd.py', 'peers': 'train_dml.py'}
NEEDS = {
    'logits': 'logits',
    'maps': 'maps',
    'embeddings': 'embeddings',
    'labels': 'labels',
    'memory': 'memory',
    'views': 'extra views',
    'gradient': "teacher's gradient",
}
# what is read by name: of Feats, of a batch, of a loss's arguments
FIELDS = {'out': 'logits', 'outs': 'logits', 'feat': 'embeddings', 'feats': 'embeddings', 'hid': 'embeddings',
          'fm': 'maps', 'fms': 'maps', 'pres': 'maps', 'tokens': 'maps', 'target': 'labels',
          'targets': 'labels', 'index': 'memory'}  # fmt: skip
# arguments of losses that no row feeds
OTHERS = {'tok': 'maps', 'toks': 'maps', 'seqs': 'maps', 'seq': 'maps', 'dec': 'maps', 'enc': 'maps',
          'cross': 'maps', 'patch': 'maps', 'patches': 'maps', 'frm': 'maps', 'ctx': 'embeddings',
          'cls': 'embeddings', 'clss': 'embeddings'}  # fmt: skip
STORE = re.compile(r"register_buffer\(\s*f?'\w*(queue|memory|bank)|^class \w*(Queue|Memory|Bank)", re.M)
VERIFIED = {
    'authors': "authors' code",
    'reference': 'reference code',
    'formula': 'the formula only',
    'vector': "our specification's vector",
}


@dataclass
class Entry:
    """One method of the page."""

    key: str  # the name of its page
    name: str
    paradigm: str
    path: Path
    row: object = None
    doc: 'Doc' = None
    needs: set = field(default_factory=set)
    taps: dict = field(default_factory=dict)
    verified: tuple = ('', '')  # (what is said, kind)
    difference: str = ''
    pairs: dict | None = None
    runs: list = field(default_factory=list)  # see outcomes.py
    cost: dict | None = None
    benches: list = field(default_factory=list)

    @property
    def source(self) -> str:
        return self.path.read_text()

    @property
    def lines(self) -> int:
        return self.source.count('\n')

    @property
    def place(self) -> str:
        return str(self.path.relative_to(ROOT))

    @property
    def year(self) -> str:
        found = re.findall(r'\b(?:19|20)\d\d\b', listing.short(self.doc.paper) or '')
        found = found or re.findall(r'\b(?:19|20)\d\d\b', self.doc.paper)
        return found[0] if found else ''

    @property
    def script(self) -> str:
        """The script that trains it, '' if none does."""
        if self.row is None:
            return ''
        name = SCRIPTS.get(self.paradigm, f'train_{self.paradigm}.py')
        return name if (ROOT / name).exists() else ''


@dataclass
class Doc:
    """A module docstring, cut into its parts."""

    title: str
    paper: str
    formulas: list  # [('text' or 'formula', paragraph)] in order, as the next three
    tap: list
    differences: list
    source: list
    use: list  # lines without >>>


# ------------------------------------------------------------------------------------------------ entries


def entries(pairs_text: str | None = None) -> list[Entry]:
    """Every method; pairs_text: docs/pairs.md."""
    said = verdicts(pairs_text if pairs_text is not None else (ROOT / 'docs' / 'pairs.md').read_text())
    verified = differences()
    made, used = [], set()
    for stem, rows in tables():
        for name, row in rows.items():
            module = listing.module_of(name, row)
            if not module:
                continue
            used.add(Path(module.__file__).name)
            alone = stem == 'kd' and not row.needs.teacher
            made.append(Entry(name, name, 'self' if alone else stem, Path(module.__file__), row))
    for path in sorted(ROOT.glob('*_losses/[!_]*.py')):
        if path.name not in used:
            paradigm = path.parent.name.removesuffix('_losses')
            made.append(Entry(path.stem, path.stem, 'copy' if paradigm == 'kd' else paradigm, path))
    seen = set()
    for entry in made:
        if entry.key in seen:  # the first table keeps the name
            entry.key = f'{entry.name}-{entry.paradigm}'
        seen.add(entry.key)
        entry.doc = parts_of(entry.path)
        entry.needs = needs_of(entry)
        entry.taps = taps_of(entry)
        text, entry.difference = verified.get(entry.name) or verified.get(entry.place) or ('', '')
        if other := re.match(r'as (\w+)$', text):
            text = verified.get(other[1], (text,))[0]
        entry.verified = (text or said_by_source(entry.doc), kind_of(text, entry.doc))
        entry.pairs = dict(zip(PAIRS, said[entry.name])) if entry.key in said and entry.row else None
    return made


def tables() -> list[tuple[str, dict]]:
    """[(file of methods/, its table)]: dicts in capitals whose rows have a loss and a feed."""
    stems = [path.stem for path in sorted((ROOT / 'methods').glob('[!_]*.py'))]
    found, seen = [], set()
    for stem in sorted(stems, key=lambda s: (ORDER.index(s) if s in ORDER else len(ORDER), s)):
        for name, table in vars(importlib.import_module(f'methods.{stem}')).items():
            if name.isupper() and isinstance(table, dict) and table and id(table) not in seen:
                if all(hasattr(row, 'loss') and hasattr(row, 'feed') for row in table.values()):
                    seen.add(id(table))
                    found.append((stem, table))
    return found


@cache
def parts_of(path: Path) -> Doc:
    text = ast.get_docstring(ast.parse(path.read_text()))
    title, paper, *rest = text.split('\n\n')
    doc = Doc(joined(title), joined(paper), [], [], [], [], [])
    place = doc.formulas
    for paragraph in rest:
        head = re.match(r'(Tap|Differences|Source|Use):\s*', paragraph)
        if head:
            place = {'Tap': doc.tap, 'Differences': doc.differences, 'Source': doc.source, 'Use': doc.use}[
                head[1]
            ]
            paragraph = paragraph[head.end() :]
        if place is doc.use:
            doc.use += re.findall(r'(?:>>>|\.\.\.) ?(.*)', paragraph)
        elif paragraph.lstrip('\n').startswith('    '):
            place.append(('formula', paragraph))
        else:
            place.append(('text', joined(paragraph)))
    return doc


def joined(paragraph: str) -> str:
    return ' '.join(paragraph.split())


# ------------------------------------------------------------------------------------- what a method needs


def text_of(function) -> str:
    try:
        return inspect.getsource(function)
    except (TypeError, OSError):
        return ''


def feed_of(entry: Entry) -> str:
    """The feed's text, with what a row computes once per batch of the teacher."""
    own = getattr(entry.row, 'own', None)
    text = text_of(entry.row.feed) + text_of(getattr(own, 'once_per_batch', None))
    return re.sub(r'"""(.|\n)*?"""|#.*|len\([^()]*\)|torch\.no_grad', '', text)


def arguments_of(entry: Entry) -> list[str]:
    """Names of the arguments of the loss's forward, or of every public function where there is no class."""
    wanted = getattr(getattr(entry.row, 'loss', None), '__name__', None)
    found = []
    for node in ast.parse(entry.source).body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith('_') and wanted in (None, node.name):
            found += [f for f in node.body if isinstance(f, ast.FunctionDef) and f.name == 'forward']
    return [arg.arg for function in found for arg in function.args.args + function.args.kwonlyargs]


def needs_of(entry: Entry) -> set[str]:
    found = set()
    if entry.row is not None:
        feed = feed_of(entry)
        found = {
            FIELDS[name]
            for name in re.findall(r'\.(\w+)', feed)
            if name in FIELDS
            and name not in ('targets', 'feats')
            and (name, entry.paradigm) != ('tokens', 'lm')
        }
        needed, limits = (getattr(entry.row, part, None) for part in ('needs', 'limits'))
        views = [view for view in getattr(needed, 'views', ()) if view in VIEWS]
        if views or re.search(r'batch\.(teacher|student|written|sampled|rollouts)\(|another_view', feed):
            found.add('views')
        if re.search(r'memory|queue', str(getattr(limits, 'one_process', ''))):
            found.add('memory')
        if getattr(needed, 'image_gradient', False) or re.search(r'attack|grad|net_t\.(?!head)', feed):
            found.add('gradient')
        found |= {'gradient'} if entry.paradigm == 'dfkd' else set()
        found |= {'labels'} if getattr(entry.row, 'labels', False) else set()
        if entry.paradigm == 'dense' and re.search(r'\.(feat|pyramid|heads)\b', feed):
            found = found - {'embeddings'} | {'maps'}
    if not found & {'logits', 'maps', 'embeddings'}:
        words = {re.sub(r'_?\d*(_s|_t)?(_strong|_pair|_weak)?$', '', name) for name in arguments_of(entry)}
        known = FIELDS | OTHERS
        found |= {known[word] for word in words if word in known}
    if STORE.search(entry.source):
        found.add('memory')
    if re.search(r'rotations|transformed copies|two random augmentations', ast.get_docstring(
            ast.parse(entry.source))):  # fmt: skip
        found.add('views')
    return found


STAGES = 3  # that the diagram draws


def taps_of(entry: Entry) -> dict:
    """{'s' or 't': {'out', 'feat', 'before', 1, 2, 3}}: places of student and teacher that the loss reads."""
    made = {'s': set(), 't': set()}
    if entry.row is not None:
        text = feed_of(entry)
        text = text if entry.paradigm != 'lm' else text.replace('.tokens', '')
        for before, name, index in re.findall(
            r'([\w\])]*)\.(outs?|feats?|hid|fms|pres|pyramid|tokens|extra)\b(\[[^\]]*\])?', text
        ):
            side = {'s': 's', 'raw': 's', 't': 't'}.get(before, 'st')
            if before.endswith(')'):
                side = 's' if 'student(' in text and 'teacher(' not in text else 'st'
            for which in side:
                made[which] |= places(name, index, getattr(entry.row, 'needs', None))
        if getattr(getattr(entry.row, 'needs', None), 'statistics', False):
            made['t'] |= {1, 2, 3}
    if 'extra' in feed_of(entry) if entry.row is not None else False:
        if 'logits' not in entry.needs:  # what was added to the student are maps
            made['s'] = made['s'] - {'out'} | {STAGES}
    if not made['s'] | made['t']:
        for name in arguments_of(entry):
            found = re.match(r'(outs?|feats?|fms?|maps?|tokens?|toks?|hid|seqs?|enc|cls|patche?s?)'
                             r'(?:\w*?_(s|t)\b)?', name)  # fmt: skip
            if found:
                word = {'tok': 'tokens', 'toks': 'tokens', 'token': 'tokens', 'hid': 'feat', 'seq': 'tokens',
                        'seqs': 'tokens', 'enc': 'tokens', 'cls': 'feat', 'map': 'fm', 'maps': 'fms',
                        'patch': 'tokens', 'patches': 'tokens'}.get(found[1], found[1])  # fmt: skip
                for which in found[2] or 's':
                    made[which] |= places(word, '[-1]' if word in ('fm', 'tokens') else '', None)
    if entry.paradigm in ('self', 'peers'):
        made = {'s': made['s'] | made['t'], 't': set()}
    return made


def places(name: str, index: str, needs) -> set:
    if name in ('out', 'outs', 'extra'):
        return {'out'}
    if name in ('feat', 'feats', 'hid'):
        return {'feat'}
    chosen = getattr(needs, 'stages', None)
    if chosen == (-1,) or index in ('[-1]', '[1]') and chosen is None:
        return {STAGES}
    if index == '[-2]':
        return {STAGES - 1}
    if layers := getattr(needs, 'layers', ()):
        return {k for k in layers if k <= STAGES}
    return set(range(1, STAGES + 1))


# ------------------------------------------------------------------------------------------- what is known


def differences() -> dict[str, tuple[str, str]]:
    """{method or file: (verified against, difference)} of docs/differences.md."""
    found = {}
    columns = []
    for line in (ROOT / 'docs' / 'differences.md').read_text().splitlines():
        if not line.startswith('|'):
            continue
        cells = [cell.strip() for cell in line.strip('|').split('|')]
        if cells[0] in ('method', 'to copy'):
            columns = cells
            continue
        values = dict(zip(columns[1:], cells[1:]))
        where = [re.sub(r'<a id="\w+"></a>', '', cells[0]), values.get('file', '')]
        said = (
            values.get('verified against', ''),
            next((values[c] for c in columns if 'difference' in c), ''),
        )
        for name in re.findall(r'`([\w./]+)`', where[0]) or re.findall(r'`([\w./]+)`', where[1]):
            found[name] = said
    return found


def kind_of(text: str, doc: Doc) -> str:
    """What a file is verified against, in one word."""
    source = doc.source[0][1] if doc.source else ''
    if text:
        if re.match(r"(the )?authors' code|heads and PHI-S: authors' code", text):
            return 'authors'
        if re.match(r'formula only|no vector', text):
            return 'formula'
        return 'reference'
    return 'vector' if source and not source.startswith('formula only') else 'formula'


def said_by_source(doc: Doc) -> str:
    source = doc.source[0][1] if doc.source else ''
    if source.startswith('formula only'):
        return 'formula only'
    if not source:
        return 'nothing yet: its file names no source'
    return "our specification's vector of the formula, as that source has it"


def constructor(entry: Entry) -> list[tuple[str, list[tuple[str, str, str]]]]:
    """[(class, [(argument, default, meaning)])] of the public classes that the entry uses."""
    wanted = getattr(getattr(entry.row, 'loss', None), '__name__', None)
    nodes = [n for n in ast.parse(entry.source).body if isinstance(n, ast.ClassDef) and n.name[0] != '_']
    chosen = [n for n in nodes if n.name == wanted] or [n for n in nodes if wanted is None] or nodes[:1]
    made = []
    for node in chosen:
        init = next((f for f in node.body if isinstance(f, ast.FunctionDef) and f.name == '__init__'), None)
        defaults = {}
        if init:
            args = init.args.args[1:]
            given = init.args.defaults
            defaults = {a.arg: '' for a in args}
            defaults |= {a.arg: ast.unparse(d) for a, d in zip(args[len(args) - len(given) :], given)}
            defaults |= {
                a.arg: ast.unparse(d) for a, d in zip(init.args.kwonlyargs, init.args.kw_defaults) if d
            }
        rows = []
        for names, meaning in described(ast.get_docstring(node) or ''):
            values = [defaults.pop(name, '') for name in names]
            rows.append((', '.join(names), ', '.join(dict.fromkeys(v for v in values if v)), meaning))
        rows += [(name, default, '') for name, default in defaults.items()]
        if rows:
            made.append((node.name, rows))
    return made


def described(doc: str) -> list[tuple[list[str], str]]:
    """[(names, meaning)] of the part `Args:` of a class's docstring."""
    block = re.search(r'^Args:\n((?:    .*\n?|\n)+)', doc, re.M)
    found = []
    for line in (block[1] if block else '').splitlines():
        head = re.match(r'    ([\w*]+(?:, [\w*]+)*): (.*)', line)
        if head:
            found.append((head[1].split(', '), head[2]))
        elif line.strip() and found:
            found[-1] = (found[-1][0], f'{found[-1][1]} {line.strip()}')
    return found
