"""Tables of the amalgamation tools, whose results hold their rows: tools/subtask.py and others.

A row is {"row": name, column: number, ...}. Runs that differ in the seed only are joined, mean +- deviation.
"""

from report.table import spread


def is_of_a_tool(result: dict) -> bool:
    return isinstance(result.get('table'), list)


def tables(results: list[dict]) -> list[tuple[str, list[list]]]:
    """[(title, rows)]: one per tool, data, teachers and title."""
    groups = {}
    for r in filter(is_of_a_tool, results):
        key = r['script'], r['data'], r.get('teacher') or '', r.get('title') or ''
        groups.setdefault(key, []).append(r)
    return [(title_of(runs[0]), joined(runs)) for runs in groups.values()]


def title_of(result: dict) -> str:
    return f'{result["script"]}, {result["data"]}: {result["title"]}'


def joined(runs: list[dict]) -> list[list]:
    """Head and rows; a row that only some runs have is the mean of these."""
    found, columns = {}, []
    for r in runs:
        for row in r['table']:
            columns += [key for key in row if key != 'row' and key not in columns]
            found.setdefault(row['row'], {})[r['seed']] = (
                row  # a reference may stand in several runs of a seed
            )
    rows = [['', *columns, 'seeds']]
    for name, seen in found.items():
        cells = [cell([row[key] for row in seen.values() if key in row]) for key in columns]
        rows.append([name, *cells, len(seen)])
    return rows


def cell(values: list) -> str:
    if not values:
        return ''
    if all(isinstance(x, int) for x in values) and len(set(values)) == 1:
        return f'{values[0]:,}'
    return spread(values)
