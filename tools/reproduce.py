"""Fill the result tables: run what results/grid.json wants and results/ does not have.

    python tools/reproduce.py --dry-run            print what is missing
    python tools/reproduce.py --budget 60          train for an hour at most, then stop at a checkpoint
    python tools/reproduce.py --only NAME          the table NAME, or all whose names begin with NAME-
    python tools/reproduce.py --only NAME --table  and afterwards write its results/NAME/table.md

The grid is a list of tables: {"name", "data", "teacher" (one name, or a list for methods with several),
"student", "epochs", "seeds", "methods" (a list, or "all" rows of train_kd.py that these networks can do and
one teacher suffices for), "flags", "group" (students per process)}. A table of networks that learn from each
other has "nets", a list, instead of teacher and student; one of train_dense.py has "task", and "steps"
instead of epochs. Tables of the same name are parts of one. Where it is needed, a table has also
    "weights"       {method: weight of its loss}, otherwise the default of --lambda_kd
    "args"          {method: {argument of its loss: value}}
    "layers"        {method: its stages, as --kd_layers has them}
    "kd_flags"      flags besides "flags" that train_base.py does not know
    "method_flags"  {method: flags besides "flags"}; methods with different flags train in different processes
    "teacher_epochs", "teacher_seed", "teacher_flags"    if the teachers are not trained like the students
    "teacher_file"  weights of the teacher instead of training it, a file in IMG_ROOT or results/NAME/FILE
    "student_file"  weights that students of train_dense.py start from, likewise
    "recipe"        a word for the folders of teachers and students alone: other tables' flags differ
    "note"          what differs from the published table, and which values are not known

Per seed the teachers and the student alone are trained first (their weights stay in SAVE_ROOT), then the
missing methods in groups that share the teacher's forward. A finished run's results.json is copied to
results/NAME, but a teacher or student alone of the same recipe that is there stays. Kill it at any moment
and start it again: every training continues from its last epoch. What results/NAME holds with the same
recipe, as tools/missing.py compares them, is not trained again.

The exit code is 0 when nothing is missing, 1 when nothing is left but what has diverged or failed: look at
what it printed, as calling it again may not change that. After a change of the grid a training of the old
recipe is refused (2): delete its folder in SAVE_ROOT, which is NAME-sSEED/METHOD, NAME-sSEED-METHOD of
networks that learn from each other, base-... of teachers and of the student alone.
"""

import json
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import engine.threads  # noqa: E402, F401  before torch

from engine import errors  # noqa: E402
from engine.errors import UserError  # noqa: E402
from engine.flags import positive_float  # noqa: E402
from engine.parser import Parser  # noqa: E402
from engine.record import write_atomic  # noqa: E402
from methods import KD  # noqa: E402
from tools import missing  # noqa: E402

# what every table of the grid has, what those of its kind have besides, and what any may have
NEEDED = ('name', 'data', 'seeds', 'methods')
OF_KIND = {
    'task': ('task', 'teacher', 'teacher_file', 'student', 'student_file', 'steps'),
    'nets': ('nets', 'epochs'),
    'teacher': ('teacher', 'student', 'epochs'),
}
KNOWN = {'note', 'recipe', 'weights', 'args', 'layers', 'flags', 'kd_flags', 'method_flags', 'group',
         'teacher_epochs', 'teacher_seed', 'teacher_flags', *NEEDED, *sum(OF_KIND.values(), ())}  # fmt: skip


def parse_args():
    parser = Parser(__doc__)
    # fmt: off
    flag = parser.add_argument
    flag('--grid', type=Path, default=ROOT / 'results' / 'grid.json', help='default results/grid.json')
    flag('--results', type=Path, default=ROOT / 'results', help='where results are kept, default results')
    flag('--only', nargs='+', metavar='NAME', help='only these tables; NAME also means all NAME-...')
    flag('--table', action='store_true', help='then write table.md and accuracy.png of each table')
    flag('--budget', type=positive_float, metavar='MIN', help='minutes; default: no limit')
    flag('--save_root', default='./save/reproduce', help='checkpoints, default ./save/reproduce')
    flag('--img_root', default='./data', help='where the data lies, default ./data')
    flag('--dry_run', action='store_true', help='print the commands')
    # fmt: on
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    try:
        grid = json.loads(args.grid.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f'{args.grid}: {error}') from None
    tables = grid if isinstance(grid, list) else [grid]
    if not all(isinstance(table, dict) and {*NEEDED} <= table.keys() for table in tables):
        raise UserError(
            f'{args.grid}: wanted a list of tables, each with {", ".join(NEEDED)}, see results/grid.json'
        )
    for table in tables:
        refuse_misspelt(args.grid, table)
    names = list(dict.fromkeys(table['name'] for table in tables))
    for word in args.only or []:
        if not any(means(word, name) for name in names):
            raise UserError(f'--only: no table is called {word}; there are {", ".join(names)}')
    names = [name for name in names if not args.only or any(means(word, name) for word in args.only)]
    for key in ('save_root', 'img_root'):  # trainings run in the checkout, wherever this was called
        path = Path(getattr(args, key)).resolve()
        setattr(args, key, str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path))
    args.results = args.results.resolve()
    end = time.time() + 60 * args.budget if args.budget else float('inf')
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    failed = 0
    for table in tables:
        if table['name'] not in names:
            continue
        for seed in table['seeds']:
            for run in jobs(table, seed, args):
                if args.dry_run:
                    print(shlex.join(['python', *run.words]), flush=True)
                elif (code := run.do(end)) not in (0, 1):
                    return code if code > 0 else 128 - code  # less: a signal ended it
                else:  # 1: something diverged or failed; the rest of the grid is not to suffer
                    failed = failed or code
                    if code and run.needed:
                        break
    for place in [args.results / name for name in names if args.table]:
        dense = any('task' in table for table in tables if table['name'] == place.name)
        run = Job(['-m', 'report', 'dense' if dense else 'table', str(place), '--out', str(place)], {})
        if args.dry_run:
            print(shlex.join(['python', *run.words]))
        elif any(place.glob('*.json')):
            failed = run.do(end) or failed
    return failed


def refuse_misspelt(grid: Path, table: dict) -> None:
    """A key that nothing reads would be a table of another recipe than its writer meant."""
    kind = next((kind for kind in OF_KIND if kind in table), 'teacher')
    said = {
        'has no': [key for key in OF_KIND[kind] if key not in table],
        'has the unknown': sorted(table.keys() - KNOWN),
    }
    if said := [f'{words} {", ".join(keys)}' for words, keys in said.items() if keys]:
        raise UserError(
            f'{grid}: table {table["name"]} {" and ".join(said)}; keys are {", ".join(sorted(KNOWN))}'
        )


def start(words: list[str]) -> subprocess.Popen:
    """A training, in the checkout."""
    return subprocess.Popen([sys.executable, *words], cwd=ROOT)


def means(word: str, name: str) -> bool:
    """Whether --only word chooses this table."""
    return name == word or name.startswith(word + '-')


class Job:
    """One training command, which of its results are kept where, and whether those after it need it."""

    def __init__(self, words: list[str], kept: dict[Path, Path], needed: bool = False, base=False) -> None:
        self.words, self.kept, self.needed, self.base = words, kept, needed, base

    def do(self, end: float) -> int:
        """0, or the exit code to leave with; at the end of the budget the script stops at a checkpoint."""
        if time.time() > end:
            print('budget used up; run again to continue')
            return 128 + signal.SIGTERM
        process, told = start(self.words), False
        try:
            try:
                code = process.wait(timeout=None if end == float('inf') else max(end - time.time(), 1))
            except subprocess.TimeoutExpired:
                told = True
                process.send_signal(signal.SIGTERM)
                code = process.wait() and 128 + signal.SIGTERM
        except (SystemExit, KeyboardInterrupt) as stop:
            # it ends after its epoch; two must not write into one folder. A second signal would end it at
            # once, and Ctrl-C has reached it already
            if not told and isinstance(stop, SystemExit):
                process.send_signal(signal.SIGTERM)
            process.wait()
            raise
        for source, place in self.kept.items() if code != 2 else ():  # refused: an old result
            if source.exists() and not (self.base and self.stays(source, place)):
                place.parent.mkdir(parents=True, exist_ok=True)
                write_atomic(place, source.read_bytes())
        return code

    def stays(self, source: Path, place: Path) -> bool:
        """Whether a network of this recipe is there: kept students were compared with it or taught by it."""
        if not place.exists():
            return False
        new, old = (missing.read_json(path) for path in (source, place))
        start = new['recipe'].pop('initial', None)
        if not (old.get('recipe') and missing.done(new['recipe'], [old['recipe']])):
            return False  # the grid has changed, or the file is too old to say
        if new['curve'] != old['curve']:
            top1 = f'{new["last"]["top1"]:.2f} instead of {old["last"]["top1"]:.2f}'
            print(f"{place} is kept; this machine's run gave {top1}")
        if start != old['recipe'].get('initial', start) or self.needed and new['curve'] != old['curve']:
            role = 'are taught by' if self.needed else 'begin as'
            print(f'warning: students trained now {role} another network than those kept beside {place}')
        return True


def jobs(table: dict, seed: int, args) -> list[Job]:
    """The trainings that a seed of a table still lacks, in order; none if it is complete."""
    save, place = Path(args.save_root), args.results / table['name']
    root = ROOT / save
    if 'task' in table:
        return dense_jobs(table, seed, args, root, place)

    flags = table.get('flags', '')

    def common(epochs: int, seed: int, flags: str = flags) -> list[str]:
        return ['--data_name', table['data'], '--img_root', args.img_root, '--save_root', str(save),
                '--epochs', str(epochs), '--seed', str(seed), '--resume', 'auto',
                *shlex.split(flags)]  # fmt: skip

    def run_name(net: str, epochs: int, seed: int) -> str:
        recipe = f'-{table["recipe"]}' if 'recipe' in table else ''
        return f'base-{table["data"]}-{net}-e{epochs}-s{seed}{recipe}'.replace(':', '')

    def base(kind: str, net: str, epochs: int, seed: int, flags: str) -> Job:
        name = run_name(net, epochs, seed)
        words = ['train_base.py', '--net_name', net, '--note', name, *common(epochs, seed, flags)]
        kept = place / f'{kind}-{net.replace(":", "")}-s{seed}.json'
        taught = kind == 'teacher' or student in teachers  # or the student alone teaches its twins
        return Job(words, {root / name / 'results.json': kept}, taught, base=True)

    def trained(script: str, part: list[str], words: list[str]) -> Job:
        words = [*words, *losses(table, part)]
        note = f'{table["name"]}-s{seed}'  # one folder: students find their checkpoints in any company
        note += '' if script == 'train_kd.py' else f'-{part[0]}'
        results = {name: root / note / name if script == 'train_kd.py' else root / note for name in part}
        words = [script, '--kd_mode', *part, *words, '--note', note, *common(table['epochs'], seed),
                 *own_flags(table, part[0])]  # fmt: skip
        return Job(
            words,
            {folder / 'results.json': place / f'{name}-s{seed}.json' for name, folder in results.items()},
        )

    def lacking(script: str, names: list, words: list[str]) -> list:
        known = [json.loads(path.read_text()) for path in sorted(place.glob('*.json'))]
        recipes = [r['recipe'] for r in known if 'recipe' in r]

        def recipe(name):
            own = [*losses(table, [name]), *common(table['epochs'], seed), *own_flags(table, name)]
            return missing.wanted(script, name, [*words, *own])

        return [name for name in names if not missing.done(recipe(name), recipes)]

    epochs, methods = table['epochs'], table['methods']
    if 'nets' in table:
        words = ['--net_names', *table['nets']]
        return [trained('train_dml.py', [name], words) for name in lacking('train_dml.py', methods, words)]

    student = table['student'], epochs, seed, flags
    names = [table['teacher']] if isinstance(table['teacher'], str) else table['teacher']
    schooling = table.get('teacher_epochs', epochs), table.get('teacher_seed', seed)
    teachers = [(name, *schooling, table.get('teacher_flags', flags)) for name in names]
    files = [str(save / run_name(*t[:3]) / 'net.pt') for t in teachers]
    if 'teacher_file' in table:
        file = table['teacher_file']
        files, teachers = [file if file.startswith('results/') else str(Path(args.img_root) / file)], []
    words = ['--t_name', *names, '--t_model', *files, '--s_name', table['student'],
             '--s_init', str(save / run_name(*student[:3]) / 'initial.pt')]  # fmt: skip
    if methods == 'all':
        tokens = all(re.search('vit|deit', name) for name in (*names, table['student']))
        methods = [name for name, m in KD.items() if name != 'tfkd_self' and not m.needs.all_teachers
                   and (tokens or not m.needs.tokens)]  # fmt: skip
    methods = lacking('train_kd.py', methods, words)
    if not methods and not lacking('train_base.py', [None], ['--net_name', table['student']]):
        return []
    todo = [base('teacher', *t) for t in teachers if t != student] + [base('baseline', *student)]
    alike = {}
    for name in methods:
        alike.setdefault(tuple(own_flags(table, name)), []).append(name)
    group = table.get('group', 8)
    for names in alike.values():
        for first in range(0, len(names), group):
            todo.append(trained('train_kd.py', names[first : first + group], words))
    return todo


def dense_jobs(table: dict, seed: int, args, root: Path, place: Path) -> list[Job]:
    """Of train_dense.py; students that are there are known by their files."""
    methods = [name for name in table['methods'] if not (place / f'{name}-s{seed}.json').exists()]
    taught = ['--t_name', table['teacher'], '--t_model', Path(args.img_root) / table['teacher_file']]
    made = []
    group = table.get('group', len(methods))
    for first in range(0, len(methods), max(group, 1)):
        part = methods[first : first + group]
        note = f'{table["name"]}-s{seed}'
        words = ['train_dense.py', '--task', table['task'], '--kd_mode', *part, *losses(table, part),
                 *(taught if part != ['alone'] else []),
                 '--s_name', table['student'], '--s_init', str(Path(args.img_root) / table['student_file']),
                 '--data_name', table['data'], '--img_root', args.img_root, '--save_root', args.save_root,
                 '--steps', str(table['steps']), '--seed', str(seed), '--resume', 'auto', '--note', note,
                 *shlex.split(table.get('flags', ''))]  # fmt: skip
        kept = {root / note / name / 'results.json': place / f'{name}-s{seed}.json' for name in part}
        made.append(Job(list(map(str, words)), kept))
    return made


def losses(table: dict, tokens: list[str | None]) -> list[str]:
    """--lambda_kd, --kd_args, --kd_layers of these students, as the table says; None: a base network."""
    names = dict.fromkeys(name for token in tokens if token for name in token.split('+'))
    weights, given = table.get('weights', {}), table.get('args', {})
    weights = [f'{name}={weights[name]}' for name in names if name in weights]
    given = [f'{name}.{key}={value!r}' for name in names for key, value in given.get(name, {}).items()]
    layers = [f'{name}={stages}' for name, stages in table.get('layers', {}).items() if name in names]
    flags = {'--lambda_kd': weights, '--kd_args': given, '--kd_layers': layers}
    return [word for flag, values in flags.items() if values for word in (flag, *values)]


def own_flags(table: dict, token: str | None) -> list[str]:
    """Flags that only the distillation of this student gets."""
    if token is None:
        return []
    return shlex.split(table.get('kd_flags', '') + ' ' + table.get('method_flags', {}).get(token, ''))


if __name__ == '__main__':
    errors.run(main)
