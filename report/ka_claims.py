"""Settings side by side: the same amalgamation methods with other teachers or lengths, over seeds.

A setting is a folder of results; in each, a method is compared with `concat` seed by seed: teachers, first
weights and batches of a seed are the same for all methods.
"""

import statistics
from pathlib import Path

from report.ka_rows import is_of_a_tool
from report.plot import pyplot
from report.table import spread

ENSEMBLE = 'the teachers, raw logits'


def settings(results: list[dict]) -> dict[str, list[dict]]:
    """{experiment: its runs}, where at least two have concat with several seeds; otherwise nothing."""
    found = {}
    for r in results:
        if 'parts' in r and not is_of_a_tool(r):
            found.setdefault(r['experiment'], []).append(r)
    told = {name: runs for name, runs in found.items() if len(by_seed(runs, 'top1').get('concat', {})) > 1}
    return told if len(told) > 1 else {}


def by_seed(runs: list[dict], figure: str) -> dict[str, dict[int, float]]:
    """{method: {seed: a figure of the last epoch}}; 'parts': the mean of the parts' accuracies."""
    found = {}
    for r in runs:
        ensemble = r['method'] == 'ensemble'
        if ensemble and 'A' not in r['ensembles']:
            continue
        said = r['ensembles']['A'] if ensemble else r['last']
        if figure == 'parts':
            value = statistics.mean(said[f'part{i}'] for i in range(1, len(r['parts']) + 1))
        else:
            value = said[figure]
        found.setdefault(ENSEMBLE if ensemble else r['method'], {})[r['seed']] = value
    return found


def tables(results: list[dict]) -> list[tuple[str, list[list]]]:
    """Two tables, of joint and of part accuracy; none without several settings."""
    told = settings(results)
    names = {'top1': 'Joint accuracy', 'parts': 'Accuracy inside the part, mean over parts'}
    made = []
    for figure, name in names.items() if told else ():
        columns = {setting: by_seed(runs, figure) for setting, runs in told.items()}
        rows = [['', *columns]]
        rows += [[method, *(cell(column, method) for column in columns.values())] for method in order(told)]
        made.append((f'{name}; in brackets the difference from concat of the same seed', rows))
    return made


def order(told: dict[str, list[dict]]) -> list[str]:
    """The references, concat, then the others by their mean joint accuracy over all settings."""
    columns = [by_seed(runs, 'top1') for runs in told.values()]
    means = {}
    for column in columns:
        for method, values in column.items():
            means.setdefault(method, []).append(statistics.mean(values.values()))
    first = [ENSEMBLE, 'scratch', 'concat']
    rest = sorted(means.keys() - set(first), key=lambda method: -statistics.mean(means[method]))
    return [method for method in first if method in means] + rest


def cell(column: dict[str, dict[int, float]], method: str) -> str:
    values = column.get(method, {})
    if not values:
        return ''
    text = spread(list(values.values()))
    both = [seed for seed in values if seed in column['concat']]
    if method == 'concat' or not both:
        return text
    ahead = [values[seed] - column['concat'][seed] for seed in both]
    deviation = f' +- {statistics.stdev(ahead):.1f}' if len(ahead) > 1 else ''
    return f'{text} ({statistics.mean(ahead):+.1f}{deviation})'


def figure(results: list[dict], path: Path) -> bool:
    """A panel per setting, a dot per run; the references as lines. False where nothing can be compared."""
    told = settings(results)
    if not told:
        return False
    if not (plt := pyplot('no figure:')):
        return False

    lines = {ENSEMBLE: '0.5', 'scratch': 'tab:green'}
    methods = [method for method in order(told) if method not in lines][::-1]
    fig, panels = plt.subplots(
        1, len(told), figsize=(2.2 + 2.1 * len(told), 3.6), sharey=True, layout='constrained'
    )
    drawn = {}
    for axes, (setting, runs) in zip(panels, told.items()):
        values = by_seed(runs, 'top1')
        for height, method in enumerate(methods):
            seen = list(values.get(method, {}).values())
            axes.plot(seen, [height] * len(seen), 'o', color='tab:blue', markersize=4)
        for method, colour in lines.items():
            if method in values:
                drawn[f'{method}, mean'] = axes.axvline(
                    statistics.mean(values[method].values()), color=colour
                )
        axes.set(title=setting, xlabel='joint accuracy (%)')
        axes.grid(alpha=0.3)
    panels[0].set_yticks(range(len(methods)), methods)
    if drawn:
        fig.legend(drawn.values(), drawn, loc='outside lower center', ncols=2, frameon=False, fontsize=9)
    fig.savefig(path, dpi=110)
    plt.close(fig)
    return True
