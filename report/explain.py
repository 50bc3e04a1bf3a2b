"""The tables of docs/few-shot.md and docs/explaining.md, from results/cifar10-seeds-rest/."""

import json
import statistics
from pathlib import Path

from report.speed import table

FOLDER = Path(__file__).parent.parent / 'results' / 'cifar10-seeds-rest'
WAYS = {'grafted': 'grafted', 'at once': 'all parts at once', 'alone': 'alone, from labels'}


def read(name: str) -> dict:
    return json.loads((FOLDER / f'{name}.json').read_text())


def few_shot() -> str:
    """Accuracy of each way, the mean over the seeds, per number of images."""
    made = read('graft')
    shots = made['recipe']['shots']

    def cell(way: str, n: int) -> str:
        found = [r['top1'] for r in made['rows'] if (r['way'], r['shots'], r['last']) == (way, n, True)]
        return f'{statistics.mean(found):.2f}'

    heads = [f'{n} image{"s" if n > 1 else ""} per class' for n in shots]
    rows = [(label, *(cell(way, n) for n in shots)) for way, label in WAYS.items()]
    level = f'{made["teacher_top1"]:.2f}'
    return table(('student', *heads), *rows, ('the teacher, all 50 000 images', *[level] * len(shots)))


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
    body = [(label, *(f'{made[way][key]:.2f}' for way in ways)) for key, label in names.items()]
    head = (
        'top-1 (distilled: with the classifier of the teacher)',
        *(f'{made[w]["top1"]:.2f}' for w in ways),
    )
    return table(('', 'from labels', 'distilled'), head, *body)


PARTS = {
    'few-shot/accuracy': few_shot,
    'explaining/tree': tree,
    'explaining/tree-accuracy': tree_accuracy,
    'explaining/knowledge': knowledge,
}
