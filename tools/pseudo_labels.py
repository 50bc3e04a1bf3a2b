"""Store what a teacher says of every crop that a training will see, once, for train_kd.py --soft_labels.

    python tools/pseudo_labels.py --t_name resnet56 --t_model save/teacher/net.pt --data_name cifar10 \\
        --label_epochs 20 --kind smooth5 --out save/labels
    python train_kd.py --kd_mode fkd_labels --soft_labels save/labels --data_name cifar10 --s_name resnet20

Students then need no teacher, only its answers (a black box), and pay no forward pass of it. The labels of
the data are not read; images may have none (IMG_ROOT/train/_unlabelled of a folder). A training with more
epochs than stored goes round; it must have the same --seed, since that decides the crops.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import engine.threads  # noqa: E402, F401  before torch

import torch  # noqa: E402

import models  # noqa: E402
from dataset.soft_labels import SAME, write_epoch  # noqa: E402
from engine import errors  # noqa: E402
from engine.data import load_data  # noqa: E402
from engine.device import autocast, setup  # noqa: E402
from engine.errors import UserError, user_errors  # noqa: E402
from engine.flags import (  # noqa: E402
    add_data_flags,
    add_machine_flags,
    fraction,
    positive_float,
    positive_int,
    seed_number,
)
from engine.ka_tools import refuse_processes  # noqa: E402
from engine.parser import Parser  # noqa: E402
from engine.record import class_names_of, fingerprint, provenance, write_atomic  # noqa: E402
from engine.session import progress_bar  # noqa: E402
from engine.teachers import load_teacher  # noqa: E402


def parse_args():
    parser = Parser(__doc__)
    # fmt: off
    flag = parser.add_argument
    flag('--t_name', required=True, metavar='NAME', help=f'teacher: {models.NAMES}')
    flag('--t_model', required=True, metavar='FILE', help="the teacher's checkpoint")
    flag('--out', required=True, metavar='FOLDER', help='where the labels go')
    flag('--label_epochs', type=positive_int, default=20, metavar='E',
         help='epochs of crops to label, default 20')
    flag('--kind', default='smooth5',
         help='what is kept of a crop: hard (the class), smoothing (and its probability), smooth5 (the five '
              'largest, the rest spread evenly; any number, at most that of the classes), renorm5 (the rest '
              '0), logits (all, in half precision); default smooth5')
    flag('--temp_t', type=positive_float, default=1.0, help='temperature of the teacher, default 1')
    flag('--seed', type=seed_number, default=2, help='of the crops, that of the training to come; default 2')
    flag('--batch_size', type=positive_int, default=256, help='default 256; changes nothing but the speed')
    flag('--val_split', type=fraction, default=0.0, metavar='F', help='that of the training to come')
    flag('--pad', choices=('reflect', 'zero'), default='reflect', help='that of the training to come')
    # fmt: on
    add_data_flags(parser)
    add_machine_flags(parser)
    return parser.parse_args()


def main():
    args = parse_args()
    folder = Path(args.out)
    if (folder / 'meta.json').exists():
        raise UserError(f'--out {folder}: there are labels already; choose another folder')
    refuse_processes()  # each would label its share alone
    device = setup(args)
    amp = autocast(device, args.amp)
    size, args.batch_size = max(args.batch_size, 2), 2  # any size will do
    train, _, test = load_data(args, device)
    with user_errors():
        net = models.build_for(args.t_model, args.t_name, train.num_classes)
    measured = load_teacher(net, args.t_model, test, amp)
    print(f'teacher {args.t_name}: {measured["said"]}')
    print(f'teacher {args.t_name}: top-1 {measured["top1"]:.2f} on the test set')
    size = min(size, len(train))
    while len(train) % size == 1:  # trainings leave out a last batch of one; here every image counts
        size += 1

    @torch.no_grad()
    def outs(epoch, bar):
        for img, _, index, _ in train.train_batches(size, args.seed, epoch):
            with amp():
                out = net(img)
            bar.update()
            yield index, out.float()

    bar = progress_bar(args.label_epochs * train.steps(size), 0, lambda line: print(line))
    with user_errors():
        for epoch in range(args.label_epochs):
            write_epoch(
                folder, epoch, len(train), outs(epoch, bar), args.kind, args.temp_t, train.num_classes
            )
    bar.close()
    meta = {name: getattr(args, name) for name in SAME} | {
        'kind': args.kind, 'temp_t': args.temp_t, 'epochs': args.label_epochs, 'images': len(train),
        'num_classes': train.num_classes, 'teacher': args.t_name, 'teacher_weights': fingerprint(net),
        'teacher_top1': measured['top1'], 'own_images': args.own_images,
    } | class_names_of(train) | provenance(device)  # fmt: skip
    write_atomic(folder / 'meta.json', json.dumps(meta, indent=1).encode())
    files = [path for path in folder.rglob('*.npy')]
    total = sum(path.stat().st_size for path in files)
    print(f'{folder}: {args.label_epochs} epochs x {len(train)} images, {args.kind}, {total / 1e6:.1f} MB')


if __name__ == '__main__':
    errors.run(main)
