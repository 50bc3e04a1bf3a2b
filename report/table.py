"""Make the table and the figure from result files: `python -m report table FOLDER... --out FOLDER`.

Reads every results.json (or *.json of the same form) below the given folders, groups runs that differ in the
seed only, and writes table.md and accuracy.png (test accuracy per epoch per method). With --readme FILE the
table also replaces what stands between `<!-- NAME:begin -->` and `<!-- NAME:end -->` in that file, NAME being
--name.
"""

import hashlib
import json
import math
import re
import statistics
from collections.abc import Iterable
from pathlib import Path

from engine.errors import UserError, user_errors
from engine.parser import Parser
from engine.recipe import NEWER
from engine.record import output_folder
from methods import METHODS
from report.plot import pyplot_or_error

COLUMNS = ('method', 'teacher -> student', 'last epoch', 'seeds', 'against the baseline', 'best test epoch*')
COLUMNS += ('schedule', 'device', 'published')
# what repetitions of a run differ in
PER_SEED = {'seed', 'initial', 'teacher_weights', 'teachers', 'parts', 'teacher_top1', 'teacher_right',
            'own_images', 'own_scale'}  # fmt: skip
NAMED = {'script', 'teacher', 'method', 'methods', 'ce'}  # what a row's name says already, see chosen
RECIPE = ('lr', 'batch_size', 'schedule', 'milestones', 'lr_decay', 'amp', 'optim', 'weight_decay',
          'momentum', 'nesterov', 'pad', 'augment', 'image_size', 'labelled', 'val_split', 'bn_l1',
          'processes', 'own_scale')  # fmt: skip
SCRIPTS = ('train_base', 'train_kd', 'train_dml')  # what this table is of; others have commands of their own
PUBLISHED = Path(__file__).parent.parent / 'results' / 'published.json'


def read_results(folders: list[str]) -> list[dict]:
    """Every result below the folders, with the name of its file; once, if folders lie in one another."""
    results, seen = [], set()
    for folder in existing(folders):
        for path in sorted([folder] if folder.is_file() else folder.rglob('*.json')):
            if path.resolve() in seen:
                continue
            seen.add(path.resolve())
            content = read_json(path)
            if isinstance(content, dict) and {'method', 'last', 'best', 'curve'} <= content.keys():
                results.append(content | {'file': path.stem, 'path': str(path)})
    return results


def existing(folders: list[str]) -> list[Path]:
    """Or a name that is mistyped would be a table without its rows."""
    if lost := [folder for folder in folders if not Path(folder).exists()]:
        raise UserError(f'{", ".join(lost)}: no such folder; name those that hold results')
    return list(map(Path, folders))


def read_json(path: Path):
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f'{path}: cannot be read as JSON ({error})') from None


def group(results: list[dict]) -> dict[tuple, list[dict]]:
    """Runs of the same experiment, which differ in the seed only; baselines first, then by last accuracy."""
    results = distinct(results)
    groups, data = {}, data_names(results)
    for r, name in zip(results, data):
        # a student that teaches itself may have been trained beside others, in a process with a teacher, and
        # one of a single teacher in a process with several, of which it reads the first
        rows = [METHODS[part] for part in r['method'].split('+') if part in METHODS]
        # of a method that is not here (its row has another name by now) nothing says that it needs none
        teacher = (r.get('teacher') or '') if not rows or any(row.needs.teacher for row in rows) else ''
        teacher = teacher if any(row.needs.all_teachers for row in rows) else teacher.partition('+')[0]
        method = r['method'] + (f' until epoch {r["kd_stop"]}' if 'kd_stop' in r else '')
        key = (name, teacher, r['student'], method, r['epochs'])
        groups.setdefault(key, []).append(r)
    groups = {
        (*key[:3], key[3] + more, key[4]): runs
        for key, every in groups.items()
        for more, runs in apart(every).items()
    }
    for (*_, method, _), runs in groups.items():
        refuse_twins(method, runs)
    return dict(
        sorted(groups.items(), key=lambda item: (not is_baseline(item[0][3]), -mean(item[1], 'last')))
    )


def distinct(results: list[dict]) -> list[dict]:
    """Copies of one file are one result."""
    found = {}
    for r in results:
        content = {key: value for key, value in r.items() if key not in ('file', 'path')}
        found.setdefault(json.dumps(content, sort_keys=True), r)
    return list(found.values())


def refuse_twins(method: str, runs: list[dict]) -> None:
    """Two runs of one seed, of another day or machine, are not two seeds, and a gain could be of either."""
    first = {}
    for r in runs:
        if (twin := first.setdefault(r['seed'], r)) is not r:
            files = ' and '.join(x['path'] for x in (twin, r) if 'path' in x)
            said = f': {files}' if files else ''
            raise UserError(f'{method} is there twice with seed {r["seed"]}: name one folder{said}')


def data_names(results: list[dict]) -> list[str]:
    """Of every result. Data that the user has, under one name, are told apart by how their digest begins."""
    sets = {}
    for r in results:
        sets.setdefault(r['data'], set()).add(r.get('recipe', {}).get('own_images'))
    several = {name for name, digests in sets.items() if len(digests - {None}) > 1}
    names = []
    for r in results:
        digest = r.get('recipe', {}).get('own_images') or 'unknown'
        names.append(f'{r["data"]} {digest[:6]}' if r['data'] in several else r['data'])
    return names


def is_baseline(method: str) -> bool:
    """Also one that something tells apart, 'baseline (lr 0.1)'."""
    return method.partition(' ')[0] == 'baseline'


def apart(runs: list[dict]) -> dict[str, list[dict]]:
    """{what tells them apart: runs}: other recipes, and runs of one seed, are no repetitions."""
    found = {}
    for label, alike in by_recipe(runs, NAMED).items():
        for r in alike:
            found.setdefault((*chosen(r), *label), []).append(r)
    for split in (by_teacher, by_start, by_scale):
        found = {
            (*label, *more): part for label, alike in found.items() for more, part in split(alike).items()
        }
    return {in_brackets(label): every for label, every in found.items()}


def in_brackets(label: Iterable[str]) -> str:
    """What follows the name of a row; nothing if there is nothing to say."""
    said = ', '.join(label)
    return f' ({said})' if said else ''


def by_recipe(runs: list[dict], named=()) -> dict[tuple, list[dict]]:
    """{what tells them apart: runs}: those of one recipe are repetitions. named: what readers are told."""
    recipes = [NEWER | r.get('recipe', {}) for r in runs]  # what nobody trained has none
    for recipe in recipes:
        if 'pool_init' in recipe:  # a digest: seeds may have a pool each
            recipe['pool_init'] = 'given' if recipe['pool_init'] else None
    known = set.intersection(*map(set, recipes)) - PER_SEED - set(named)  # older ones do not know newer flags
    differ = [k for k in sorted(known) if len({json.dumps(recipe[k]) for recipe in recipes}) > 1]
    found = {}
    for r, recipe in zip(runs, recipes):
        found.setdefault(tuple(f'{k} {recipe[k]}' for k in differ), []).append(r)
    return found


def chosen(r: dict, table: dict = METHODS) -> list[str]:
    """The arguments, stages and weights of a run's losses, and of cross-entropy, that are not their rows'."""
    recipe = r.get('recipe', {})
    peers = [recipe['method']] if recipe.get('script') == 'train_dml' else []
    terms = recipe.get('methods', peers)
    rows, own = [table.get(name) for name, *_ in terms], []
    for row, (name, weight, given, *stages) in zip(rows, terms):
        said = [f'{k}={v}' for k, v in given.items()] + [f'stages {text}' for text in stages]
        said += [] if row and weight == row.weight else [f'weight {weight:g}']
        own += [f'{name}.{text}' if len(terms) > 1 else text for text in said]
    if 'ce' in recipe and all(rows):
        usual = math.prod(1.0 if callable(row.when.ce) else row.when.ce for row in rows)
        own += [] if recipe['ce'] == usual else [f'ce {recipe["ce"]:g}']
    return own


def by(value_of, runs: list[dict], word) -> dict[tuple, list[dict]]:
    """{what tells them apart: runs} where one seed has several; seeds may differ in it otherwise."""
    found = {}
    for r in runs:
        found.setdefault(str(value_of(r)), []).append(r)
    if len(found) == 1 or len({r['seed'] for r in runs}) == len(runs):
        return {(): runs}
    return {(word(number, alike[0]),): alike for number, alike in enumerate(found.values(), 1)}


def by_teacher(runs: list[dict]) -> dict[tuple, list[dict]]:
    def word(_, r: dict) -> str:
        return f'teacher at {r["teacher_top1"]:.2f}' if r.get('teacher_top1') else 'no teacher'

    return by(lambda r: r.get('teacher_top1'), runs, word)


def by_start(runs: list[dict]) -> dict[tuple, list[dict]]:
    """Students that go on from others' weights."""
    return by(lambda r: r['recipe'].get('initial'), runs, lambda number, _: f'start {number}')


def by_scale(runs: list[dict]) -> dict[tuple, list[dict]]:
    """Of one's own images, normalised otherwise than before: all digits, as the name of a row is its own."""
    scale = 'own_scale'
    return by(lambda r: r['recipe'].get(scale), runs, lambda _, r: f'{scale} {r["recipe"].get(scale)}')


def mean(runs: list[dict], which: str) -> float:
    return statistics.mean(r[which]['top1'] for r in runs)


def extremes(values: list[float], digits: int = 1) -> str:
    """Mean, and of several the smallest and the largest."""
    shown = f'{statistics.mean(values):.{digits}f}'
    return f'{shown} ({min(values):.{digits}f} to {max(values):.{digits}f})' if len(values) > 1 else shown


def spread(values: list[float], digits: int = 2) -> str:
    deviation = f' +- {statistics.stdev(values):.{digits}f}' if len(values) > 1 else ''
    return f'{statistics.mean(values):.{digits}f}{deviation}'


def baseline_of(groups: dict, key: tuple) -> list[dict] | None:
    """The student's own training without a teacher, on the same data, by the same recipe.

    Networks that learn from each other are compared with one of them, if they are of one kind. Of several
    such trainings, from different weights, it is the one that began with the student's.
    """
    data, _, student, method, epochs = key
    kinds = set(student.split('+'))
    if is_baseline(method) or len(kinds) > 1:
        return None
    mine, found = groups[key], []
    for (*pair, kind, length), runs in groups.items():
        alike = alike_trained(mine[0], runs[0])
        alike = alike and mine[0]['recipe'].get('classes') == runs[0]['recipe'].get('classes')
        if [*pair, length] == [data, '', *kinds, epochs] and is_baseline(kind) and alike:
            found.append(runs)
    # of the same seed, but from other weights: another network's
    found = [b for b in found if starts(b) & starts(mine) or not seeds(b) & seeds(mine)]
    same = [runs for runs in found if starts(runs) & starts(mine)]
    return next(iter(same or found), None)


def alike_trained(one: dict, other: dict) -> bool:
    """Whether recipes agree in all but the method; what one of them does not know counts for nothing."""
    one, other = (NEWER | r['recipe'] if r.get('recipe') else {} for r in (one, other))
    return all(one[k] == other[k] for k in RECIPE if k in one and k in other)


def lacks_its_own(groups: dict, key: tuple) -> bool:
    """Whether its student was trained alone, but by other recipes only."""
    data, _, student, method, epochs = key
    alone = [
        length == epochs and alike_trained(groups[key][0], runs[0])
        for (*pair, kind, length), runs in groups.items()
        if is_baseline(kind) and pair == [data, '', student]
    ]
    return not is_baseline(method) and bool(alone) and not any(alone)


def starts(runs: list[dict]) -> set:
    initial = [r['recipe'].get('initial') for r in runs]  # of several networks it is a list
    return {name for names in initial for name in (names if isinstance(names, list) else [names])}


def seeds(runs: list[dict]) -> set:
    return {r['seed'] for r in runs}


def gain_of(runs: list[dict], alone: list[dict]) -> float:
    """What runs are better than alone, the mean over seeds."""
    return statistics.mean(gains(*({r['seed']: r['last']['top1'] for r in both} for both in (runs, alone))))


def gains(values: dict, alone: dict) -> list[float]:
    """Of {seed: number}: differences over the seeds that both have; that of the means if they share none."""
    if both := sorted(values.keys() & alone.keys()):
        return [values[seed] - alone[seed] for seed in both]
    return [statistics.mean(values.values()) - statistics.mean(alone.values())]


def students_of(groups: dict) -> set[str]:
    """The networks that a method trained; any other network trained alone is a teacher."""
    trained = [key[2] for key in groups if not is_baseline(key[3])] or [key[2] for key in groups]
    return {name for student in trained for name in student.split('+')}


def schedule(runs: list[dict]) -> str:
    """Epochs, and what else differs from the scripts' defaults."""
    recipe = NEWER | runs[0]['recipe']
    usual = {'optim': ('', 'sgd'), 'batch_size': ('batch', 128), 'lr': ('lr', 0.1),
             'weight_decay': ('weight decay', 1e-4), 'pad': ('pad', 'reflect'),
             'amp': ('', 'off')}  # fmt: skip
    told = {key: recipe.get(key, default) for key, (_, default) in usual.items()}
    more = [f'{word} {told[key]}' for key, (word, default) in usual.items() if told[key] != default]
    if recipe['schedule'] == 'onecycle':
        more.insert(0, 'one cycle')
    elif (falls := recipe.get('milestones', [0.5, 0.75])) != [0.5, 0.75]:
        more.append(f'falls at {" ".join(map(str, falls))}' if falls else 'no falls')
    if not recipe['nesterov']:
        more.append('no Nesterov')
    if recipe['labelled']:
        more.append(f'{100 * recipe["labelled"]:g} % of the labels')
    return ', '.join([f'{runs[0]["epochs"]} epochs', *(text.strip() for text in more)])


# what others call a row; their MLKD is the released code's, which has two views
OTHER_NAMES = {'baseline': ('vanilla',), 'st': ('st', 'kd'), 'wsld': ('wsl',), 'mlkd': (),
               'mlkd_strong': ('mlkd',)}  # fmt: skip


def published(key: tuple) -> str:
    """What others report for this data, pair and method, from results/published.json."""
    data, teacher, student, method, _ = key
    method, _, told = method.partition(' (')  # those of others have the recipes of their authors, too
    if re.search(r'\bstart \d', told):  # they went on from other weights, of a slimmed network, say
        return ''
    names = OTHER_NAMES.get(method, (method,))
    found = [
        f'{entry["top1"]:.2f} ({source(entry)})'
        for entry in json.loads(PUBLISHED.read_text())
        if (entry['dataset'], entry['teacher'] or '', entry['student']) == (data, teacher, student)
        and entry['method'].lower() in names
    ]
    return ', '.join(dict.fromkeys(found))


def source(entry: dict) -> str:
    """The repository's name, and the epochs if they are stated."""
    repository = entry['source'].split()[0].split('/')[1]
    return repository + (f', {entry["epochs"]} epochs' if entry['epochs'] else '')


def table(results: list[dict]) -> str:
    """Markdown, one row per experiment."""
    lines = [
        '| ' + ' | '.join(COLUMNS) + ' |',
        '|---' * len(COLUMNS) + '|',
    ]
    groups, partly = group(results), False
    alone_of = {key: baseline_of(groups, key) for key in groups}
    lacking = not any(alone_of.values()) and any(lacks_its_own(groups, key) for key in groups)
    several = len({key[0] for key in groups}) > 1
    for key, runs in groups.items():
        data, teacher, student, method, _ = key
        alone = alone_of[key]
        gain = f'{gain_of(runs, alone):+.2f}' if alone else ''
        partly |= bool(alone) and seeds(runs) != seeds(alone) and bool(seeds(runs) & seeds(alone))
        pair = f'{teacher} -> {student}' if teacher else student
        pair += f', {data}' if several else ''
        if is_baseline(method):
            method = method if student in students_of(groups) else 'teacher'
        else:
            method += of_file(runs)
        last, best = (spread([r[which]['top1'] for r in runs]) for which in ('last', 'best'))
        cells = (method, pair, last, len(runs), gain, best, schedule(runs),
                 ', '.join(sorted({r['machine']['device'] for r in runs})), published(key))  # fmt: skip
        lines.append('| ' + ' | '.join(map(str, cells)) + ' |')
    selected = sorted({r['best']['selected_on'] for r in results})
    note = f'*selected on {" or ".join(selected)}. Published: by others, with their schedules'
    zoo = any('Knowledge-Distillation-Zoo' in line for line in lines)  # whose figures are best test epochs
    note += "; Knowledge-Distillation-Zoo's are best test epochs, as the column * is." if zoo else '.'
    note += ' Against the baseline: over the seeds that both have.' if partly else ''
    note += ' No gain: no student alone of this recipe.' if lacking else ''
    lines += ['', f'Top-1 on the test set, percent. {note}']
    return '\n'.join(lines) + '\n'


def of_file(runs: list[dict]) -> str:
    """', NAME', if their files are called otherwise than their method: a recipe, like takd-direct.json."""
    names = {re.sub(r'-s\d+$', '', r.get('file', 'results')) for r in runs}
    name = names.pop()
    return '' if names or name in ('results', runs[0]['method']) else f', {name}'


def summary(results: list[dict]) -> str:
    """A short table: each method's last epoch, and what it gains over the student alone.

    Of more than twelve methods the best six and the last three, and how many lie between.
    """
    groups = group(results)
    several = len({key[0] for key in groups}) > 1
    lines = ['| | top-1, last epoch | against the student alone |', '|---|---|---|']
    for key, runs in groups.items():
        alone = baseline_of(groups, key)
        gain = f'{gain_of(runs, alone):+.2f}' if alone else ''
        kind = 'student alone' if key[2] in students_of(groups) else 'teacher'
        name = f'{kind}, {key[2]}' if is_baseline(key[3]) else f'`{key[3]}`'
        name += f', {key[0]}' * several
        lines.append(f'| {name} | {spread([r["last"]["top1"] for r in runs])} | {gain} |')
    first = next((k for k, line in enumerate(lines) if line.startswith('| `')), len(lines))
    if (between := len(lines) - first - 9) > 3:
        lines[first + 6 : -3] = [f'| {between} more between these | | |']
    return '\n'.join(lines) + '\n'


def figure(results: list[dict], path: Path) -> None:
    """Test accuracy per epoch, or, where curves would be too many or too short to read, of the last epoch."""
    plt = pyplot_or_error()
    groups = group(results)
    methods = [key for key in groups if not is_baseline(key[3])]
    short = max((key[4] for key in methods), default=9) < 4
    fig = (last_epochs if len(methods) > 16 or short else curves)(groups, plt)
    fig.savefig(path, dpi=130, metadata={'Source': source_of_figure(results)})
    plt.close(fig)


def source_of_figure(results: list[dict]) -> str:
    """A sum over what a figure shows. It is written into the PNG, so that a test can tell an old figure."""
    keys = ('data', 'teacher', 'student', 'method', 'seed', 'curve')
    shown = [
        json.dumps([method if key == 'method' else r[key] for key in keys])
        for (*_, method, _), runs in group(results).items()
        for r in runs
    ]
    return hashlib.sha256('\n'.join(sorted(shown)).encode()).hexdigest()


def last_epochs(groups: dict, plt):
    """A dot per run, methods ordered by their mean; the student alone as a line, with its runs as dots.

    A run far below the others, which diverged, is a triangle at the edge with its number, or nothing else
    could be told apart.
    """
    students = students_of(groups)
    rows = [key for key in groups if not is_baseline(key[3]) or key[2] in students][::-1]
    rows.sort(key=lambda key: mean(groups[key], 'last'))
    every = sorted(r['last']['top1'] for key in rows for r in groups[key])
    usual = every[len(every) // 2]
    edge = usual - max(5 * (every[-1] - usual), 20)
    least = min(value for value in every if value >= edge)
    aside = least - 0.1 * (every[-1] - least)  # of the lowest that is shown where it is
    names = names_of(rows)
    wide = 7 + 0.06 * max(0, max(map(len, names)) - 25)
    fig, axes = plt.subplots(figsize=(wide, max(3.2, 1.2 + 0.19 * len(rows))), layout='constrained')
    for height, key in enumerate(rows):
        alone = is_baseline(key[3])
        values = [r['last']['top1'] for r in groups[key]]
        colour = 'black' if alone else 'tab:orange' if '+' in key[2] or not key[1] else 'tab:blue'
        seen = [value for value in values if value >= edge]
        axes.plot(seen, [height] * len(seen), 'o', color=colour, markersize=4)
        if alone:
            axes.axvline(mean(groups[key], 'last'), color='black', linewidth=0.8)
        if lost := [value for value in values if value < edge]:
            axes.plot([aside], [height], '<', color=colour, markersize=5)
            said = '  '.join(f'{value:.1f}' for value in lost)
            axes.annotate(said, (aside, height), (7, 0), textcoords='offset points', va='center', fontsize=7)
    length = ' or '.join(f'{epochs} epochs' for epochs in sorted({key[4] for key in rows}))
    axes.set_yticks(range(len(rows)), names, fontsize=7)
    axes.set(
        xlabel='test top-1 of the last epoch (%)', ylim=(-0.7, len(rows) - 0.3),
        title=f'{title(groups)}, {length}\na dot is a run; orange: trained without a teacher',
    )  # fmt: skip
    axes.grid(alpha=0.3)
    return fig


def names_of(rows: Iterable[tuple]) -> list[str]:
    """What a figure calls them: with networks and length where two would be called the same."""
    rows, names = list(rows), []
    for _, _, student, method, _ in rows:
        names.append(f'{student} alone{method.removeprefix("baseline")}' if is_baseline(method) else method)
    if len(set(names)) == len(names):
        return names
    networks = [f', {" -> ".join(filter(None, key[1:3]))}' * (not is_baseline(key[3])) for key in rows]
    several = len({key[0] for key in rows}) > 1
    return [
        f'{name}{more}{f", {key[0]}" * several}, {key[4]} epochs'
        for name, more, key in zip(names, networks, rows)
    ]


def title(groups: dict) -> str:
    return f'{", ".join(sorted({key[0] for key in groups}))}: {", ".join(sorted(students_of(groups)))}'


def curves(groups: dict, plt):
    """Test accuracy per epoch: the student alone in black, teachers as dashed levels, methods in colour."""
    students = students_of(groups)
    fig, axes = plt.subplots(figsize=(8, 5), layout='constrained')
    colours, number = plt.get_cmap('tab20').colors, 0
    for name, (key, runs) in zip(names_of(groups), groups.items()):
        _, _, student, method, epochs = key
        curve = [statistics.mean(values) for values in zip(*(r['curve'] for r in runs))]
        alone = is_baseline(method)
        label = f'{name}  {mean(runs, "last"):.1f}'
        if alone and student not in students:
            axes.axhline(
                curve[-1],
                color='grey',
                linestyle='--',
                linewidth=1.2,
                label=f'teacher {student}  {curve[-1]:.1f}',
            )
        elif alone:
            axes.plot(range(1, epochs + 1), curve, color='black', linewidth=2.5, label=label, zorder=5)
        else:
            style = ('-', '--', ':')[number // 10 % 3]
            colour, began = colours[number * 2 % 20], epochs - len(curve) + 1  # later after phases inside
            axes.plot(range(began, epochs + 1), curve, style, color=colour, linewidth=1.5, label=label)
            number += 1
    axes.set(xlabel='epoch', ylabel='test top-1 (%)', title=f'{title(groups)}, last epoch in the legend')
    axes.grid(alpha=0.3)
    fig.legend(loc='outside right upper', frameon=False)
    return fig


def between(text: str, name: str, new: str, where: str) -> str:
    """text with what stands between <!-- NAME:begin --> and <!-- NAME:end --> replaced."""
    begin, end = f'<!-- {name}:begin -->', f'<!-- {name}:end -->'
    before, found, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise UserError(f'{where} has no {begin} ... {end}')
    return f'{before}{begin}\n{new}{end}{after}'


def insert(page: Path, name: str, new: str) -> None:
    with user_errors():
        text = page.read_text()
    page.write_text(between(text, name, new, str(page)))


def main() -> int:
    parser = Parser(__doc__)
    parser.add_argument('folders', nargs='+', help='where result files are')
    parser.add_argument('--out', required=True, help='folder for table.md and accuracy.png')
    parser.add_argument('--readme', help='file to put the table into')
    parser.add_argument('--name', default='results', help='name of the place in that file')
    args = parser.parse_args()
    results = [r for r in read_results(args.folders) if r.get('script', 'train_kd') in SCRIPTS]
    if not results:
        others = 'report ka reads train_ka.py and the tools of its losses, dfkd train_dfkd.py, dense '
        others += 'train_dense.py, tasks tools/sequences.py and graphs.py, explain tools/graft.py'
        raise UserError(f'no result of {", ".join(SCRIPTS)} below {", ".join(args.folders)}; {others}')
    out = output_folder(Path(args.out))
    text = table(results)
    (out / 'table.md').write_text(text)
    if args.readme:
        insert(Path(args.readme), args.name, text)
    print(text)
    figure(results, out / 'accuracy.png')
    print(f'table:  {out / "table.md"}\nfigure: {out / "accuracy.png"}')
    return 0
