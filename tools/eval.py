"""Print the accuracy of checkpoints: `python tools/eval.py --net_name resnet20 --data_name cifar10 FILE...`

Reads every file that --t_model reads: ours (also of methods that add layers to the student), RepDistiller's,
mdistiller's, Knowledge-Distillation-Zoo's, chenyaofo's, timm's. A file that does not fit, or that was trained
for other classes, is reported in its line; the exit code then is 2.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import models  # noqa: E402
import utils  # noqa: E402


def parse_args():
    parser = utils.Parser(__doc__)
    parser.add_argument('files', nargs='+', metavar='FILE', help='checkpoints of one architecture')
    parser.add_argument('--net_name', required=True, metavar='NAME', help=models.NAMES)
    utils.add_data_flags(parser)
    utils.add_machine_flags(parser)
    return parser.parse_args()


def main():
    args = parse_args()
    args.seed = 0  # nothing is drawn here
    device = utils.setup(args)
    with utils.user_errors():
        models.build(args.net_name)  # an unknown name is no file's fault
    _, test = utils.read_data(args, device)
    width, failed = max(map(len, args.files)), False
    print(f'{"file":{width}}   top-1   top-5   on {len(test)} test images of {args.data_name}')
    for path in args.files:
        try:
            with utils.user_errors():
                net = models.build_for(path, args.net_name, test.num_classes)
            row = utils.load_teacher(net, path, test, utils.autocast(device, args.amp))
        except utils.UserError as error:
            print(f'{path:{width}}   {error}')
            failed = True
            continue
        print(f'{path:{width}}  {row["top1"]:6.2f}  {row["top5"]:6.2f}   {row["said"]}')
    if failed:
        raise utils.UserError('some files could not be measured')


if __name__ == '__main__':
    utils.run(main)
