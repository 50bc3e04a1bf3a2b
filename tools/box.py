"""What a safe distillation box (sdb) says with and without its key, and what its students learnt.

    python train_kd.py --kd_mode sdb --t_name resnet20 --t_model save/teacher/net.pt --s_name resnet20 \\
        --s_init save/teacher/net.pt --note box
    python train_kd.py --kd_mode sdb_student st --lambda_kd st=1 --lambda_ce 0 --t_name resnet20 \\
        --t_model save/box/sdb/student.pt --s_name resnet8 --note boxed
    python tools/box.py --t_name resnet20 --t_model save/box/sdb/student.pt --out save/boxed \\
        --results "with the key=save/boxed/sdb_student/results.json" "without=save/boxed/st/results.json"

Writes OUT/box.json and OUT/box.png: accuracy of the box on plain images, with its key and with another one,
and of the students.
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parent.parent))

import engine.threads  # noqa: E402, F401  before torch

import torch  # noqa: E402

import models  # noqa: E402
from engine import errors  # noqa: E402
from engine.data import read_test  # noqa: E402
from engine.device import autocast, setup  # noqa: E402
from engine.errors import UserError, user_errors  # noqa: E402
from engine.flags import add_data_flags, add_machine_flags, seed_number  # noqa: E402
from engine.parser import Parser  # noqa: E402
from engine.record import output_folder, provenance, write_atomic  # noqa: E402
from engine.teachers import load_teacher  # noqa: E402
from kd_losses import sdb  # noqa: E402
from report.plot import pyplot  # noqa: E402
from report.table import read_json  # noqa: E402


def parse_args(words=None):
    parser = Parser(__doc__)
    # fmt: off
    flag = parser.add_argument
    flag('--t_name', required=True, metavar='NAME', help=f'the box: {models.NAMES}')
    flag('--t_model', required=True, metavar='FILE', help="the box's weights")
    flag('--key', type=seed_number, default=1, help='its key, default 1; the other one is the next number')
    flag('--results', nargs='*', default=[], metavar='NAME=FILE', help='results of students, with a name')
    flag('--out', required=True, metavar='FOLDER', help='where box.json and box.png go')
    flag('--seed', type=seed_number, default=2, help='changes nothing here; default 2')
    # fmt: on
    add_data_flags(parser)
    add_machine_flags(parser)
    return parser.parse_args(words)


def main():
    args = parse_args()
    device = setup(args)
    amp = autocast(device, args.amp)
    students = {}
    for word in args.results:
        name, equals, path = word.partition('=')
        if not equals:
            raise UserError(f'--results: expected NAME=FILE, got {word!r}')
        content = read_json(Path(path))
        try:
            students[name] = {'top1': content['last']['top1'], 'command': content['command']}
        except (KeyError, TypeError):
            raise UserError(f'{path}: is no results.json of a student') from None
    test = read_test(args, device)
    with user_errors():
        net = models.build_for(args.t_model, args.t_name, test.num_classes)
    said = {'plain images': load_teacher(net, args.t_model, test, amp)['top1']}
    for name, key in (('its key', args.key), ('another key', args.key + 1)):
        kd = sdb.build_student(sdb.SDBStudent, SimpleNamespace(train_set=test), key)
        right = 0
        with torch.no_grad(), amp():
            for img, target, *_ in test.test_batches(250):
                right += int((net(sdb.with_key(kd, img)).argmax(dim=1) == target).sum())
        said[name] = 100 * right / len(test)
    facts = {'box': said, 'students': students} | provenance(device)
    folder = output_folder(Path(args.out))
    write_atomic(folder / 'box.json', json.dumps(facts, indent=1).encode())
    figure(facts, folder / 'box.png')
    print('; '.join(f'box, {name}: {top1:.2f}' for name, top1 in said.items()))
    print('; '.join(f'student, {name}: {fact["top1"]:.2f}' for name, fact in students.items()))


def figure(facts: dict, path: Path) -> None:
    if not (plt := pyplot(f'{path}: not drawn,')):
        return
    bars = [(f'box: {name}', top1, 'grey') for name, top1 in facts['box'].items()]
    bars += [(f'student: {name}', fact['top1'], 'C0') for name, fact in facts['students'].items()]
    chart, axes = plt.subplots(figsize=(6.4, 0.4 * len(bars) + 1), layout='constrained')
    names, values, colours = zip(*bars[::-1])
    axes.bar_label(axes.barh(names, values, color=colours), fmt='%.1f', padding=2)
    axes.set(xlabel='top-1 on the test set, %', xlim=(0, 108))
    chart.savefig(path, dpi=130)
    plt.close(chart)


if __name__ == '__main__':
    errors.run(main)
