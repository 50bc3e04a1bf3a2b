"""docs/index.html: the table of all methods."""

import json
from html import escape

from report.page.facts import NEEDS, PARADIGMS, VERIFIED, Entry
from report.page.outcomes import Experiment
from report.page.shared import chip, document, options, paradigm, text, unlike
from report.pairs import PAIRS

ORDERS = {
    '': 'in order',
    'name 1': 'by name',
    'year -1': 'newest first',
    'gain -1': 'largest gain first',
    'cost 1': 'cheapest step first',
    'memory 1': 'least memory first',
    'lines 1': 'shortest file first',
    'paradigm 1': 'by paradigm',
    'year 1': 'oldest first',
    'gain 1': 'smallest gain first',
    'cost -1': 'dearest step first',
    'memory -1': 'most memory first',
    'lines -1': 'longest file first',
    'name -1': 'by name, backwards',
    'paradigm -1': 'by paradigm, backwards',
}
COLUMNS = (  # (sorted by, word, class)
    ('name', 'Method', ''),
    ('paradigm', 'Paradigm', 'wide'),
    ('year', 'Year', 'num'),
    ('', 'Needs', ''),
    ('', 'Verified against', 'wide'),
    ('', 'Unlike', 'wide'),
    ('gain', 'Gain', 'num'),
    ('cost', 'Step', 'num'),
    ('memory', 'MiB', 'num'),
    ('lines', 'Lines', 'num'),
)
NOTHING = {
    'key': '',
    'label': 'No table yet',
    'metric': '',
    'reference': '',
    'smoke': False,
    'digits': 2,
    'late': False,
    'm': {},
}
MARKS = {'works': '●', 'adapter': '◐', 'refuses': '<span class="no">○</span>'}


def page(entries: list[Entry], found: list[Experiment]) -> str:
    there = {e.paradigm: paradigm(e) for e in entries}
    years = sorted({e.year for e in entries if e.year}, reverse=True)
    runs = [run for e in found if (run := table_of(e, entries))['m']] or [NOTHING]
    return document(
        'index', 'Knowledge Zoo',
        'Losses of knowledge distillation and amalgamation for PyTorch, searchable and compared.',
        files=len({e.path for e in entries}),
        rows=sum(e.row is not None for e in entries),
        count=len(entries),
        tables=options({i: run['label'] for i, run in enumerate(runs)}),
        orders=options(ORDERS),
        needs=''.join(
            f'<button class="tri" data-on="0" data-need="{key}">{word}</button>'
            for key, word in NEEDS.items()
        ),
        paradigms=options(dict(sorted(there.items(), key=lambda item: place(item[0])))),
        verified=options(VERIFIED),
        pairs=options({kind: unlike(kind) for kind in PAIRS}),
        differ=', '.join(map(unlike, PAIRS)),
        years=options({year: year for year in years}),
        head=''.join(heading(*column) for column in COLUMNS),
        body=''.join(line(entry, found[0] if found else None) for entry in entries),
        data=json.dumps({'runs': runs}, separators=(',', ':'), ensure_ascii=False).replace('<', '\\u003c'),
    )  # fmt: skip


def place(family: str) -> int:
    return list(PARADIGMS).index(family) if family in PARADIGMS else len(PARADIGMS)


def heading(key: str, word: str, kind: str) -> str:
    shown = f' class="{kind}"' if kind else ''
    if not key:
        return f'<th scope="col"{shown}>{word}</th>'
    return f'<th scope="col"{shown} data-key="{key}"><button>{word}</button></th>'


def table_of(e: Experiment, entries: list[Entry]) -> dict:
    """What the page's script knows of a table of results."""
    return {
        'key': e.key, 'label': e.label, 'metric': e.metric, 'reference': e.reference, 'smoke': e.smoke,
        'digits': 3 if e.better < 0 else 2,
        'late': 'kd' in e.paradigms,  # a curve that is shorter began later, after phases without a figure
        'm': {entry.key: outcome(e, entry.name) for entry in entries if e in entry.runs},
    }  # fmt: skip


def outcome(e: Experiment, name: str) -> dict:
    """Values, curve, those of the reference, teachers, gain."""
    gain = e.gain(name)
    return {
        'v': rounded(e.values[name].values()),
        'c': e.curves[name],
        'a': rounded((e.alone[name] or {}).values()),
        'b': e.alone_curves[name],
        't': rounded(e.teachers[name]),
        'g': gain and [round(gain[0], 4), None if gain[1] is None else round(gain[1], 4), gain[2]],
    }


def rounded(values) -> list[float]:
    return [round(value, 4) for value in values]


def line(entry: Entry, first: Experiment | None) -> str:
    """A row of the table; what it is searched and sorted by stands in data-."""
    pairs, cost = entry.pairs or {}, entry.cost or {}
    works = [kind for kind, said in pairs.items() if said in ('works', 'adapter')]
    works += ['all'] if pairs and len(works) == len(PAIRS) else []
    needs = [key for key in NEEDS if key in entry.needs]
    known = {
        'k': entry.key, 'p': entry.paradigm, 'y': entry.year, 'n': ' '.join(needs), 'v': entry.verified[1],
        'u': ' '.join(works), 'c': cost.get('ratio', ''), 'm': cost.get('mib', ''), 'l': entry.lines,
        's': ' '.join((entry.name, entry.doc.title, entry.doc.paper, paradigm(entry), entry.path.stem)),
    }  # fmt: skip
    title = (
        f'<a href="page/{entry.key}.html">{entry.name}</a><span>{text(entry.doc.title.rstrip("."))}</span>'
    )
    cells = [
        '<td class="pick noprint">'
        f'<input type="checkbox" aria-label="Compare {entry.key}" autocomplete="off"></td>',
        f'<td class="who">{title}</td>',
        cell('paradigm', 'wide', 'Paradigm', paradigm(entry)),
        cell('year', 'num', 'Year', entry.year),
        cell('needs', 'tags', 'Needs', ''.join(chip(NEEDS[key]) for key in needs)),
        cell('verified', 'wide', 'Verified against', text(VERIFIED[entry.verified[1]])),
        cell('unlike', 'wide', 'Unlike networks', marks(pairs)),
        cell('gain', 'num gain', 'Gain', gained(entry, first)),
        cell('cost', 'num', 'Step', f'{cost["ratio"]:.2f}×' if cost else ''),
        cell('memory', 'num', 'MiB', f'{cost["mib"]:.0f}' if cost else ''),
        cell('lines', 'num', 'Lines', str(entry.lines)),
    ]
    data = ''.join(f' data-{key}="{escape(str(value))}"' for key, value in known.items())
    return f'<tr{data}>{"".join(cells)}</tr>\n'


def gained(entry: Entry, e: Experiment | None) -> str:
    """The gain in the table that is shown first, as the page's script writes it for the others."""
    gain = e.gain(entry.name) if e in entry.runs else None
    if not gain:
        return ''
    mean, deviation, seeds = gain
    digits = 3 if e.better < 0 else 2
    spread = f'± {deviation:.{digits}f}, {seeds} seeds' if deviation is not None else 'one seed'
    sign, kind = ('−', 'down') if mean < 0 else ('+', 'up')
    return f'<b class="{kind}">{sign}{abs(mean):.{digits}f}</b> <small>{spread}</small>'


def cell(fact: str, kind: str, label: str, inside: str) -> str:
    return f'<td class="{kind}" data-f="{fact}" data-l="{label}">{inside}</td>'


def marks(pairs: dict) -> str:
    """A sign per pair of networks, and in words what it says."""
    if not pairs:
        return ''
    said = ', '.join(f'{unlike(kind)}: {word}' for kind, word in pairs.items())
    shown = ''.join(MARKS.get(word, '?') for word in pairs.values())
    return f'<span class="pairs" role="img" aria-label="{said}" title="{said}">{shown}</span>'
