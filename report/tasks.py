"""Table and figure of tools/sequences.py or tools/graphs.py: `python -m report tasks results/digits`.

Reads every result below the folder and writes curves.png there: the test figure per epoch, mean over seeds,
and the seeds one by one. The table is printed; docs/ have it between `<!-- tasks/NAME:begin -->` marks.
"""

import statistics
from pathlib import Path

from engine.errors import UserError
from engine.parser import Parser
from report.plot import pyplot_or_error
from report.table import by_recipe, in_brackets, read_results, spread

SCRIPTS = {
    'sequences': ('right', 'characters right', ('audio', 'alone', 'transcripts', 'libs', 'c2kd')),
    'graphs': ('top1', 'nodes right', ('teacher', 'alone', 'lsp')),
}


def groups_of(results: list[dict]) -> dict[str, list[dict]]:
    """{name of the row: its runs, one per seed}, in the order of the script's methods."""
    made = {}
    order = SCRIPTS[results[0]['script']][2]
    for r in sorted(results, key=lambda r: (order.index(r['method']), name_of(r), r['seed'])):
        made.setdefault(name_of(r), []).append(r)
    return {
        name + in_brackets(label): alike
        for name, runs in made.items()
        for label, alike in by_recipe(runs).items()
    }


def name_of(result: dict) -> str:
    """The method, what differs from the paper's weights, and how many labels there are, if not all."""
    recipe, method = result['recipe'], result['method']
    usual = {
        'labels': None,
        'lambda_kd': 100.0 if method == 'lsp' else 1.0,
        'ce_floor': 0.0,
        'w_frame': 10.0,
        'kernel': 'l1exp',
        'gamma': 0.01,
        'sigma': 100.0,
    }
    other = {key: recipe[key] for key in usual if key in recipe and recipe[key] != usual[key]}
    said = ', '.join(f'{key} {x if isinstance(x, str) else format(x, "g")}' for key, x in other.items())
    return f'{method} ({said})' if other else method


def mine(folder: str) -> list[dict]:
    results = [r for r in read_results([folder]) if r.get('script') in SCRIPTS]
    if not results:
        raise UserError(f'{folder}: no result of tools/sequences.py or tools/graphs.py')
    if len({r['script'] for r in results}) > 1:
        raise UserError(f'{folder}: has results of both tools/sequences.py and tools/graphs.py: name one run')
    return results


def text_of(folder: Path) -> str:
    results = mine(str(folder))
    key, what, _ = SCRIPTS[results[0]['script']]
    more = ('strings right, last epoch',) * (key == 'right')
    heads = ('network', 'parameters', f'{what}, last epoch', *more, 'seeds', 'epochs')
    lines = ['| ' + ' | '.join(heads) + ' |', '|---' * len(heads) + '|']
    for name, runs in groups_of(results).items():
        cells = [name, runs[0]['parameters'], spread([r['last'][key] for r in runs], 1)]
        cells += [spread([r['last']['whole'] for r in runs], 1)] if more else []
        cells += [len(runs), runs[0]['epochs']]
        lines.append('| ' + ' | '.join(map(str, cells)) + ' |')
    return '\n'.join(lines) + '\n\nPercent of the test set, mean and standard deviation over seeds.\n'


def figure(folder: Path) -> Path:
    plt = pyplot_or_error()
    results = mine(str(folder))
    _, what, _ = SCRIPTS[results[0]['script']]
    chart, axes = plt.subplots(figsize=(7.5, 5), layout='constrained')
    for k, (name, runs) in enumerate(groups_of(results).items()):
        colour = 'black' if name in ('audio', 'teacher') else f'C{k}'
        epochs = range(1, len(runs[0]['curve']) + 1)
        for run in runs:
            axes.plot(epochs, run['curve'], color=colour, alpha=0.3, linewidth=0.8)
        mean = [statistics.mean(values) for values in zip(*(run['curve'] for run in runs))]
        axes.plot(epochs, mean, color=colour, label=f'{name} ({len(runs)})')
    axes.set(xlabel='epoch', ylabel=f'{what}, test set, %')
    axes.grid(alpha=0.3)
    chart.legend(loc='outside lower center', title='network (seeds)', ncols=2)
    path = folder / 'curves.png'
    chart.savefig(path, dpi=130)
    plt.close(chart)
    return path


def main() -> int:
    parser = Parser(__doc__)
    parser.add_argument('folder', help='with results.json files of one of the two scripts')
    folder = Path(parser.parse_args().folder)
    print(text_of(folder))
    print(figure(folder))
    return 0
