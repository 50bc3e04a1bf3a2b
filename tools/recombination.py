"""Join the weights of several teachers into one network, prune and retrain it (ka_losses/recombination.py).

    python tools/recombination.py --t_name resnet20 --t_model half0.pt half1.pt --data_name cifar10 \\
        --rounds 5 --epochs 2

The teachers are CIFAR ResNets of one architecture that know a part of the classes each. Joined, they stand
side by side in one network: its logits are theirs, exactly. Every round takes the filters with the smallest
L1 norm out of the inner convolutions of the blocks (counted in units of their layer's mean), then retrains
what is left on the teachers' joined logits, without labels, which also fills the zeros between the teachers'
blocks. After --rounds rounds the network has no more parameters than --target. Beside it stands a fresh
network of the teachers' architecture for all classes, trained on the same targets for as many epochs.

Writes to SAVE_ROOT/NOTE: log.txt, args.json, results.json with the table, and the folders round1, ..., fresh
with last.pt (continued by --resume auto), best.pt, student.pt, metrics.csv, results.json.
"""

import copy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import engine.threads  # noqa: E402, F401  before torch

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

import models  # noqa: E402
from engine import errors  # noqa: E402
from engine.data import load_data  # noqa: E402
from engine.device import autocast, setup  # noqa: E402
from engine.errors import UserError, user_errors  # noqa: E402
from engine.flags import add_common_flags, any_number, positive_float, positive_int  # noqa: E402
from engine.ka_tools import (  # noqa: E402
    begin,
    check_places,
    class_teachers,
    in_order,
    part_figures,
    record_of,
    sound,
    train,
    write_table,
)
from engine.parser import Parser  # noqa: E402
from engine.recipe import math_args  # noqa: E402
from engine.record import class_names_of, fingerprint, provenance, write_json  # noqa: E402
from ka_losses.recombination import SoftFocal, combine_models  # noqa: E402
from models import slimming  # noqa: E402


def parse_args():
    parser = Parser(__doc__)
    # fmt: off
    flag = parser.add_argument_group('recombination').add_argument
    flag('--t_name', required=True, nargs=1, metavar='NAME', help='all teachers: a resnet of CIFAR')
    flag('--t_model', nargs='+', required=True, metavar='FILE', help='their checkpoints')
    flag('--split', choices=('contiguous', 'interleaved', 'random'), default='contiguous',
         help='which classes go together, as for train_base.py')
    flag('--rounds', type=positive_int, default=5, help='of pruning and retraining, default 5')
    flag('--target', type=positive_int, metavar='N',
         help='parameters after the last round; default: those of one such network for all classes')
    flag('--gamma', type=any_number, default=0.0, metavar='G',
         help='soft focal loss: how much less easy images count; 0 is cross-entropy with the joined logits, '
              'default 0')
    flag('--alpha', type=positive_float, default=1.0, metavar='A', help='its factor, default 1')
    # fmt: on
    add_common_flags(parser, epochs=30, lr=1e-3, rate="Adam's, default 0.001; --epochs are of each round")
    return parser.parse_args()


def main():
    args = parse_args()
    device = setup(args)
    amp = autocast(device, args.amp)
    folder, log = begin(
        args, f'recombination-{args.data_name.replace(":", "")}-{args.t_name[0]}-s{args.seed}'
    )
    data, _, test = load_data(args, device, log)
    split, teachers, known = class_teachers(args, data, test, amp, log)
    data, test = in_order(data, split), in_order(test, split)
    with user_errors():
        slimming.groups(teachers[0])  # refuses other networks
        loss = SoftFocal(args.gamma, args.alpha)
        joined = Recombined(combine_models(teachers), len(teachers)).to(device)
        torch.manual_seed(args.seed)
        rival = models.build(args.t_name[0], len(split.classes)).to(device)
    joined.requires_grad_(True)
    target, full = args.target or count(rival), count(joined)
    if not least(joined) <= target < full:
        raise UserError(
            f'--target {target}: must be from {least(joined)} to less than the {full} of the joined teachers'
        )
    origin = provenance(device) | class_names_of(data)
    recipe = math_args(
        args, script='recombination', teachers=[fingerprint(t) for t in teachers], parts=split.parts,
        rounds=args.rounds, target=target, gamma=args.gamma, alpha=args.alpha,
    )  # fmt: skip
    check_places(args, folder, [*(f'round{k + 1}' for k in range(args.rounds)), 'fresh'])
    write_json(folder / 'args.json', {'args': vars(args), **origin})
    facts = {'script': 'recombination', 'method': 'recombination', 'student': args.t_name[0],
             'teacher': '+'.join(args.t_name * len(teachers)), 'data': args.data_name, 'parts': split.parts,
             'seed': args.seed, 'epochs': args.rounds * args.epochs}  # fmt: skip

    def learn(net, place: str, first: int, epochs: int, row: dict):
        """Retrain on the teachers' joined logits; epochs of the whole run before these: first."""
        opt = torch.optim.Adam(net.parameters(), args.lr, weight_decay=args.weight_decay)
        record = record_of(
            folder / place, {'net': net, 'opt': opt}, recipe | {'network': place}, origin, args
        )

        def step(img, *_):
            net.train()
            with torch.no_grad(), amp():
                out_t = torch.cat([teacher(img).float() for teacher in teachers], dim=1)
            with amp():
                out = net(img)
            value, terms = loss(out.float(), out_t, return_terms=True)
            sound(value, out_t)
            opt.zero_grad(set_to_none=True)
            value.backward()
            opt.step()
            return {'loss': value, **terms}

        def batches(epoch):
            return data.train_batches(args.batch_size, args.seed, first + epoch)

        train(record, place, [opt], batches, data.steps(args.batch_size), step, lambda: measured(net), args,
              log, epochs)  # fmt: skip
        last = record.history[-1]
        row |= {'joint top-1': last['test_top1'], 'each part, if known': last['test_known'],
                'epochs': first + epochs}  # fmt: skip
        log(f'{place}: {record.finish("student.pt", facts)}')
        return row

    def measured(net) -> dict[str, float]:
        return {f'test_{key}': value for key, value in part_figures([net], test, split, amp).items()}

    def shown(name: str, nets: list[nn.Module], **more) -> dict:
        read = part_figures(nets, test, split, amp)
        return {'row': name, 'parameters': sum(map(count, nets)), 'joint top-1': read['top1'],
                'each part, if known': read['known'], **more}  # fmt: skip

    rows = [
        shown('the teachers, logits side by side', teachers),
        shown('their weights in one network', [joined]),
    ]
    log(f'{full} parameters joined, {target} wanted after {args.rounds} rounds')
    net = joined
    for k in range(args.rounds):
        net = prune(net, full + (target - full) * (k + 1) // args.rounds)
        read = measured(net)['test_top1']
        row = {'row': f'round {k + 1}', 'parameters': count(net), 'joint top-1, pruned only': read}
        rows.append(learn(net, f'round{k + 1}', k * args.epochs, args.epochs, row))
    row = {'row': 'the same architecture from fresh weights', 'parameters': count(rival)}
    rows.append(learn(rival, 'fresh', 0, args.rounds * args.epochs, row))
    columns = (
        'row',
        'parameters',
        'joint top-1, pruned only',
        'joint top-1',
        'each part, if known',
        'epochs',
    )
    rows = [{key: row[key] for key in columns if key in row} for row in rows]
    what = (
        f'{len(teachers)} x {args.t_name[0]} in one network, {target} parameters left, gamma {args.gamma:g}'
    )
    facts |= {'title': what, 'teachers': known, 'recipe': recipe}
    write_table(folder, facts, rows, origin, log)


class Recombined(nn.Module):
    """The joined network; it reads the image once per teacher."""

    def __init__(self, body: nn.Module, times: int) -> None:
        super().__init__()
        self.body, self.times = body, times

    def forward(self, img: Tensor) -> Tensor:
        return self.body(img.repeat(1, self.times, 1, 1))


def count(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def inner(net: Recombined) -> tuple[list[slimming.Group], list[int]]:
    """The inner convolutions of the blocks, and the parameters that one filter of each is worth."""
    groups = [group for group in slimming.groups(net.body) if group.name.endswith('.conv1')]
    costs = []
    for group in groups:
        conv, reader = (net.body.get_submodule(names[0]) for names in (group.convs, group.readers))
        costs.append(conv.weight[0].numel() + 2 + reader.weight[:, 0].numel())  # 2: batch norm
    return groups, costs


def least(net: Recombined) -> int:
    """Parameters with one filter left in every inner convolution."""
    groups, costs = inner(net)
    filters = [len(net.body.get_submodule(group.convs[0]).weight) for group in groups]
    return count(net) - sum(cost * (n - 1) for cost, n in zip(costs, filters))


def prune(net: Recombined, budget: int) -> Recombined:
    """Without the smallest filters, so that at most this many parameters are left."""
    groups, costs = inner(net)
    values = [v / v.mean() for v in slimming.scores(net.body, groups, 'l1')]
    keep = [torch.ones(len(v), dtype=torch.bool, device=v.device) for v in values]
    order = sorted((float(x), g, k) for g, v in enumerate(values) for k, x in enumerate(v))
    left = count(net)
    for _, g, k in order:
        if left <= budget:
            break
        if keep[g].sum() > 1:
            keep[g][k] = False
            left -= costs[g]
    small = copy.deepcopy(net)
    small.body = slimming.shrink(net.body, groups, keep)
    return small


if __name__ == '__main__':
    errors.run(main)
