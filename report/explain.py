"""Accuracy against images per class: `python -m report explain results.json... --out few-shot.png`.

The files are those of tools/graft.py, which may be of other seeds or other numbers of images, but of one
recipe otherwise. The tables of docs/few-shot.md and docs/explaining.md are made here, too, from
results/cifar10-seeds-rest/.
"""

import json
import statistics
from pathlib import Path

from engine.errors import UserError
from engine.parser import Parser
from report.plot import pyplot
from report.speed import table
from report.table import by_recipe

FOLDER = Path(__file__).parent.parent / 'results' / 'cifar10-seeds-rest'
WAYS = {'grafted': 'grafted', 'at once': 'all parts at once', 'alone': 'alone, from labels'}


def read(name: str) -> dict:
    return json.loads((FOLDER / f'{name}.json').read_text())


def grafts() -> list[dict]:
    return [read(path.stem) for path in sorted(FOLDER.glob('graft*.json'))]


def last_rows(results: list[dict], way: str) -> dict[int, list[dict]]:
    """{images per class: the results of this way}"""
    rows = [row for made in results for row in made['rows'] if row['way'] == way and row['last']]
    return {n: [r for r in rows if r['shots'] == n] for n in sorted({row['shots'] for row in rows})}


def few_shot() -> str:
    """Accuracy of each way, the mean over the seeds, per number of images."""
    results = grafts()
    found = {way: last_rows(results, way) for way in WAYS}
    shots = list(found['grafted'])
    steps = [found['at once'][n][0]['steps'] for n in shots]
    heads = [f'{n} image{"s" if n > 1 else ""} per class' for n in shots]
    rows = [
        (label, *(f'{statistics.mean(r["top1"] for r in found[way][n]):.1f}' for n in shots))
        for way, label in WAYS.items()
    ]
    level = f'{results[0]["teacher_top1"]:.1f}'
    body = table(
        ('top-1 of the student', *heads), *rows, ('the teacher, all images', *[level] * len(shots)),
        ('steps', *steps), ('seeds', *(len(found['grafted'][n]) for n in shots)),
    )  # fmt: skip
    return body + f'\nMeasured on {results[0]["test_images"]} test images.\n'


def tree() -> str:
    """Which classes share a block of the last level."""
    made = read('kdexplainer')
    return table(
        ('blocks, from the image on', 'classes'),
        *((' > '.join(group['blocks']), ', '.join(group['classes'])) for group in made['groups']),
    )


def tree_accuracy() -> str:
    made = read('kdexplainer')
    return table(
        ('', 'top-1'),
        ('teacher', f'{made["teacher_top1"]:.1f}'),
        ('the mixture, last epoch of the search', f'{made["search_top1"]:.1f}'),
        ('the tree, last epoch', f'{made["tree_top1"]:.1f}'),
        ('epochs of search, of the tree', '{epochs}, {tree_epochs}'.format(**made['recipe'])),
        ('training images, test images', f'{made["images"]}, {made["test_images"]}'),
        ('channels of the blocks, of the last level', '{width}, {last}'.format(**made['recipe'])),
        ('seed', made['seed']),
    )


def knowledge() -> str:
    """The numbers of both trainings."""
    made = read('knowledge')
    names = {
        'fore': 'concepts in the foreground, last epoch',
        'back': 'concepts in the background, last epoch',
        'ratio': 'share of the concepts that lie in the foreground',
        'fore_mean': 'distance at the most foreground concepts, mean over images',
        'fore_var': 'the same, variance',
        'fore_share': 'of the foreground concepts there ever were: still there',
        'back_share': 'of those of the background',
    }
    ways = ('labels', 'distilled')
    body = [(label, *(f'{made[way][key]:.3f}' for way in ways)) for key, label in names.items()]
    head = (
        'top-1 (distilled: with the classifier of the teacher)',
        *(f'{made[w]["top1"]:.2f}' for w in ways),
    )
    counted = f'{made["images_that_count"]} of {made["images"]}'
    return table(
        ('', 'from labels', 'distilled'), head, *body, ('images that count', counted, counted),
        *((name, made[key], made[key]) for name, key in (('epochs', 'epochs'), ('seed', 'seed'),
          ('training images', 'train_images'), ('test images for the accuracy', 'test_images'))),
    )  # fmt: skip


PARTS = {
    'few-shot/accuracy': few_shot,
    'explaining/tree': tree,
    'explaining/tree-accuracy': tree_accuracy,
    'explaining/knowledge': knowledge,
}


def few_shot_figure(results: list[dict], path: Path, log=print) -> None:
    """Accuracy against images per class; a dot per seed, a line through the means."""
    if not (plt := pyplot('no figure:', log)):
        return
    first = results[0]
    fig, axis = plt.subplots(figsize=(6.4, 4.2), layout='constrained')
    level = first['teacher_top1']
    axis.axhline(level, color='grey', linestyle='--', label=f'teacher, all images  {level:.1f}')
    ticks = set()
    for (way, label), mark in zip(WAYS.items(), 'os^'):
        found = {n: [row['top1'] for row in rows] for n, rows in last_rows(results, way).items()}
        ticks |= found.keys()
        means = [statistics.mean(values) for values in found.values()]
        (line,) = axis.plot(list(found), means, marker=mark, label=label)
        for n, values in found.items():
            axis.scatter([n] * len(values), values, s=10, color=line.get_color(), alpha=0.5)
    axis.set(xscale='log', xlabel='images per class', ylabel='test top-1 (%)', ylim=(0, 100))
    axis.set_xticks(sorted(ticks), list(map(str, sorted(ticks))))
    axis.minorticks_off()
    axis.set_title(f'{first["student"]} in {first["teacher"]}, {first["data"]}', fontsize=11)
    axis.grid(alpha=0.3)
    fig.legend(loc='outside right upper', frameon=False, fontsize=9)
    fig.savefig(path, dpi=130)
    plt.close(fig)
    log(f'figure: {path}')


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument('files', type=Path, nargs='+', metavar='FILE', help='results of tools/graft.py')
    parser.add_argument('--out', type=Path, required=True, metavar='PNG', help='where the figure goes')
    args = parser.parse_args()
    results = []
    for path in args.files:
        try:
            results.append(json.loads(path.read_text()))
        except (OSError, ValueError) as error:
            raise UserError(f'{path}: cannot be read as JSON ({error})') from None
        if not isinstance(results[-1], dict) or results[-1].get('script') != 'graft':
            raise UserError(f'{path}: no result of tools/graft.py')
    same = {(r['teacher'], r['student'], r['data'], r['first']) for r in results}
    if len(same) > 1:
        raise UserError(f'{args.files[0]} and the others: results of other networks or data')
    if len(recipes := by_recipe(results, ('shots', 'seeds'))) > 1:
        said = ' and '.join(', '.join(label) for label in recipes)
        raise UserError(f'results with {said}: no seeds of one run, name those of one recipe')
    runs = [run for r in results for run in {(row['seed'], row['shots']) for row in r['rows']}]
    if again := [run for run in runs if runs.count(run) > 1]:
        seed, shots = again[0]
        raise UserError(f'seed {seed} with {shots} per class is there twice: name one of its files')
    few_shot_figure(results, args.out)
