"""Print the accuracy of checkpoints: `python tools/eval.py --net_name resnet20 --data_name cifar10 FILE...`

Reads every file that --t_model reads: ours (also of methods that add layers to the student), RepDistiller's,
mdistiller's, Knowledge-Distillation-Zoo's, chenyaofo's, timm's. A file that does not fit, or that was trained
for other classes, is reported in its line; the exit code then is 2. Networks that know a part of the data's
classes (train_base.py --num_parts or --classes, students of train_ka.py) are measured on these: --classes.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import engine.threads  # noqa: E402, F401  before torch

import dataset  # noqa: E402
import models  # noqa: E402
from engine import errors  # noqa: E402
from engine.data import read_data  # noqa: E402
from engine.device import autocast, setup  # noqa: E402
from engine.errors import UserError, user_errors  # noqa: E402
from engine.flags import add_data_flags, add_machine_flags  # noqa: E402
from engine.parser import Parser  # noqa: E402
from engine.teachers import load_teacher  # noqa: E402


def parse_args():
    parser = Parser(__doc__)
    parser.add_argument('files', nargs='+', metavar='FILE', help='checkpoints of one architecture')
    parser.add_argument('--net_name', required=True, metavar='NAME', help=models.NAMES)
    parser.add_argument('--classes', metavar='LIST',
        help='the classes of the data that the files know, in the order of their logits, e.g. 5-9 or 0,2,4; '
             'default all')  # fmt: skip
    add_data_flags(parser)
    add_machine_flags(parser)
    return parser.parse_args()


def main():
    args = parse_args()
    args.seed = 0  # nothing is drawn here
    device = setup(args)
    with user_errors():
        models.build(args.net_name)  # an unknown name is no file's fault
    _, test = read_data(args, device)
    if args.classes:
        with user_errors():
            test = dataset.take_classes(test, dataset.read_classes(args.classes, test.num_classes))
    width, failed, some = max(map(len, args.files)), False, args.classes and f', classes {args.classes}'
    print(f'{"file":{width}}   top-1   top-5   on {len(test)} test images of {args.data_name}{some or ""}')
    for path in args.files:
        try:
            with user_errors():
                net = models.build_for(path, args.net_name, test.num_classes)
            row = load_teacher(net, path, test, autocast(device, args.amp), head='')
        except UserError as error:
            print(f'{path:{width}}   {error}')
            failed = True
            continue
        print(f'{path:{width}}  {row["top1"]:6.2f}  {row["top5"]:6.2f}   {row["said"]}')
    if failed:
        hint = '' if args.classes else '; those that know a part of the classes need --classes LIST'
        raise UserError(f'some files could not be measured{hint}')


if __name__ == '__main__':
    errors.run(main)
