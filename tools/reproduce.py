"""Fill the result tables: run what results/grid.json wants and results/ does not have.

    python tools/reproduce.py --dry-run            print what is missing
    python tools/reproduce.py --budget 60          train for an hour at most, then stop at a checkpoint
    python tools/reproduce.py --only NAME          one table of the grid

The grid is a list of tables: {"name", "data", "teacher", "student", "epochs", "seeds", "methods" (a list, or
"all" rows of METHODS), "flags", "group" (students per process)}. Per seed the teacher and the student alone
are trained first (their weights stay in SAVE_ROOT), then the missing methods in groups that share the
teacher's forward. A finished run's results.json is copied to results/NAME. Kill it at any moment and start it
again: every training continues from its last epoch. A method that results/NAME has for this seed, these
networks, this data and length is not trained again.
"""

import json
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import utils  # noqa: E402
from kd_losses import METHODS  # noqa: E402


def parse_args():
    parser = utils.Parser(__doc__)
    # fmt: off
    flag = parser.add_argument
    flag('--grid', type=Path, default=ROOT / 'results' / 'grid.json', help='default results/grid.json')
    flag('--results', type=Path, default=ROOT / 'results', help='where results are kept, default results')
    flag('--only', nargs='+', metavar='NAME', help='only these tables')
    flag('--budget', type=utils.positive_float, metavar='MIN', help='minutes; default: no limit')
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
        raise utils.UserError(f'{args.grid}: {error}') from None
    names = [table['name'] for table in grid]
    if unknown := set(args.only or names) - set(names):
        raise utils.UserError(f'--only: no table is called {", ".join(sorted(unknown))}; there are {names}')
    end = time.time() + 60 * args.budget if args.budget else float('inf')
    for table in grid:
        if table['name'] not in (args.only or names):
            continue
        for seed in table['seeds']:
            for run in jobs(table, seed, args):
                if args.dry_run:
                    print(shlex.join(['python', *run.words]), flush=True)
                elif code := run.do(end):
                    return code
    return 0


class Job:
    """One training command, and which of its results are kept where."""

    def __init__(self, words: list[str], kept: dict[Path, Path]) -> None:
        self.words, self.kept = words, kept

    def do(self, end: float) -> int:
        """0, or the exit code to leave with; at the end of the budget the script stops at a checkpoint."""
        if time.time() > end:
            print('budget used up; run again to continue')
            return 128 + signal.SIGTERM
        process = subprocess.Popen([sys.executable, *self.words], cwd=ROOT)
        try:
            process.wait(timeout=None if end == float('inf') else max(end - time.time(), 1))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)
            process.wait()
            process.returncode = process.returncode and 128 + signal.SIGTERM
        for source, place in self.kept.items():
            if source.exists():
                place.parent.mkdir(parents=True, exist_ok=True)
                utils.write_atomic(place, source.read_bytes())
        return process.returncode


def jobs(table: dict, seed: int, args) -> list[Job]:
    """The trainings that a seed of a table still lacks, in order; none if it is complete."""
    root, place = Path(args.save_root).resolve(), args.results / table['name']
    common = ['--data_name', table['data'], '--img_root', args.img_root, '--save_root', str(args.save_root),
              '--epochs', str(table['epochs']), '--seed', str(seed), '--resume', 'auto',
              *shlex.split(table.get('flags', ''))]  # fmt: skip

    def run_name(net: str) -> str:
        return f'base-{table["data"].replace(":", "")}-{net}-e{table["epochs"]}-s{seed}'

    def base(kind: str, net: str) -> Job:
        name = run_name(net)
        wanted = ['train_base.py', '--net_name', net, '--note', name, *common]
        return Job(wanted, {root / name / 'results.json': place / f'{kind}-{net}-s{seed}.json'})

    methods = [name for name, m in METHODS.items() if not m.peers and name != 'tfkd_self' and not m.team]
    methods = methods if table['methods'] == 'all' else table['methods']
    save = Path(args.save_root)
    pair = ['--t_name', table['teacher'], '--t_model', str(save / run_name(table['teacher']) / 'net.pt'),
            '--s_name', table['student'],
            '--s_init', str(save / run_name(table['student']) / 'initial.pt')]  # fmt: skip
    missing = [name for name in methods if not finished(place, name, seed, table)]
    if not missing and finished(place, 'baseline', seed, table):
        return []
    todo = [base('teacher', table['teacher']), base('baseline', table['student'])]
    group = table.get('group', 8)
    for first in range(0, len(missing), group):
        part = missing[first : first + group]
        note = f'kd-{table["name"]}-s{seed}-{part[0]}'
        words = ['train_kd.py', '--kd_mode', *part, *pair, '--note', note, *common]
        todo.append(
            Job(words, {root / note / name / 'results.json': place / f'{name}-s{seed}.json' for name in part})
        )
    return todo


def finished(place: Path, method: str, seed: int, table: dict) -> bool:
    """Whether results/NAME has this method with this seed, networks, data and length."""
    for path in place.glob('*.json'):
        r = json.loads(path.read_text())
        student = table['student']
        if (r.get('method'), r.get('seed'), r.get('student'), r.get('data'), r.get('epochs')) == (
            method, seed, student, table['data'], table['epochs'],
        ):  # fmt: skip
            return True
    return False


if __name__ == '__main__':
    utils.run(main)
