"""The tables of docs/transferability.md, from results/transferability/ and the benchmark."""

import json
from pathlib import Path

from report.speed import table

RESULTS = Path(__file__).parent.parent / 'results'
FOLDER = RESULTS / 'transferability'
UNSEEN = 'networks that saw none of the classes'


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
    kinds = made['by common classes']
    body += [
        (kind, number(k['mean'], 3), k['pairs']) for kind, k in kinds.items() if kind != 'the same classes'
    ]
    return table(('pairs of networks', 'mean similarity', 'pairs'), *body)


def title(ranking: dict, group: str) -> str:
    classes = f'{min(ranking["classes"])}-{max(ranking["classes"])}'
    what = 'classifier' if ranking['tune'] == 'head' else 'whole network'
    first = next(iter(ranking['correlation'][group].values()))
    return f'{classes}, {what}, {first["networks"]} networks'


def correlation() -> str:
    """Weighted tau and Kendall's tau with the accuracy; sorted by the mean of the former over unseen."""
    groups = [(r, g) for g in (UNSEEN, 'all networks') for r in rankings() if g in r['correlation']]
    names = list(dict.fromkeys(m for r, g in groups for m in r['correlation'][g]))

    def mean(metric, unseen_only=True):
        found = [r['correlation'][g].get(metric, {}).get('weighted') for r, g in groups if g == UNSEEN]
        found = [x for x in found if x is not None]
        return sum(found) / len(found) if found else -2

    head = ('metric', *(f'{"unseen" if g == UNSEEN else "all"}: {title(r, g)}' for r, g in groups))
    body = []
    for m in sorted(names, key=mean, reverse=True):
        taus = [r['correlation'][g].get(m, {}) for r, g in groups]
        body.append((f'`{m}`', *(f'{number(t.get("weighted"))} ({number(t.get("kendall"))})' for t in taus)))
    return table(head, *body)


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
