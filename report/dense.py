"""Tables and pictures of train_dense.py: `python -m report dense FOLDER... --out FOLDER`.

table.md: figures of teacher, student alone and students with each loss, over the seeds. panels-TASK.png: a
picture, what the student alone, the best distilled student and the teacher find in it, and the truth;
panels-TASK.npz has its arrays, from which it can be drawn again.
"""

import statistics
from pathlib import Path

import numpy as np

from dataset.scenes import CLASSES
from engine.dense_build import rows_for
from engine.errors import UserError
from engine.parser import Parser
from engine.record import output_folder
from methods.dense import DENSE
from report.plot import pyplot_or_error
from report.speed import table
from report.table import by_recipe, chosen, extremes, in_brackets, read_json, read_results

FIGURES = {
    'segmentation': {'miou': 'mIoU', 'accuracy': 'pixel accuracy'},
    'detection': {'ap': 'AP', 'ap50': 'AP50', 'ap75': 'AP75'},
}
COLOURS = np.array(
    [(118, 132, 148), (214, 208, 196), (240, 228, 150), (205, 90, 60), (70, 140, 200), (90, 165, 90)]
)
SETTING = ('task', 'data', 'size', 'student', 'labelled', 'unlabelled', 'steps')
OWN = ('teacher', 'methods', 'ce')  # of a row, not of its table
KINDS = (
    '',
    '#cd5a3c',
    '#468cc8',
    '#5aa55a',
)  # of boxes: box, sphere, cylinder, in the colours of their pixels


def mine(results: list[dict]) -> list[dict]:
    return [r for r in results if r.get('script') == 'train_dense']


def text_of(results: list[dict]) -> str:
    """A table per setting: means over the seeds with their range, more is better in every column."""
    settings = {}
    for result in results:
        setting = *(str(result[key]) for key in SETTING), result.get('processes', 1)
        settings.setdefault(setting, []).append(result)
    ordered = sorted(settings.values(), key=lambda found: (-len(found[0]['task']), found[0]['steps']))
    parts = [
        of_setting(found[0]['task'], alike, ''.join(f', {text}' for text in label))
        for found in ordered
        for label, alike in by_recipe(found, OWN).items()
    ]
    return '\n\n'.join(part.rstrip('\n') for part in parts) + '\n'


def of_setting(task: str, results: list[dict], label: str) -> str:
    """label: what tells it from the other tables of its setting."""
    figures = FIGURES[task]
    main = next(iter(figures))
    teachers, rows = teachers_of(results), {}
    pairs = {(r['seed'], taught_by(r)) for r in results if taught_by(r)}
    several = len(pairs) > len({seed for seed, _ in pairs})  # of one seed; else each may have its own
    for result in results:
        own = chosen(result, rows_for(DENSE, task, result['student']))
        if several and taught_by(result):
            own.append(f'teacher {list(teachers).index(taught_by(result)) + 1}')
        rows.setdefault(result['method'] + in_brackets(own), []).append(result)
    alone = {r['seed']: r['last'][main] for r in rows.get('alone', [])}
    ordered = sorted(rows, key=lambda name: (name != 'alone', -mean(rows[name], main)))
    said = {key: ', '.join(str(x) for x in sorted({r[key] for r in results}))
            for key in (*SETTING, 'seed')}  # fmt: skip
    names = dict.fromkeys(teacher['name'] for teacher in teachers.values())
    above = [f'`{name}`' for name in ordered if name != 'alone' and alone and len(rows[name]) > 1
             and all(r['last'][main] > alone.get(r['seed'], np.inf) for r in rows[name])]  # fmt: skip
    many = results[0].get('processes', 1)
    partly = alone and any({r['seed'] for r in runs} != alone.keys() for runs in rows.values())
    text = (
        f'{task.capitalize()}, {" or ".join(names) or "nobody"} teaches {said["student"]}: '
        f'{said["labelled"]} labelled pictures, {said["unlabelled"]} without labels, {said["steps"]} steps'
        f'{label}{f", {many} processes" if many > 1 else ""}; '
        f'seeds {said["seed"]}: mean (smallest to largest). '
        f'Above the student alone with every seed: {", ".join(above) or "none"}.'
        f'{" Differences are over the seeds that both have." if partly else ""}\n\n'
    )
    who = {'teacher': [*teachers.values()]} if teachers else {}
    who = {f'teacher {k}': [one] for k, one in enumerate(teachers.values(), 1)} if several else who
    lines = [(name, *(extremes([one[key] for one in alike]) for key in figures), '', '')
             for name, alike in who.items()]  # fmt: skip
    for name in ordered:
        gains = [r['last'][main] - alone[r['seed']] for r in rows[name] if r['seed'] in alone]
        gain = f'{statistics.mean(gains):+.1f}' if gains and name != 'alone' else ''
        shown = (extremes([r['last'][key] for r in rows[name]]) for key in figures)
        lines.append((f'`{name}`', *shown, gain, str(len(rows[name]))))
    return text + table(('', *figures.values(), f'{figures[main]} against alone', 'seeds'), *lines)


def taught_by(result: dict) -> str | None:
    """The fingerprint of a student's teacher."""
    return result.get('recipe', {}).get('teacher')


def teachers_of(results: list[dict]) -> dict[str, dict]:
    """{fingerprint: name and figures}; of older results, which have none, all figures that differ."""
    marked = {taught_by(r): r['teacher'] for r in results if r['teacher'] and taught_by(r)}
    return marked or {str(r['teacher']): r['teacher'] for r in results if r['teacher']}


def mean(results: list[dict], key: str) -> float:
    return statistics.mean(r['last'][key] for r in results)


# ------------------------------------------------------------------------------------------------- pictures


def collect(folder: Path) -> tuple[str, dict]:
    """The task of a run, and what its picture shows: the student alone and the best of the others.

    The best of those that were trained as the student alone was, if there are any.
    """
    task = read_json(folder / 'args.json')['args']['task']
    results = mine(read_results([str(folder)]))
    key = next(iter(FIGURES[task]))
    with np.load(folder / 'panels.npz') as file:
        arrays = {name: file[name] for name in file.files}
    shown = [r for r in results if f'of {r["method"]}' in arrays and r['task'] == task]
    if without := [r['method'] for r in results if r not in shown]:
        print(f'{folder / "panels.npz"}: has no picture of {", ".join(without)}; their command with '
              '--resume auto adds it')  # fmt: skip
    alone = next((r for r in shown if r['method'] == 'alone'), None)
    others = [r for r in shown if r is not alone]
    alike = [r for r in others if alone and all(r[name] == alone[name] for name in SETTING)]
    best = max(alike or others, key=lambda r: r['last'][key])['method'] if others else 'alone'
    wanted = ['image', 'truth', *(f'of {name}' for name in ('alone', best, 'teacher'))]
    return task, {name: arrays[name] for name in wanted if name in arrays} | {'best': np.array(best)}


def draw(arrays: dict, path: Path) -> None:
    plt = pyplot_or_error('no figures,')
    best = str(arrays['best'])
    columns = {'picture': None, 'student alone': 'of alone', f'with {best}': f'of {best}',
               'teacher': 'of teacher', 'truth': 'truth'}  # fmt: skip
    columns = {title: key for title, key in columns.items() if key is None or key in arrays}
    images = arrays['image'].transpose(0, 2, 3, 1)
    fig, axes = plt.subplots(len(images), len(columns), figsize=(2.1 * len(columns), 2.15 * len(images)),
                             layout='constrained', squeeze=False)  # fmt: skip
    for line, k in zip(axes, range(len(images))):
        for axis, (title, key) in zip(line, columns.items()):
            if key is None or arrays[key].dtype != np.int16:
                axis.imshow(images[k], interpolation='nearest')
            else:
                axis.imshow(COLOURS[arrays[key][k].clip(0) % len(COLOURS)], interpolation='nearest')
            if key is not None and arrays[key].dtype != np.int16:
                outline(axis, arrays[key][k], plt)
            if k == 0:
                axis.set_title(title, fontsize=11)
            axis.set(xticks=[], yticks=[])
    names = CLASSES[3:] if arrays['truth'].dtype != np.int16 else CLASSES
    colours = KINDS[1:] if len(names) == 3 else COLOURS / 255
    patches = [plt.Rectangle((0, 0), 1, 1, color=colour, label=name) for name, colour in zip(names, colours)]
    fig.legend(handles=patches, loc='outside lower center', ncols=len(names), frameon=False)
    fig.savefig(path, dpi=110)
    plt.close(fig)


def outline(axis, rows: np.ndarray, plt) -> None:
    for x1, y1, x2, y2, label in rows[rows[:, 4] > 0]:
        axis.add_patch(
            plt.Rectangle((x1 - 0.5, y1 - 0.5), x2 - x1, y2 - y1, fill=False, linewidth=2,
                          edgecolor=KINDS[1 + (int(label) - 1) % 3])
        )  # fmt: skip


def main() -> int:
    parser = Parser(__doc__)
    parser.add_argument('folders', nargs='+', help='of runs, or of result files')
    parser.add_argument('--out', required=True, help='folder for the table and the pictures')
    args = parser.parse_args()
    results = mine(read_results(args.folders))
    if not results:
        raise UserError(f'no results of train_dense.py below {", ".join(args.folders)}')
    out = output_folder(Path(args.out))
    text = text_of(results)
    (out / 'table.md').write_text(text)
    print(text)
    for folder in map(Path, args.folders):
        if (folder / 'panels.npz').exists():
            task, arrays = collect(folder)
            np.savez_compressed(out / f'panels-{task}.npz', **arrays)
    for saved in sorted(out.glob('panels-*.npz')):
        with np.load(saved) as file:
            draw({key: file[key] for key in file.files}, saved.with_suffix('.png'))
        print(f'figure: {saved.with_suffix(".png")}')
    return 0
