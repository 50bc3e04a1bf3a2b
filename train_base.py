"""Train one network with cross-entropy: teachers, and the baselines that students are compared with.

    python train_base.py --net_name resnet20 --data_name cifar10
    python train_base.py --net_name resnet20 --data_name cifar10 --num_parts 2 --part 0   half the classes

Writes to SAVE_ROOT/NOTE: initial.pt (the random weights, for --s_init of train_kd.py), last.pt, best.pt,
net.pt (plain weights of the last epoch), metrics.csv, log.txt, args.json, results.json.
"""

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import engine.threads  # noqa: F401  before torch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dataset
import models
from engine import errors, optimise, session, side_by_side
from engine.batch import Batch
from engine.data import labelled_part, load_data, refuse_too_few
from engine.device import PRECISIONS, autocast, compile_networks, setup
from engine.errors import NonFinite, UserError, user_errors
from engine.evaluate import measure, measured, refuse_misfit
from engine.flags import (
    RATE,
    add_common_flags,
    add_graph_flag,
    add_head_flag,
    add_label_flag,
    add_optimiser_flag,
    check_head,
    data_words,
    fraction,
    head_of,
    positive_int,
    whole_number,
    with_rate,
)
from engine.meter import Meter
from engine.optimise import optimiser
from engine.parser import Parser
from engine.processes import distributed, rank
from engine.recipe import math_args, resume_point
from engine.record import Record, class_names_of, fingerprint, output_folder, provenance, save_checkpoint
from engine.session import Log
from engine.side_by_side import cast_weights


def parse_args():
    parser = Parser(__doc__)
    parser.add_argument('--net_name', required=True, metavar='NAME',
        help=models.NAMES)  # fmt: skip
    parser.add_argument('--init', metavar='FILE', help='start from these weights instead of random ones')
    add_head_flag(parser.add_argument, '--init')
    parser.add_argument('--keep', type=positive_int, metavar='N',
        help='also keep the weights of every N-th epoch, as epochN.pt, to distil along a route')  # fmt: skip
    parser.add_argument('--bn_l1', type=fraction, default=0.0, metavar='W',
        help='adds W times the sum of the absolute weights of all BatchNorm2d; 0.0001 in the paper of '
             'network slimming: tools/slim.py --kind bn tells channels apart by them; default 0')  # fmt: skip
    add_label_flag(parser.add_argument)
    # fmt: off
    flag = parser.add_argument_group('a part of the classes, for train_ka.py').add_argument
    flag('--num_parts', type=positive_int, metavar='N', help='cut the classes into so many parts')
    flag('--part', type=whole_number, metavar='I', help='... and train on this one, 0 to N - 1')
    flag('--split', choices=('contiguous', 'interleaved', 'random'), default='contiguous',
         help='which classes go together (random: after --seed); default contiguous')
    flag('--classes', metavar='LIST', help='or the classes themselves, e.g. 0-2,7')
    # fmt: on
    add_common_flags(parser, lr=None, rate=RATE)
    add_optimiser_flag(parser)
    add_graph_flag(parser)
    return with_rate(parser.parse_args())


def chosen_classes(args, num_classes: int) -> list[int] | None:
    """The classes to train on, None for all."""
    if (args.num_parts is None) != (args.part is None) or (args.classes and args.num_parts):
        raise UserError('say --num_parts N --part I, or --classes LIST')
    with user_errors():
        if args.classes:
            return dataset.read_classes(args.classes, num_classes)
        if args.num_parts is None:
            return None
        parts = dataset.split_classes(num_classes, args.num_parts, args.split, args.seed)
    if args.part >= args.num_parts:
        raise UserError(f'--part {args.part}: there are parts 0 to {args.num_parts - 1}')
    return parts[args.part]


def main():
    args = parse_args()
    check_head(args, '--init')
    device = setup(args)
    graphs = side_by_side.graphs_wanted(args, device)
    part = f'-classes{args.classes}' if args.classes else ''
    part = f'-part{args.part}of{args.num_parts}' if args.num_parts else part
    name = f'base-{args.data_name.replace(":", "")}-{args.net_name}{part}-s{args.seed}'
    folder = output_folder(Path(args.save_root) / (args.note or name))
    log = Log(folder)

    train, val, test = load_data(args, device, log)
    train = labelled_part(train)
    if classes := chosen_classes(args, train.num_classes):
        log(f'classes {", ".join(map(str, classes))} of {train.num_classes}')
        with user_errors():
            train, val, test = (data and dataset.take_classes(data, classes) for data in (train, val, test))
    if line := dataset.unseen(test, classes):
        log(line)
    refuse_too_few(train, args.batch_size)
    torch.manual_seed(args.seed)
    with user_errors():
        net = models.narrowed(models.build(args.net_name, train.num_classes), args.init)
        if args.init:
            said = models.load_weights(net, args.init, new_head=args.new_head, scale=(train.mean, train.std),
                                       head=head_of('--init'))  # fmt: skip
            log(f'initial weights: {said}')
    initial = copy.deepcopy(models.named_weights(net, train.class_names, args.own_scale))
    recipe = math_args(
        args, script='train_base', net=args.net_name, initial=fingerprint(net), classes=classes
    )
    net.to(device, memory_format=torch.channels_last)
    refuse_misfit(args.net_name, net, train)
    scales = [m.weight for m in net.modules() if isinstance(m, nn.BatchNorm2d) and m.affine]
    if args.bn_l1 and not scales:
        raise UserError(f'--bn_l1: {args.net_name} has no BatchNorm2d with weights')
    opt = optimiser(net.parameters(), args)
    amp = autocast(device, args.amp)
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == 'fp16')

    origin = provenance(device) | class_names_of(train)
    parts = {'net': net, 'opt': opt, 'scaler': scaler}
    record = Record(folder, parts, recipe, origin, 'val' if val else 'test')
    record.resume(resume_point(args.resume, folder))
    save_checkpoint(folder / 'initial.pt', initial)
    log(f'{args.net_name} on {args.data_name}: {len(train)} + {len(test)} images, {device}')

    compile_networks(args, net)
    steps, step = train.steps(args.batch_size), distributed(net, device)
    cast = PRECISIONS[args.amp] if graphs else None
    counters = side_by_side.host_counters(net) if graphs else []
    run = Run(
        args.net_name, step, opt, scaler, amp, Meter(args.net_name, 0, device), cast, counters, args.bn_l1,
        scales,
    )  # fmt: skip
    how = side_by_side.Graphs(device, log) if graphs else side_by_side.InTurn()
    live = session.start(
        args, log, origin, [record], val=val, done=record.epoch, epochs=args.epochs, steps=steps
    )
    for epoch in range(record.epoch, args.epochs):
        started = time.time()
        lr = optimise.learning_rate(args, epoch)
        run.meter.reset(epoch)
        torch.manual_seed(args.seed * 1_000_003 + epoch + 7919 * rank())  # dropout
        net.train()
        batches = train.train_batches(args.batch_size, args.seed, epoch)
        for number, batch in enumerate(how.looks(Batch, batches), 1):
            optimise.set_learning_rate(opt, optimise.learning_rate(args, epoch + (number - 0.5) / steps))
            how.train(train_step, [run], batch)
            if run.meter.failure:
                break
            live.bar.update()
            if not live.bar.disable and number % args.print_freq == 0:
                live.bar.set_postfix_str(f'epoch {epoch + 1}, loss {run.meter.read().get("ce", 0):.3f}')

        row = {'epoch': epoch + 1, 'lr': lr, **run.meter.read(net)}
        if run.meter.failure:
            log(f'stopped: {run.meter.failure}')
            record.save_best()
            raise NonFinite(run.meter.failure)
        row |= measured(measure(net, val, test, amp))
        row['seconds'] = time.time() - started
        if args.keep and (epoch + 1) % args.keep == 0:
            weights = models.named_weights(net, train.class_names, args.own_scale)
            save_checkpoint(folder / f'epoch{epoch + 1}.pt', weights)
        done = [(record, row, partial(epoch_line, record, args.epochs), '')]
        if code := session.end_epoch(live, epoch, epoch + 1 == args.epochs, done):
            return code

    facts = {'script': 'train_base', 'method': 'baseline', 'student': args.net_name, 'teacher': None,
             'data': args.data_name, 'classes': classes, 'seed': args.seed,
             'epochs': args.epochs}  # fmt: skip
    data = data_words(args, classes)
    how = models.how_to_load(folder / 'net.pt', args.net_name, data, train.num_classes, train)
    session.finish(live, [(record, 'net.pt', facts, args.net_name, f'weights: {how}')])


def epoch_line(record: Record, epochs: int, row: dict) -> str:
    return (
        f'epoch {row["epoch"]}/{epochs}  ce {row["ce"]:.4f}  train {row["train_top1"]:.2f}  '
        f'test {row["test_top1"]:.2f}  best {record.best["test_top1"]:.2f}  {row["seconds"]:.0f} s'
    )


@dataclass
class Run:
    """The network in training."""

    name: str
    net: nn.Module  # or DistributedDataParallel around it
    opt: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    amp: Callable
    meter: Meter
    cast: torch.dtype | None  # the precision into which weights are cast all at once, see --cuda_graphs
    counters: list[Tensor]  # counts of batches that are kept on the host, see --cuda_graphs
    bn_l1: float
    scales: list[Tensor]  # of the batch norms, see --bn_l1
    generators: tuple = ()  # none of its own: dropout draws from torch's global one, seeded every epoch
    usual_only: str = ''  # why a CUDA graph cannot repeat its step

    def decided(self):
        """What Python decides of a step: nothing that changes."""


def train_step(run: Run, batch: Batch) -> None:
    """Forward, backward, update."""
    with run.amp():
        if run.cast:
            out = torch.func.functional_call(run.net, cast_weights(run.net, run.cast), batch.img)
        else:
            out = run.net(batch.img)
    loss = ce = F.cross_entropy(out.float(), batch.target)
    if run.bn_l1:
        loss = ce + run.bn_l1 * sum(scale.abs().sum() for scale in run.scales)
    if not run.meter.guard(loss, run.opt):
        return
    run.opt.zero_grad(set_to_none=True)
    run.scaler.scale(loss).backward()
    run.scaler.step(run.opt)
    run.scaler.update()
    run.meter.add(out, batch.target, ce=ce)


if __name__ == '__main__':
    errors.run(main)
