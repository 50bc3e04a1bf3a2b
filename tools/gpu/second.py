"""A borrowed GPU, second command (ten minutes): the other half of the data, a teacher (unless there is one)
beside the checks, then as many students as fit, group after group. docs/gpu.md says how to use it.

    python tools/gpu/second.py
    python tools/gpu/second.py --first 6 --checks 0 --more 170       for this command and 170 s of another
    python tools/gpu/second.py --first 6 --checks 0 --deadline 165   that other: it goes on
    python tools/gpu/second.py --device cpu --data shapes:100 --epochs 5 --first 4 --checks 0 --keep keep \\
        --out out --flags "--batch_size 32" --teacher none     a rehearsal

What is done lies in archives under OUT, written again after every group: results.tgz (logs, results, checks)
and weights0.tgz, ... of twelve networks each.
"""

import argparse
import csv
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.cuda import ROWS  # noqa: E402
from dataset.cifar import bad_files  # noqa: E402
from methods import KD  # noqa: E402

TEACHER = 'results/cifar10-resnet20-resnet20-200epochs'
STUDENTS = (
    'logits at sp pkt rkd cc fitnet ofd nst vid irg afd crd lwm fsp ab ft'  # st: done; sobolev, bss: dear
)


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flag = parser.add_argument
    flag('--device', default='cuda')
    flag('--data', default='cifar10', help='default cifar10')
    flag('--packed', type=Path, default='.gpu', help='what pack.py made; default .gpu')
    flag(
        '--teacher',
        type=Path,
        metavar='FOLDER',
        default=TEACHER,
        help=f'PREFIX-resnet20-s2.pt and .json of a teacher are there; default {TEACHER}; none: train one',
    )
    flag('--keep', type=Path, default=Path.home() / 'keep', help='data, checkpoints; in memory if possible')
    flag('--out', type=Path, default=os.environ.get('OUT', 'out'), help='archives, default $OUT or out')
    flag('--epochs', type=int, default=200, help='default 200')
    flag('--deadline', type=float, default=575, help='seconds for everything, default 575')
    flag('--students', nargs='+', default=STUDENTS.split(), help='methods, in this order')
    flag('--more', type=float, default=0, help='seconds of a further command that goes on; default 0')
    flag('--first', type=int, default=4, help='students of the first group, default 4')
    flag('--checks', type=int, default=4, help='processes of benchmarks.cuda beside the teacher, default 4')
    flag('--rows', nargs='+', default=ROWS, help='methods they check, default all')
    flag('--flags', default='', help='more flags for the training scripts')
    return parser.parse_args()


class Lease:
    """The time that is left, and where things lie."""

    def __init__(self, args) -> None:
        self.args, self.started = args, time.time()
        self.end = self.started + args.deadline
        self.save, self.logs = args.keep / 'save', args.keep / 'logs'
        for folder in (args.out, self.logs):
            folder.mkdir(parents=True, exist_ok=True)
        self.common = ['--data_name', args.data, '--img_root', args.keep / 'data', '--save_root', self.save,
                       '--device', args.device, '--amp', 'bf16', '--epochs', args.epochs, '--cuda_graphs',
                       '--deterministic', '--save_every', 25, '--resume', 'auto',
                       *args.flags.split()]  # fmt: skip

    @property
    def left(self) -> float:
        return self.end - time.time()

    def say(self, *words) -> None:
        print(f'== {time.time() - self.started:.0f} s:', *words, flush=True)

    def start(self, name: str, *words) -> subprocess.Popen:
        log = open(self.logs / f'{name}.log', 'w')
        return subprocess.Popen([sys.executable, *map(str, words)], stdout=log, stderr=subprocess.STDOUT)

    def rows(self, *path: str) -> list[dict]:
        """metrics.csv of a run so far."""
        file = self.save.joinpath(*path) / 'metrics.csv'
        return list(csv.DictReader(file.open())) if file.exists() else []

    def show(self, name: str) -> None:
        print((self.logs / f'{name}.log').read_text()[-1500:])

    def pack(self) -> None:
        """The archives, each replaced in one step."""
        wanted = ('results.json', 'metrics.csv', 'log.txt', 'args.json')
        small = [f for f in sorted([*self.save.rglob('*'), *self.logs.iterdir()])
                 if f.suffix == '.log' or f.name in wanted or f.name.startswith('check')]  # fmt: skip
        nets = sorted(f for name in ('student.pt', 'net.pt', 'initial.pt') for f in self.save.rglob(name))
        archives = {'results': small} | {
            f'weights{k // 12}': nets[k : k + 12] for k in range(0, len(nets), 12)
        }
        for name, files in archives.items():
            with tarfile.open(self.args.out / '.new', 'w:gz', compresslevel=1) as tar:
                for f in files:
                    tar.add(f, f.relative_to(self.args.keep))
            os.replace(self.args.out / '.new', self.args.out / f'{name}.tgz')


def main() -> int:
    args = parse_args()
    os.environ |= {'OMP_NUM_THREADS': '1', 'PYTHONUNBUFFERED': '1', 'PYTHONPATH': '.',
                   'CUDA_DEVICE_MAX_CONNECTIONS': '32', 'TORCH_CUDAGRAPH_GC': '1'}  # fmt: skip
    lease = Lease(args)
    if args.data == 'cifar10':
        words = [sys.executable, 'tools/gpu/pack.py', 'unpack', str(args.packed), str(args.keep / 'data')]
        print(subprocess.run(words, capture_output=True, text=True).stdout)
        if bad := bad_files('cifar10', args.keep / 'data' / 'cifar-10-batches-bin'):
            lease.say('STOP', bad[0], '(the first command brought the other half: send it again)')
            return 3
    checks = []
    for k in range(args.checks):
        goals = ['record', 'agree', 'waiting', *(['draws'] if k == 0 else [])]
        words = [
            '-m',
            'benchmarks.cuda',
            *goals,
            '--device',
            args.device,
            '--out',
            lease.logs / f'check{k}.json',
        ]
        checks.append(lease.start(f'check{k}', *words, '--rows', *args.rows[k :: args.checks]))
    if not train_teacher(lease):
        return 4
    train_students(lease)
    for k, check in enumerate(checks):
        try:
            check.wait(max(lease.left, 1))
        except subprocess.TimeoutExpired:
            check.kill()
        lines = (lease.logs / f'check{k}.log').read_text().splitlines()
        print('\n'.join(line for line in lines if line.endswith(' NO')))
        print(f'check{k}: {check.poll()}, {len(lines)} lines')
    lease.pack()
    lease.say('done')
    return 0


def train_teacher(lease: Lease) -> bool:
    folder, given = lease.save / 'teacher', lease.args.teacher
    parts = {'net.pt': 'baseline-resnet20-s2.pt', 'initial.pt': 'initial-resnet20-s2.pt',
             'results.json': 'baseline-resnet20-s2.json'}  # fmt: skip
    if all((given / part).exists() for part in parts.values()):
        folder.mkdir(parents=True, exist_ok=True)
        for name, part in parts.items():
            shutil.copy(given / part, folder / name)
        return True
    words = ['train_base.py', '--net_name', 'resnet20', '--note', 'teacher', *lease.common]
    code = lease.start('teacher', *words).wait()
    lease.say('teacher', code, *[row['test_top1'] for row in lease.rows('teacher')[-1:]])
    lease.pack()
    if code:
        lease.show('teacher')
    return not code


def train_students(lease: Lease) -> None:
    """Groups of as many students as the time left allows; what does not fit is tried again, smaller."""
    todo, size = lease.args.students, lease.args.first
    begun = [int(path.parts[-3].rpartition('-')[2]) for path in lease.save.glob(f'{todo[0]}-*/*/last.pt')]
    size = max(begun, default=size)  # of an earlier command, which may have found that fewer fit
    while todo and size >= 1 and lease.left > 30:
        names, born = todo[:size], time.time()
        group = f'{names[0]}-{len(names)}'  # the same in a further command, which finds its checkpoints
        teacher = lease.save / 'teacher'
        words = ['train_kd.py', '--kd_mode', *names, '--t_name', 'resnet20', '--t_model', teacher / 'net.pt',
                 '--s_name', 'resnet20', '--s_init', teacher / 'initial.pt', '--note', group]  # fmt: skip
        process = lease.start(group, *words, *lease.common)
        if (fitting := students_that_fit(lease, process, group, names)) < len(names):
            process.kill()
            size = fitting
            continue
        while process.poll() is None and lease.left > 0:
            time.sleep(1)
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            process.wait()
        last = {name: (lease.rows(group, name) or [{}])[-1].get('test_top1') for name in names}
        lease.say(group, 'code', process.returncode, last)
        if process.returncode not in (0, 1):
            lease.show(group)
        lease.pack()
        todo = todo[len(names) :]
        size = int(len(names) * 0.9 * (lease.left - 15) / (time.time() - born))


def students_that_fit(lease: Lease, process, group: str, names: list[str]) -> int:
    """All, or how many, judged by the third epoch."""

    def longest() -> list[dict]:
        return max((lease.rows(group, name) for name in names), key=len)  # one may have diverged

    while process.poll() is None and len(longest()) < 3 and lease.left > 0:
        time.sleep(1)
    rows = longest()
    if not 3 <= len(rows) <= 5:  # stopped, or a former command has judged
        return len(names)
    phases = max(KD[name].when.pretrain + KD[name].when.alone for name in names)  # of 200, before them
    busy = sum(len(lease.rows(group, name)) >= 3 for name in names)  # in phases of some the others wait
    need = float(rows[2]['seconds']) * (lease.args.epochs * (len(names) / busy + phases / 200) - len(rows))
    left = lease.left - 8 + lease.args.more
    lease.say(
        group, f'{len(names)} students, {rows[2]["seconds"]} s per epoch, needs {need:.0f} of {left:.0f} s'
    )
    return len(names) if need <= left else int(len(names) * 0.9 * (left - 12) / need)


if __name__ == '__main__':
    sys.exit(main())
