"""Tables of the amalgamation tools, whose results hold their rows: tools/subtask.py and others.

A row is {"row": name, column: number, ...}. Runs that differ in the seed only are joined, mean +- deviation.
"""

from collections.abc import Iterable
from pathlib import Path

from report.plot import pyplot
from report.table import by_recipe, in_brackets, spread

OWN = ('teacher', 'select', 'topk')  # of a recipe: a seed has teachers of its own; rows say who is drawn


def is_of_a_tool(result: dict) -> bool:
    return isinstance(result.get('table'), list)


def tables(results: list[dict]) -> list[tuple[str, list[list]]]:
    """[(title, rows)]: one per tool, data, teachers, title and recipe."""
    return [(title_of(runs[0]) + ''.join(f', {text}' for text in label), joined(runs))
            for label, runs in experiments(results)]  # fmt: skip


def experiments(results: list[dict]) -> Iterable[tuple[tuple, list[dict]]]:
    """(what tells its recipe from the others of its title, runs that differ in the seed only)."""
    groups = {}
    for r in filter(is_of_a_tool, results):
        key = r['script'], r['data'], r.get('teacher') or '', r.get('title') or ''
        whole = r.get('recipe', {}) | {'epochs': r.get('epochs')}  # older results say the epochs only
        groups.setdefault(key, []).append(r | {'recipe': whole})
    for runs in groups.values():
        yield from by_recipe(runs, OWN).items()


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


def figure(results: list[dict], path: Path) -> bool:
    """What rows reach after each round, mean over seeds and every seed; False where no table has rounds."""
    curves, flat = {}, {}
    every = ((label, r['seed'], row) for label, runs in experiments(results)
             for r in runs for row in r['table'])  # fmt: skip
    for label, seed, row in every:
        name = row['row'] + in_brackets(label)
        rounds = {int(key.split()[1]): value for key, value in row.items() if key.startswith('round ')}
        if rounds:
            curves.setdefault(name, {})[seed] = rounds
        elif 'top-1 at the end' in row:
            flat.setdefault(name, {})[seed] = row['top-1 at the end']
    if not curves:
        return False
    if not (plt := pyplot('no figure:')):
        return False

    fig, axes = plt.subplots(figsize=(6.4, 4.6))
    for k, (name, seeds) in enumerate(curves.items()):
        for rounds in seeds.values():
            axes.plot(*zip(*sorted(rounds.items())), color=f'C{k}', alpha=0.25, linewidth=1)
        common = sorted(set.intersection(*(set(rounds) for rounds in seeds.values())))
        mean = [sum(rounds[x] for rounds in seeds.values()) / len(seeds) for x in common]
        axes.plot(common, mean, color=f'C{k}', label=f'{name}, {len(seeds)} seeds', marker='o', markersize=3)
    for name, seeds in flat.items():
        axes.axhline(sum(seeds.values()) / len(seeds), color='0.4', linestyle='--', label=name)
    axes.set_xlabel('round')
    axes.set_ylabel('top-1 after adaptation, %')
    axes.legend(fontsize=8, frameon=False, loc='upper center', bbox_to_anchor=(0.5, -0.14), ncol=2)
    fig.tight_layout()
    fig.savefig(path, dpi=110)
    plt.close(fig)
    return True
