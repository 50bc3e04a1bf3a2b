"""Tables of amalgamation runs: `python -m report ka FOLDER... --out FOLDER`.

Reads every result file of train_ka.py and of the tools for single losses (tools/subtask.py ...) below the
folders, joins runs that differ in the seed only, and writes table.md and table.csv, a table per experiment,
rounds.png where a tool has measured after rounds, and claims.png where several experiments have the same
methods over seeds. With --readme FILE the tables also replace what stands between `<!-- NAME:begin -->` and
`<!-- NAME:end -->` there.
"""

import csv
import io
import re
import statistics
from collections.abc import Iterable
from pathlib import Path

import models
from dataset.dense_views import USUAL
from engine.errors import UserError
from engine.parser import Parser
from engine.record import output_folder
from report import ka_claims, ka_rows
from report.ka_rows import is_of_a_tool
from report.table import by_recipe, existing, insert, read_json, spread

NOTE = 'Last epoch, test set, percent unless said otherwise.'
JOINT = 'Joint: argmax over all classes. Part: argmax among the classes of the part, which is known.'
SELECTED = '*selected on test data.'
BALANCED = (
    'Last epoch, test set, percent. Balanced, in brackets beside an accuracy: mean of the recalls of yes and '
    'of no. *selected on test data.'
)
PROBES = 'Last epoch, test set, percent right of linear probes of the embedding, fitted on training images.'


def read_results(folders: list[str]) -> list[dict]:
    """Every result of train_ka.py below the folders, with its experiment: the folder that it lies in.

    Folders that differ in the seed at the end, halves-s1 and halves-s2, are one experiment.
    """
    results, seen = [], set()
    for folder in existing(folders):
        for path in sorted(folder.rglob('*.json')):
            if path.resolve() in seen:  # folders may lie in one another
                continue
            seen.add(path.resolve())
            content = read_json(path)
            if isinstance(content, dict) and (content.get('script') == 'train_ka' or is_of_a_tool(content)):
                place = path.parent.parent if path.name == 'results.json' else path.parent
                results.append(content | {'experiment': re.sub(r'-s\d+$', '', place.name)})
    return results


def group(results: list[dict]) -> dict[tuple, list[dict]]:
    """{(data, teachers, experiment, method, parts): runs of several seeds}, by method's order of appearance.

    With --split random every seed has parts of its own, and means over them would say nothing.
    """
    groups = {}
    for r in results:
        key = r['data'], r.get('teacher') or '', r['experiment'], r['method'], str(r.get('parts'))
        groups.setdefault(key, []).append(r)
    for (*_, experiment, method, _), runs in groups.items():
        if len(recipes := by_recipe(runs, ('tasks',))) > 1:  # a row names its tasks
            said = ' and '.join(', '.join(label) for label in recipes)
            raise UserError(
                f'{experiment}: {method} is there with {said}: no seeds of one run, name one folder'
            )
        seeds = [(r['seed'], str(r.get('tasks'))) for r in runs]
        if again := [seed for seed, tasks in seeds if seeds.count((seed, tasks)) > 1]:
            raise UserError(f'{experiment}: {method} is there twice with seed {again[0]}: name one folder')
    return groups


def parts_table(results: list[dict]) -> list[list[str]]:
    """Joint accuracy, accuracy with the part known, and what share of the images goes to their own part."""
    columns = 'joint top-1', 'each part, if known', 'sent to the right part', 'best joint*'
    rows = [['', *columns, 'epochs', 'seeds', 'parameters']]
    several = len({str(r['parts']) for r in results}) > 1

    def of(runs: list[dict]) -> str:
        return f', seed {", ".join(str(r["seed"]) for r in runs)}' * several

    for runs in group([r for r in results if r['method'] == 'ensemble']).values():
        first = runs[0]
        for i, teacher in enumerate(first['teachers'], 1):
            name = f'teacher {i}, {teacher["name"]}: {", ".join(map(str, teacher["classes"]))}{of(runs)}'
            size = _size(teacher, len(teacher['classes']))
            top1 = statistics.mean(r['teachers'][i - 1]['top1'] for r in runs)
            rows.append([name, '', f'{top1:.2f}', '', '', '', len(runs), size])
        names = {'A': 'raw logits', 'B': 'softmax each', 'C': 'logits - mean'}
        for key in first['ensembles']:
            forms = [r['ensembles'][key] for r in runs]
            name = f'ensemble {key}, {names[key]}' if key in names else f'{key}, cut to the wanted classes'
            name += of(runs)
            rows.append([name, spread([form['top1'] for form in forms]), _parts(*forms),
                         _routed(*(form['routing'] for form in forms)), '', '', len(runs), ''])  # fmt: skip
    trained = group([r for r in results if r['method'] != 'ensemble'])
    order = sorted(trained, key=lambda k: (k[3] != 'scratch', -statistics.mean(_last(trained[k], 'top1'))))
    for key in order:
        runs = trained[key]
        name = f'{key[3]} ({"reads labels" if key[3] == "scratch" else runs[0]["student"]})'
        rows.append([
            name + of(runs), spread(_last(runs, 'top1')), _parts(*(r['last'] for r in runs)),
            _routed(*(r['routing'] for r in runs)),
            spread([r['best']['top1'] for r in runs]), runs[0]['epochs'], len(runs),
            _size({'name': runs[0]['student']}, len(runs[0]['classes'])),
        ])  # fmt: skip
    return rows


def augmented(views: dict | None) -> str:
    """What a row says of its views: the flag, with what differs from its usual numbers."""
    own = {key: value for key, value in (views or {}).items() if value != USUAL[key]}
    return ' '.join([', --augment', *(f'{key}={value}' for key, value in own.items())]) if views else ''


def dense_table(results: list[dict]) -> list[list[str]]:
    keys = {
        'miou': 'mIoU %',
        'accuracy': 'pixels %',
        'rmse': 'depth RMSE m',
        'abs_rel': 'abs rel',
        'delta125': '< 1.25 %',
        'angle_mean': 'normals, mean angle',
        'angle_median': 'median',
        'within_11': '< 11.25 %',
        'within_22': '< 22.5 %',
        'within_30': '< 30 %',
    }
    rows = [['', *keys.values(), 'parameters', 'epochs', 'seeds']]

    def cells(*figures: dict) -> list[str]:
        """Means over runs, and with several their standard deviation."""
        made = []
        for k in keys:
            values, digits = [f[k] for f in figures if k in f], 3 if k in {'rmse', 'abs_rel'} else 1
            text = f'{statistics.mean(values):.{digits}f}' if values else ''
            made.append(text + (f' +- {statistics.stdev(values):.{digits}f}' if len(values) > 1 else ''))
        return made

    views = [str(r.get('augment') or '') for r in results]  # the same method with and without is two rows
    split = [r | {'experiment': f'{r["experiment"]} {view}'} for r, view in zip(results, views)]
    for runs in group(split).values():
        first = runs[0]
        if first['method'] == 'ensemble':
            joined = [
                {k: v for teacher in r['teachers'] for k, v in teacher.items() if k in keys} for r in runs
            ]
            if len(first['teachers']) > 1:
                rows.append(['the teachers, one per task', *cells(*joined), '', '', len(runs)])
        elif len(first['tasks']) > 1:
            if first['method'] == 'sbm':
                blocks = [r['after_first_phase'] for r in runs if r.get('after_first_phase')]
                if blocks:
                    epoch = blocks[0]['epoch']
                    rows.append(['sbm, after the block phase', *cells(*blocks), '', epoch, len(blocks)])
            points = ' or '.join(dict.fromkeys(', '.join(map(str, r['branch_points'])) for r in runs))
            name = 'one network, labels' if first['method'] == 'scratch' else first['method']
            name += augmented(first.get('augment'))
            rows.append([f'{name} (branches at {points})', *cells(*(r['last'] for r in runs)),
                         _span(r['parameters'] for r in runs), first['epochs'], len(runs)])  # fmt: skip
            if first['method'] == 'sbm':
                for row in rows:
                    if row[0] == 'the teachers, one per task':
                        row[-3] = f'{first["parameters_of_teachers"]:,}'
    return rows


def attributes_table(results: list[dict]) -> list[list[str]]:
    """Accuracy and balanced accuracy: means over the wanted attributes, and of each of them."""
    names = results[0]['attributes']
    columns = 'accuracy', 'balanced', *names, 'images it is surest of', 'best balanced*'
    rows = [['', *columns, 'epochs', 'seeds', 'parameters']]

    def cells(figures: list[dict]) -> list[str]:
        def mean(key: str) -> str:
            return spread([f[key] for f in figures]) if key in figures[0] else ''

        each = [f'{mean(f"accuracy_{name}")} ({mean(f"balanced_{name}")})' for name in names]
        return [
            mean('accuracy'),
            mean('balanced'),
            *(text.replace(' ()', '') for text in each),
            mean('surest_of'),
        ]

    if all(r['method'] == 'scratch' for r in results):  # networks that become sources
        return rows
    usual = statistics.mean(results[0]['majority'].values())
    rows.append(['majority vote', f'{usual:.2f}', '50.00', *[''] * (len(names) + 5)])
    for runs in group([r for r in results if r['method'] == 'ensemble']).values():
        sources = [key for key in runs[0]['ensembles'] if key.startswith('source')]
        for i, teacher in enumerate(runs[0]['teachers']):
            read = [r['ensembles'][sources[i]] if sources else r['teachers'][i] for r in runs]
            if not sources:  # its means are of its own attributes
                read = [{k: v for k, v in one.items() if k not in ('accuracy', 'balanced')} for one in read]
            name = f'teacher {i + 1}, {teacher["name"]}: {", ".join(teacher["attributes"])}'
            size = _size(teacher, 2 * len(teacher['attributes']))
            rows.append([name, *cells(read), '', '', len(runs), size])
        for key in runs[0]['ensembles'].keys() - set(sources):
            rows.append([key, *cells([r['ensembles'][key] for r in runs]), '', '', len(runs), ''])
    trained = group([r for r in results if r['method'] != 'ensemble'])
    order = sorted(
        trained, key=lambda k: (k[3] != 'scratch', -statistics.mean(_last(trained[k], 'balanced')))
    )
    for key in order:
        runs = trained[key]
        name = f'{key[3]} ({"reads labels" if key[3] == "scratch" else runs[0]["student"]})'
        if runs[0].get('branch_points'):
            points = dict.fromkeys(' / '.join(str(p + 1) for p in r['branch_points']) for r in runs)
            name = name.replace(')', f', streams leave after block {" or ".join(points)})')
        best = spread([r['best']['balanced'] for r in runs])
        rows.append([name, *cells([r['last'] for r in runs]), best, runs[0]['epochs'], len(runs),
                     _span(r['parameters'] for r in runs)])  # fmt: skip
    return rows


def backbones_table(results: list[dict]) -> list[list[str]]:
    """Accuracy of linear probes on the embedding of a frozen network, one per task of a teacher."""
    tasks = results[0]['probes']
    keys = ['mean', *(f'task{i}' for i in range(1, len(tasks) + 1))]
    rows = [['linear probes of', 'mean', *tasks, 'epochs', 'seeds', 'parameters']]
    for runs in group([r for r in results if r['method'] == 'ensemble']).values():
        for key in runs[0]['ensembles']:
            figures = [spread([r['ensembles'][key][k] for r in runs]) for k in keys]
            teacher = key.removeprefix('teacher ')
            name = f'{key}, {runs[0]["teachers"][int(teacher) - 1]["name"]}' if teacher.isdigit() else key
            rows.append([name, *figures, '', len(runs), ''])
        own = [spread([r['teachers'][i]['accuracy'] for r in runs]) for i in range(len(tasks))]
        rows.append(["the teachers' own heads", '', *own, '', len(runs), ''])
    trained = group([r for r in results if r['method'] != 'ensemble'])
    for key in sorted(
        trained, key=lambda k: (k[3] != 'scratch', -statistics.mean(_last(trained[k], 'mean')))
    ):
        runs = trained[key]
        name = f'{key[3]} ({"reads labels" if key[3] == "scratch" else runs[0]["student"]})'
        rows.append([name, *(spread(_last(runs, k)) for k in keys), runs[0]['epochs'], len(runs),
                     f'{runs[0]["parameters"]:,}'])  # fmt: skip
    return rows


def _size(net: dict, classes: int) -> str:
    """Parameters, also of a slimmed teacher; older results say its name only."""
    built = net.get('parameters') or sum(p.numel() for p in models.build(net['name'], classes).parameters())
    return f'{built:,}'


def _span(numbers: Iterable[int]) -> str:
    """The number, or the smallest and the largest: seeds choose branches of their own."""
    numbers = sorted(numbers)
    return ' to '.join(dict.fromkeys(f'{number:,}' for number in (numbers[0], numbers[-1])))


def _last(runs: list[dict], key: str) -> list[float]:
    return [r['last'][key] for r in runs]


def _parts(*figures: dict) -> str:
    """Means over runs."""
    found = [f'part{i}' for i in range(1, 20) if f'part{i}' in figures[0]]
    return ' / '.join(f'{statistics.mean(f[part] for f in figures):.2f}' for part in found)


def _routed(*matrices: list[list[float]]) -> str:
    parts = range(len(matrices[0]))
    return ' / '.join(f'{statistics.mean(matrix[i][i] for matrix in matrices):.1f}' for i in parts)


def markdown(rows: list[list]) -> str:
    lines = ['| ' + ' | '.join(map(str, row)) + ' |' for row in rows]
    return '\n'.join([lines[0], '|---' * len(rows[0]) + '|', *lines[1:]]) + '\n'


def tables(results: list[dict]) -> list[tuple[str, list[list]]]:
    """[(title, rows)]: one per experiment."""
    made = ka_rows.tables(results)
    results = [r for r in results if not is_of_a_tool(r)]
    made += ka_claims.tables(results)
    experiments = dict.fromkeys((r['data'], r.get('teacher') or '', r['experiment']) for r in results)
    for data, teacher, experiment in experiments:
        mine = [
            r
            for r in results
            if (r['data'], r.get('teacher') or '', r['experiment']) == (data, teacher, experiment)
        ]
        if 'tasks' in mine[0]:
            rows, title = dense_table(mine), f'{data}: {", ".join(mine[0]["tasks"])}'
        elif 'probes' in mine[0]:
            rows, title = backbones_table(mine), f'{data}, one backbone of {teacher}'
        elif 'attributes' in mine[0]:
            rows, title = attributes_table(mine), f'{data}, {experiment}: {", ".join(mine[0]["attributes"])}'
        else:
            rows, classes = parts_table(mine), len(mine[0]['classes'])
            title = f'{data}, {len(mine[0]["parts"])} teachers ({teacher}), {classes} classes'
            if [(d, t) for d, t, _ in experiments].count((data, teacher)) > 1:
                title += f': {experiment}'
        if len(rows) > 1:
            made.append((title, rows))
    return made


def text_of(made: list[tuple[str, list[list]]]) -> str:
    return '\n'.join(f'**{title}**\n\n{markdown(rows)}' for title, rows in made) + f'\n{note_of(made)}\n'


def note_of(made: list[tuple[str, list[list]]]) -> str:
    """What the columns of these tables mean, each note once."""
    notes = dict.fromkeys(_note(rows[0]) for _, rows in made)
    return '\n'.join(n for n in notes if not any(other != n and other.startswith(n) for other in notes))


def _note(head: list[str]) -> str:
    if 'balanced' in head:
        return BALANCED
    if head[0].startswith('linear probes'):
        return PROBES
    joint = any(name.startswith('joint top-1') for name in head)
    selected = any(name.endswith('*') for name in head)
    return ' '.join([NOTE, *[JOINT] * joint, *[SELECTED] * selected])


def csv_of(made: list[tuple[str, list[list]]]) -> str:
    file = io.StringIO(newline='')
    for title, rows in made:
        csv.writer(file).writerows([[title], *rows, []])
    return file.getvalue()


def main() -> int:
    parser = Parser(__doc__)
    parser.add_argument('folders', nargs='+', help='where result files are')
    parser.add_argument('--out', required=True, help='folder for table.md and table.csv')
    parser.add_argument('--readme', help='file to put the tables into')
    parser.add_argument('--name', default='ka', help='name of the place in that file')
    args = parser.parse_args()
    results = read_results(args.folders)
    if not results:
        raise UserError(f'no results of train_ka.py below {", ".join(args.folders)}')
    made = tables(results)
    text = text_of(made)
    out = output_folder(Path(args.out))
    (out / 'table.md').write_text(text)
    (out / 'table.csv').write_bytes(csv_of(made).encode())
    ka_rows.figure(results, out / 'rounds.png')
    ka_claims.figure(results, out / 'claims.png')
    if args.readme:
        insert(Path(args.readme), args.name, text)
    print(text)
    return 0
