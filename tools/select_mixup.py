"""Active mixup: choose mixes of a few unlabelled images, for a teacher to label (Wang et al., CVPR 2020).

    python tools/select_mixup.py --data_name cifar10 --real 500 --out save/pool0
    python tools/pseudo_labels.py --data_name arrays --img_root save/pool0 --t_name resnet56 \\
        --t_model save/teacher/net.pt --kind hard --out save/pool0/labels
    python train_kd.py --kd_mode fkd_labels --data_name arrays --img_root save/pool0 \\
        --soft_labels save/pool0/labels --s_name resnet20 --note active0
    python tools/select_mixup.py --data_name cifar10 --real 500 --select 10000 --s_name resnet20 \\
        --s_model save/active0/fkd_labels/student.pt --out save/pool1

and so on, with save/pool1. Without --s_model the pool is the real images alone; with it, those and the mixes
of which this student is least sure, each at the worst of eleven shares. No label of the data is read;
--earlier keeps the mixes of earlier pools.

Writes OUT/train.npz and OUT/test.npz, which every script reads as --data_name arrays --img_root OUT (the test
set is the data's own), and OUT/pool.json.
"""

import io
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import engine.threads  # noqa: E402, F401  before torch

import numpy as np  # noqa: E402
import torch  # noqa: E402

import dataset  # noqa: E402
import models  # noqa: E402
from dataset.arrays import read_arrays  # noqa: E402
from dataset.mixup import all_pairs, hardest, mix  # noqa: E402
from engine import errors  # noqa: E402
from engine.data import read_data  # noqa: E402
from engine.device import autocast, setup  # noqa: E402
from engine.errors import UserError, user_errors  # noqa: E402
from engine.flags import (  # noqa: E402
    add_data_flags,
    add_machine_flags,
    positive_int,
    refuse_given,
    seed_number,
)
from engine.parser import Parser  # noqa: E402
from engine.record import output_folder, provenance, write_atomic  # noqa: E402
from engine.teachers import load_teacher  # noqa: E402


def parse_args(words=None):
    parser = Parser(__doc__)
    # fmt: off
    flag = parser.add_argument
    flag('--out', required=True, metavar='FOLDER', help='where train.npz, test.npz and pool.json go')
    flag('--real', type=positive_int, default=500, metavar='R',
         help='unlabelled images that there are, drawn by --seed; default 500')
    flag('--s_name', metavar='NAME', help=f'student: {models.NAMES}')
    flag('--s_model', metavar='FILE', help="the student's weights; without, no mixes are chosen")
    flag('--select', type=positive_int, default=10000, metavar='N', help='mixes to choose, default 10000')
    flag('--pairs', type=positive_int, metavar='N',
         help='pairs to look at, drawn by --seed; default: every image with its (R - 1) // 2 next ones, '
              'eleven looks each')
    flag('--earlier', nargs='*', default=[], metavar='FOLDER',
         help='pools whose mixes are kept beside, each mix once')
    flag('--seed', type=seed_number, default=2, help='of the real images and of --pairs, default 2')
    # fmt: on
    add_data_flags(parser)
    add_machine_flags(parser)
    return parser.parse_args(words)


def main():
    args = parse_args()
    if bool(args.s_name) != bool(args.s_model):
        raise UserError('--s_name and --s_model: give both, or none for a pool without mixes')
    if not args.s_model:
        refuse_given(args, {'select': 10000, 'pairs': None}, 'no mixes are chosen without --s_model')
    for read in (args.img_root, *args.earlier):
        if Path(read).resolve() == Path(args.out).resolve():
            raise UserError(f'--out {args.out}: is read, too, and would be overwritten: give another folder')
    device = setup(args)
    train, test = read_data(args, device)
    if not isinstance(train, dataset.Resident):
        raise UserError(f'--data_name {args.data_name}: mixes are of sets in memory, not of folders')
    if args.real > len(train):
        raise UserError(f'--real {args.real}: there are {len(train)} training images')
    generator = torch.Generator().manual_seed(args.seed)
    real = train.images[torch.randperm(len(train), generator=generator)[: args.real].to(device)]
    pool, facts = [real], {'real': args.real, 'data': args.data_name, 'seed': args.seed, 'mixes': 0}
    for folder in args.earlier:
        with user_errors():
            (images, _), *_ = read_arrays(Path(folder))
        check_pool(Path(folder) / 'pool.json', facts)
        pool.append(torch.from_numpy(images[args.real :]).to(device))
    if args.s_model:
        amp = autocast(device, args.amp)
        with user_errors():
            net = models.build_for(args.s_model, args.s_name, train.num_classes)
        measured = load_teacher(net, args.s_model, test, amp)
        pairs = all_pairs(args.real)
        if args.pairs:
            pairs = pairs[torch.randperm(len(pairs), generator=generator)[: args.pairs]]
        if args.select > len(pairs):
            raise UserError(f'--select {args.select}: there are {len(pairs)} pairs')

        @torch.no_grad()
        def top(images):
            with amp():
                out = net(train._normalise(images))
            return out.float().softmax(dim=1).amax(dim=1)

        pairs, shares = hardest(top, real, pairs, args.select)
        mixes = mix(real, pairs, shares)
        pool.append(mixes)
        sure = float(torch.cat([top(some) for some in mixes.split(500)]).mean())
        facts |= {'student': args.s_name, 'student_top1': measured['top1'], 'mean_top_probability': sure}
        print(
            f'student {args.s_name}: top-1 {measured["top1"]:.2f}; of the chosen mixes it is {sure:.2f} sure'
        )
    images = np.concatenate([real.cpu().numpy(), once(torch.cat(pool).cpu().numpy()[args.real :])])
    folder = output_folder(Path(args.out))
    names = np.array(train.class_names or [str(c) for c in range(train.num_classes)])
    save_arrays(folder / 'train.npz', images=images, labels=np.full(len(images), -100), class_names=names,
                mean=np.array(train.mean), std=np.array(train.std))  # fmt: skip
    save_arrays(folder / 'test.npz', images=test.images.cpu().numpy(), labels=test.targets.cpu().numpy())
    facts['mixes'] = len(images) - args.real
    write_atomic(folder / 'pool.json', json.dumps(facts | provenance(device), indent=1).encode())
    print(f'{folder}: {args.real} real images and {facts["mixes"]} mixes, without labels')


def once(images: np.ndarray) -> np.ndarray:
    """Each where it stands first: an earlier pool may hold those of pools before it, too."""
    if not len(images):
        return images
    _, first = np.unique(images.reshape(len(images), -1), axis=0, return_index=True)
    return images[np.sort(first)]


def save_arrays(path: Path, **arrays) -> None:
    file = io.BytesIO()
    np.savez(file, **arrays)
    write_atomic(path, file.getvalue())


def check_pool(path: Path, facts: dict) -> None:
    """An earlier pool begins with the same real images; what follows them are its mixes."""
    try:
        pool = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f'--earlier: {path}: {error}') from None
    if not isinstance(pool, dict):
        raise UserError(f'--earlier: {path}: is not of this tool')
    for key in ('real', 'data', 'seed'):
        if pool.get(key) != facts[key]:
            raise UserError(
                f'--earlier {path.parent}: its {key} was {pool.get(key)!r}, is {facts[key]!r} here'
            )


if __name__ == '__main__':
    errors.run(main)
