"""One table and one figure of everything that was trained below a folder: `python -m report overview FOLDER`.

Made for `example_train_script.sh quick`: a teacher, a student alone, students with a teacher, students of
several teachers who know some classes each, a student without data. It writes overview.md and overview.png
into the folder. It reads results of train_base.py, train_kd.py, train_dfkd.py, and of train_ka.py those with
an accuracy over all classes; `python -m report table`, `ka`, `dense` and `tasks` show others.
"""

from pathlib import Path

from dataset.shapes import CLASSES, shapes
from engine.errors import UserError
from engine.parser import Parser

from . import ka as ka_report
from .plot import pyplot_or_error
from .table import alike_trained, read_results

WHAT = {  # what a student reads of its teachers, of the methods that quick shows; others are named only
    'st': "teacher's soft outputs",
    'at': "teacher's attention maps",
    'sp': "teacher's similarities",
    'concat': "both teachers' outputs",
    'layerwise': "both teachers' maps",
}


def by_kind(results: list[dict]) -> tuple[list[dict], list[dict], list[dict]]:
    """Networks trained with labels alone, students of one teacher, students of several teachers."""
    main = [r['data'] for r in results if r['script'] in ('train_kd', 'train_ka')]
    base = [r for r in results if r['script'] == 'train_base' and (not main or r['data'] in main)]
    kd = [r for r in results if r['script'] == 'train_kd']
    ka = [r for r in results if r['script'] == 'train_ka' and 'classes' in r]  # others have no joint accuracy
    # teachers that share classes are not put side by side
    ka = [r for r in ka if r['method'] != 'ensemble' or 'A' in r['ensembles']]
    kd.sort(key=lambda r: -r['last']['top1'])
    ka.sort(key=lambda r: (r['method'] != 'ensemble', r['method'] == 'scratch', -accuracy(r)))
    return base, kd, ka


def accuracy(r: dict) -> float:
    """Of the last epoch, in percent; of an ensemble: the teachers' outputs put side by side."""
    return r['ensembles']['A']['top1'] if r['method'] == 'ensemble' else r['last']['top1']


def reference(r: dict, others: list[dict], *keys: str) -> dict | None:
    """The first of others of its data, seed, recipe and of what else keys name."""
    same = (o for o in others if all(r.get(k) == o.get(k) for k in ('data', 'seed', *keys)))
    return next((o for o in same if alike_trained(r, o)), None)


def on(r: dict, several: bool) -> str:
    """What a row says of its data, where there are several sets."""
    return f', {r["data"]}' if several else ''


def rows(results: list[dict]) -> list[tuple[str, str, float, str]]:
    """(network, what it learns from, accuracy, how that compares)."""
    base, kd, ka = by_kind(results)
    several = len({r['data'] for r in (*base, *kd, *ka)}) > 1  # a student without data names it anyway
    baselines = [r for r in base if not r.get('classes')]
    alone = [reference(r, baselines, 'epochs', 'student') for r in kd]
    students, table = {r['student'] for r in kd}, []
    for r in sorted(base, key=lambda r: r in alone):
        if not r.get('classes'):
            who = f'{r["student"]} alone' if r['student'] in students else f'teacher, {r["student"]}'
            who += f', {r["epochs"]} epochs' if r['student'] in students and r not in alone else ''
            table.append((who + on(r, several), 'labels', accuracy(r), ''))
    for r, other in zip(kd, alone):
        gain = f'{accuracy(r) - accuracy(other):+.1f} points' if other else ''
        learns = f'labels, {WHAT.get(r["method"], "the teacher")}'
        table.append((f'{r["student"]} with {r["method"]}{on(r, several)}', learns, accuracy(r), gain))
    for r in base:
        if r.get('classes'):
            learns = f'labels of {", ".join(r.get("class_names") or map(str, r["classes"]))}'
            who = f'teacher of {len(r["classes"])} classes, {r["student"]}{on(r, several)}'
            table.append((who, learns, accuracy(r), 'on these'))
    scratch = [r for r in ka if r['method'] == 'scratch']
    for r in ka:
        labelled = reference(r, scratch, 'experiment')
        share = f'{100 * accuracy(r) / accuracy(labelled):.0f} % of the one with labels' if labelled else ''
        if r['method'] == 'ensemble':
            who, learns = 'these teachers together', 'nothing: the largest output wins'
        elif r['method'] == 'scratch':
            who, learns, share = f'{r["student"]} with labels', 'labels of all classes', ''
        else:
            who = f'{r["student"]} with {r["method"]}'
            learns = f'no labels, {WHAT.get(r["method"], "the teachers")}'
        table.append((who + on(r, several), learns, accuracy(r), share))
    for r in results:
        if r['script'] == 'train_dfkd':
            learns = f'no image: some are made, of a teacher of {r["data"]}'
            share = f'agrees with it on {r["last"]["agreement"]:.0f} %'
            table.append((f'{r["student"]} with {r["method"]}', learns, accuracy(r), share))
    return table


def text_of(table: list[tuple]) -> str:
    head = ('network', 'learns from', 'accuracy', '')
    cells = [head, *((name, learns, f'{top1:.1f} %', more) for name, learns, top1, more in table)]
    widths = [max(len(row[i]) for row in cells) for i in range(4)]
    lines = ['| ' + ' | '.join(cell.ljust(width) for cell, width in zip(row, widths)) + ' |' for row in cells]
    lines.insert(1, '|' + '|'.join('-' * (width + 2) for width in widths) + '|')
    return '\n'.join(lines) + '\n'


def draw(results: list[dict], path: Path, plt) -> None:
    """Panels: what the data look like; students of one teacher; of several; images that stand for data."""
    base, kd, ka = by_kind(results)
    made = sorted(path.parent.rglob('images/epoch*.png'))
    widths = [3.6] + [4.2] * (bool(kd) + bool(ka)) + [2.7] * bool(made)
    fig, axes = plt.subplots(
        1, len(widths), figsize=(sum(widths), 3.7), layout='constrained', squeeze=False, width_ratios=widths
    )
    axes = iter(axes[0])
    draw_images((kd or ka or results)[0]['data'], next(axes))
    if kd:
        draw_curves(base, kd, next(axes))
    if ka:
        draw_bars(ka, next(axes))
    if made:
        draw_made(made[-1], next(axes), plt)
    fig.savefig(path, dpi=160)
    plt.close(fig)


def draw_images(name: str, axis) -> None:
    """A row of images per class; only data that are rendered here are always at hand."""
    axis.axis('off')
    if not name.startswith('shapes'):
        return
    images, labels = shapes(100, seed=1)
    across, side = 5, images.shape[1] + 2
    for k, word in enumerate(CLASSES):
        for i, image in enumerate(images[labels == k][:across]):
            left, top = i * side, k * side
            axis.imshow(image, extent=(left, left + side - 2, top + side - 2, top), interpolation='nearest')
        axis.text(-4, k * side + side / 2, word, ha='right', va='center', fontsize=8)
    axis.set(xlim=(0, across * side), ylim=(len(CLASSES) * side, 0))
    axis.set_title(f'images of the {len(CLASSES)} classes', fontsize=10)


def draw_made(path: Path, axis, plt) -> None:
    """A quarter of the grid of images that a method has made."""
    grid = plt.imread(path)
    axis.imshow(grid[: grid.shape[0] // 2 + 1, : grid.shape[1] // 2 + 1], interpolation='nearest')
    axis.axis('off')
    method = path.parent.parent.name
    axis.set_title(f'no data: images that {method}\nmade of what a teacher knows', fontsize=10)


def draw_curves(base: list[dict], kd: list[dict], axis) -> None:
    students = {r['student'] for r in kd}
    for r in base:
        if r.get('classes'):
            continue
        if r['student'] in students:
            curve(axis, r, f'{r["student"]} alone', color='black', linewidth=2.4)
        else:
            axis.axhline(accuracy(r), color='grey', linestyle='--', linewidth=1.2)
            axis.text(
                1, accuracy(r) + 1, f'teacher, {r["student"]}  {accuracy(r):.1f}', fontsize=8, color='dimgrey'
            )
    for r in kd:
        curve(axis, r, f'with {r["method"]}', linewidth=1.8)
    axis.set(xlabel='epoch', ylabel='test accuracy (%)', ylim=(0, 104))
    axis.set_title('one teacher: a student alone and taught', fontsize=10)
    axis.legend(loc='lower right', fontsize=8, frameon=False)
    axis.grid(alpha=0.3)


def curve(axis, r: dict, label: str, **style) -> None:
    axis.plot(range(1, len(r['curve']) + 1), r['curve'], label=f'{label}  {accuracy(r):.1f}', **style)


def draw_bars(ka: list[dict], axis) -> None:
    names = {'ensemble': 'the teachers\nthemselves', 'scratch': 'student\nwith labels'}
    labels = [names.get(r['method'], f'student,\n{r["method"]}') for r in ka]
    colours = [{'ensemble': 'darkgrey', 'scratch': 'black'}.get(r['method'], 'tab:blue') for r in ka]
    bars = axis.bar(labels, [accuracy(r) for r in ka], color=colours, width=0.6)
    axis.bar_label(bars, fmt='%.1f', fontsize=9)
    for style, (i, teacher) in zip(('--', ':', '-.', '-'), enumerate(ka[0]['teachers'], 1)):
        label = f'teacher {i}, among its {len(teacher["classes"])} classes  {teacher["top1"]:.1f}'
        axis.axhline(teacher['top1'], color='grey', linestyle=style, linewidth=1.2, label=label)
    axis.legend(loc='upper left', fontsize=8, frameon=False)
    axis.set(ylabel='test accuracy, all classes (%)', ylim=(0, 132), yticks=range(0, 101, 20))
    axis.tick_params(axis='x', labelsize=8)
    axis.set_title('teachers of some classes each, no labels', fontsize=10)
    axis.grid(alpha=0.3, axis='y')
    axis.set_axisbelow(True)


def main() -> int:
    parser = Parser(__doc__)
    parser.add_argument(
        'folder', type=Path, help='where result files are; overview.md and overview.png go there'
    )
    args = parser.parse_args()
    folders = [str(args.folder)]
    results = [r for r in read_results(folders) if r['script'] != 'train_ka'] + ka_report.read_results(
        folders
    )
    if not results:
        raise UserError(f'no result files below {args.folder}')
    if not (shown := rows(results)):
        raise UserError(
            f'{args.folder}: nothing that an overview shows: it reads results of train_base.py, train_kd.py, '
            f'train_dfkd.py, and of train_ka.py those with an accuracy over all classes; python -m report '
            f'table, ka, dense and tasks show others'
        )
    text = text_of(shown)
    (args.folder / 'overview.md').write_text(text)
    print(text)
    plt = pyplot_or_error()
    draw(results, args.folder / 'overview.png', plt)
    print(f'figure: {args.folder / "overview.png"}')
    return 0
