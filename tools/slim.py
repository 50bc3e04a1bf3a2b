"""Prune the channels of a trained CIFAR ResNet, then distil the unpruned network into the narrow one.

    python tools/slim.py --net_name resnet56 --model save/teacher/net.pt --data_name cifar10 --kind taylor \\
        --how knapsack --ratio 0.5 --out save/slim
    python train_kd.py --kd_mode ikd --t_name resnet56 --t_model save/teacher/net.pt --s_name resnet56 \\
        --s_init save/slim/net.pt --data_name cifar10 --epochs 40 --lr 0.02

Writes net.pt, the narrow network under the same names, which every script that takes --net_name resnet56 can
load, and slim.json: parameters, multiply-adds and accuracy before and after.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import engine.threads  # noqa: E402, F401  before torch

import torch  # noqa: E402

import models  # noqa: E402
from engine import errors  # noqa: E402
from engine.data import labelled_part, own_scale, read_data  # noqa: E402
from engine.device import autocast, setup  # noqa: E402
from engine.errors import user_errors  # noqa: E402
from engine.evaluate import evaluate  # noqa: E402
from engine.flags import (  # noqa: E402
    add_data_flags,
    add_machine_flags,
    fraction,
    positive_int,
    refuse_given,
    seed_number,
)
from engine.parser import Parser  # noqa: E402
from engine.record import output_folder, provenance, save_checkpoint, write_atomic  # noqa: E402
from engine.teachers import load_teacher  # noqa: E402
from models import slimming  # noqa: E402


def parse_args():
    parser = Parser(__doc__)
    # fmt: off
    flag = parser.add_argument
    flag('--net_name', required=True, metavar='NAME', help='resnetN or resnetNx4')
    flag('--model', required=True, metavar='FILE', help='its weights')
    flag('--out', required=True, metavar='FOLDER', help='where net.pt and slim.json go')
    flag('--kind', choices=slimming.KINDS, default='taylor',
         help="what a channel is worth: its filter's norm, its batch norm's factor, its first order effect "
              'on cross-entropy, chance; default taylor')
    flag('--how', choices=slimming.HOWS, default='knapsack',
         help='which channels stay: a share of every group, one threshold, the best value for the '
              'multiply-adds, step by step or exactly; default knapsack')
    flag('--ratio', type=fraction, default=0.5,
         help='share that goes, of channels (uniform, global) or of multiply-adds, each layer with all its '
              'inputs: since they go as well, more does, as slim.json says; default 0.5')
    flag('--batches', type=positive_int, default=10, help='of 128 training images, for taylor; default 10')
    flag('--seed', type=seed_number, default=2, help='of the batches and of chance, default 2')
    # fmt: on
    add_data_flags(parser)
    add_machine_flags(parser)
    return parser.parse_args()


def main():
    args = parse_args()
    if not args.kind.startswith('taylor'):
        refuse_given(args, {'batches': 10}, f'--kind {args.kind} does not read it')
    device = setup(args)
    folder = output_folder(Path(args.out))
    amp = autocast(device, args.amp)
    train, test = read_data(args, device)
    train = labelled_part(train)
    with user_errors():
        net = models.build_for(args.model, args.net_name, train.num_classes)
    before = load_teacher(net, args.model, test, amp)
    batches = []
    for img, target, *_ in train.train_batches(128, args.seed, 0):
        batches.append((img, target))
        if len(batches) == args.batches:
            break
    size = test.images.shape[1] if hasattr(test, 'images') else args.image_size
    net.requires_grad_(True)
    with user_errors():
        groups = slimming.groups(net)
        generator = torch.Generator().manual_seed(args.seed)
        values = [v.float().cpu() for v in slimming.scores(net, groups, args.kind, batches, generator)]
        keep = slimming.select(values, slimming.costs(net, groups, size), args.ratio, args.how)
    small = slimming.shrink(net, groups, [mask.to(device) for mask in keep])
    facts = {}
    for name, n, measured in (('before', net, before), ('after', small, evaluate(small, test, amp))):
        facts[name] = {
            'parameters': sum(p.numel() for p in n.parameters()),
            'macs': slimming.macs(n, size),
            'top1': measured['top1'],
        }
        print(
            '{}: {parameters} parameters, {macs} multiply-adds, top-1 {top1:.2f}'.format(name, **facts[name])
        )
    weights = models.named_weights(small, train.class_names, own_scale(args.data_name, train))
    save_checkpoint(folder / 'net.pt', weights)
    facts |= {'kind': args.kind, 'how': args.how, 'ratio': args.ratio, 'seed': args.seed,
              'widths': {group.name: int(mask.sum()) for group, mask in zip(groups, keep)}}  # fmt: skip
    write_atomic(folder / 'slim.json', json.dumps(facts | provenance(device), indent=1).encode())


if __name__ == '__main__':
    errors.run(main)
