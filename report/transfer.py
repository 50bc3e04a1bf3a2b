"""The tables of docs/transferability.md, from results/transferability/ and the benchmark."""

import json
from pathlib import Path

from report.speed import table
from tools.transferability import agreement

RESULTS = Path(__file__).parent.parent / 'results'
FOLDER = RESULTS / 'transferability'


def read(name: str):
    return json.loads((FOLDER / name).read_text())


def rankings() -> list[dict]:
    return [read(path.name) for path in sorted(FOLDER.glob('ranking-*.json'))]


def number(x: float | None, digits: int = 2) -> str:
    return '-' if x is None else f'{x:.{digits}f}'


def networks() -> str:
    """Test accuracy by training set and architecture."""
    made = read('networks.json')
    columns = list(dict.fromkeys((n['net'], n['seed']) for n in made))
    sets = list(dict.fromkeys(n['trained_on'] for n in made))
    found = {(n['trained_on'], n['net'], n['seed']): n['top1'] for n in made}
    return table(
        ('trained on', *(f'{net}, seed {seed}' for net, seed in columns)),
        *((s, *(number(found.get((s, *c)), 1).replace('-', '') for c in columns)) for s in sets),
    )


def graph() -> str:
    """Mean cosines of attribution maps."""
    made = read('graph.json')['likeness']
    rows = [
        ('trained on the same', 'trained on others', made['by training set']),
        (
            'one architecture, trained on the same',
            'one architecture, trained on others',
            made['by training set, one architecture'],
        ),
        ('one architecture, whatever they were trained on', 'two architectures', made['by architecture']),
    ]
    body = []
    for same, other, k in rows:
        body += [(same, number(k['within'], 3), k['pairs_within'])]
        body += [(other, number(k['between'], 3), k['pairs_between'])]
    k = made['by training set']
    body += [('the nearest was trained on the same: share', number(k['nearest_in_group'], 3), '')]
    kinds = made['by common classes']
    body += [
        (kind, number(k['mean'], 3), k['pairs']) for kind, k in kinds.items() if kind != 'the same classes'
    ]
    return table(('pairs of networks', 'mean similarity', 'pairs'), *body)


def groups() -> list[tuple[str, dict]]:
    """(head of a column, {metric: agreement with the accuracy}) of every ranking and group of networks."""
    made = []
    for ranking in rankings():
        classes = f'{min(ranking["classes"])}-{max(ranking["classes"])}'
        unseen = [row for row in ranking['networks'] if row['seen'] is False]
        widths = [row['width'] for row in unseen]
        usual = max(set(widths), key=widths.count)
        narrow = [row for row in unseen if row['width'] == usual]
        for what, rows in (
            ('unseen', unseen),
            (f'unseen, {usual} dimensions', narrow),
            ('all', ranking['networks']),
        ):
            accuracy = [row['accuracy'] for row in rows]
            found = {m: agreement([row['metrics'][m] for row in rows], accuracy) for m in rows[0]['metrics']}
            made.append((f'classes {classes}, {what} ({len(rows)})', found))
    return made


def correlation() -> str:
    """Weighted tau, and Kendall's tau in brackets; sorted by the mean of the former over all columns."""
    columns = groups()

    def mean(metric: str) -> float:
        return sum(found[metric]['weighted'] for _, found in columns) / len(columns)

    body = [
        (f'`{m}`', *(f'{found[m]["weighted"]:.2f} ({found[m]["kendall"]:.2f})' for _, found in columns))
        for m in sorted(columns[0][1], key=mean, reverse=True)
    ]
    return table(('metric', *(head for head, _ in columns)), *body)


def speed() -> str:
    rows = json.loads((RESULTS / 'benchmarks-transferability.json').read_text())['rows']
    head = ('metric', 'size', 'seconds', 'plain form', 'times as fast')
    made = [(number(r['seconds']), number(r.get('seconds_plain')), number(r.get('ratio'))) for r in rows]
    return table(head, *((r['metric'], r['size'], *cells) for r, cells in zip(rows, made)))


PARTS = {
    'transferability/networks': networks,
    'transferability/graph': graph,
    'transferability/correlation': correlation,
    'transferability/speed': speed,
}
