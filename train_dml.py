"""Train two or more networks together that learn from each other: no teacher, any architectures.

    python train_dml.py --kd_mode dml --net_names resnet20 resnet20
    python train_dml.py --kd_mode kdcl --net_names resnet32 resnet20 resnet8
    torchrun --nproc_per_node=2 train_dml.py ...       several processes, --batch_size images each

The networks start from different seeds (--seed, --seed + 1, ...) and step together, from one forward pass of
each. Every network is reported, and the ensemble of all.

Writes to SAVE_ROOT/NOTE: log.txt, args.json, last.pt, best.pt (all, at the epoch of the best mean accuracy),
net1.pt, net2.pt, ... (plain weights of the last epoch), peers.pt (all of them), metrics.csv, results.json.
"""

import time
from functools import partial
from pathlib import Path

import engine.threads  # noqa: F401  before torch

import torch
import torch.nn.functional as F

import models
from engine import errors, listing, optimise, session
from engine.batch import Batch
from engine.data import labelled_part, load_data, refuse_too_few
from engine.device import autocast, compile_networks, exact, setup
from engine.errors import NonFinite, user_errors
from engine.evaluate import outputs
from engine.flags import (
    RATE,
    add_common_flags,
    add_head_flag,
    add_optimiser_flag,
    check_head,
    data_words,
    with_rate,
)
from engine.meter import Meter
from engine.optimise import optimiser
from engine.parser import Parser
from engine.peers import Reading, build_networks, build_step, read_method
from engine.processes import distributed, processes, rank
from engine.recipe import math_args, resume_point
from engine.record import Record, class_names_of, fingerprint, output_folder, provenance, save_checkpoint
from engine.session import Log
from methods import PEERS


def parse_args():
    parser = Parser(__doc__)
    # fmt: off
    flag = parser.add_argument_group('mutual learning').add_argument
    flag('--kd_mode', nargs=1, required=True, metavar='METHOD', action=listing.lists(PEERS),
         help='a method; list: print all, what they need, their weights and arguments')
    flag('--lambda_kd', nargs='+', default=[], metavar='W',
         help="weight of the loss; default: the method's, see --kd_mode list")
    flag('--kd_args', nargs='+', default=[], metavar='KEY=VALUE', help='arguments of the loss, e.g. T=2')
    flag('--net_names', nargs='+', required=True, metavar='NAME',
         help=f'two or more of {models.NAMES}')
    flag('--net_inits', nargs='+', default=[], metavar='FILE',
         help='initial weights, one file per network; default: drawn from --seed, --seed + 1, ...')
    add_head_flag(flag, '--net_inits')
    # fmt: on
    add_common_flags(parser, lr=None, rate=RATE)
    add_optimiser_flag(parser)
    return with_rate(parser.parse_args())


def main():
    args = parse_args()
    check_head(args, '--net_inits')
    method, weight, options = read_method(args)
    device = setup(args)
    amp = autocast(device, args.amp)
    name = f'{args.kd_mode[0]}-{args.data_name.replace(":", "")}-{"-".join(args.net_names)}-s{args.seed}'
    folder = output_folder(Path(args.save_root) / (args.note or name))
    log = Log(folder)

    train, val, test = load_data(args, device, log)
    train = labelled_part(train)
    refuse_too_few(train, args.batch_size)
    nets = build_networks(args, train.num_classes, device, log)
    initial = [fingerprint(net) for net in nets]
    step = build_step(args, method, options, nets, train, amp, device)
    opt = optimiser(step.parameters(), args)
    opts = method.own.optimisers(step.kd, step.peers) if method.own.optimisers else {}
    rates = {key: other.param_groups[0]['lr'] for key, other in opts.items()}
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == 'fp16')
    generator = torch.Generator(device)

    origin = provenance(device) | class_names_of(train)
    recipe = math_args(args, script='train_dml', nets=args.net_names, initial=initial,
                       method=[args.kd_mode[0], weight, options])  # fmt: skip
    state = {'net': step.peers, 'kd': step.kd, 'opt': opt, 'scaler': scaler, **opts}
    record = Record(folder, state, recipe, origin, 'val' if val else 'test')
    record.resume(resume_point(args.resume, folder))
    views = [f'view {k}' for k in range(1, len(nets))] if 'each' in method.needs.views else []
    log(f'{args.kd_mode[0]}: {", ".join(args.net_names)} on {args.data_name}: {len(train)} + {len(test)} '
        f'images, {device}')  # fmt: skip

    compile_networks(args, *step.peers.nets)
    reading, whole = Reading(step), distributed(step, device)
    steps = train.steps(args.batch_size)
    live = session.start(
        args, log, origin, [record], val=val, done=record.epoch, epochs=args.epochs, steps=steps
    )
    for epoch in range(record.epoch, args.epochs):
        started = time.time()
        lr = optimise.learning_rate(args, epoch)
        if method.own.each_epoch:
            with user_errors():
                method.own.each_epoch(step.kd, lambda: held_out(reading, val))
        generator.manual_seed(args.seed * 1_000_003 + epoch + 7919 * rank())
        torch.manual_seed(args.seed * 1_000_003 + epoch + 7919 * rank())  # dropout
        inner = method.when.inner and method.when.inner(epoch, args.epochs)
        meters = [Meter(f'net{k}', epoch, device) for k in range(1, len(nets) + 1)]
        step.train()

        batches = train.train_batches(args.batch_size, args.seed, epoch, views)
        for number, (img, target, index, more) in enumerate(batches, 1):
            now = optimise.learning_rate(args, epoch + (number - 0.5) / steps)
            optimise.set_learning_rate(opt, now)
            for key, other in opts.items():
                optimise.set_learning_rate(other, rates[key] * now / args.lr)
            batch = Batch(img, target, index, more, now=epoch, epochs=args.epochs, generator=generator,
                          inner=inner)  # fmt: skip
            outs, loss_ce, loss_kd = whole(batch)
            loss = weight * loss_kd
            if method.when.ce:
                loss = method.when.ce * loss_ce + loss
            if not meters[0].guard(loss, opt):
                break
            opt.zero_grad(set_to_none=True)
            scaler.scale(loss).backward()
            scaler.step(opt)
            scaler.update()
            if method.own.second_update:
                method.own.second_update(step.kd, step.peers, batch, opts, meters[0].guard)
                if meters[0].failure:
                    break
            for meter, out in zip(meters, outs):
                meter.add(out, target, ce=F.cross_entropy(out.detach(), target), **{args.kd_mode[0]: loss_kd})
            live.bar.update()
            if not live.bar.disable and number % args.print_freq == 0:
                live.bar.set_postfix_str(
                    f'epoch {epoch + 1}, ce of net1: {meters[0].read().get("ce", 0):.3f}'
                )

        means = [meter.read(step) for meter in meters]
        if meters[0].failure:
            failure = meters[0].failure.replace('net1', args.kd_mode[0], 1)
            log(f'stopped: {failure}')
            record.save_best()
            raise NonFinite(failure)
        name = args.kd_mode[0]
        row = {'epoch': epoch + 1, 'lr': lr, name: means[0][name]}
        for k, mean in enumerate(means, 1):
            row |= {f'net{k}_ce': mean['ce'], f'net{k}_train_top1': mean['train_top1']}
        row |= measure(reading, val, test)
        row['seconds'] = time.time() - started
        done = [(record, row, partial(epoch_line, name, args.epochs, len(nets)), '')]
        if code := session.end_epoch(live, epoch, epoch + 1 == args.epochs, done):
            return code

    last = record.history[-1]
    for k in range(len(nets)):
        weights = models.named_weights(step.peers.weights(k), train.class_names, args.own_scale)
        save_checkpoint(folder / f'net{k + 1}.pt', weights)
    each = {f'net{k}': {'name': net, 'top1': last[f'net{k}_test_top1'], 'top5': last[f'net{k}_test_top5']}
            for k, net in enumerate(args.net_names, 1)}  # fmt: skip
    facts = {'script': 'train_dml', 'method': args.kd_mode[0], 'student': '+'.join(args.net_names),
             'teacher': None, 'data': args.data_name, 'seed': args.seed, 'epochs': args.epochs, **each,
             'ensemble': {'top1': last['ensemble_test_top1'], 'top5': last['ensemble_test_top5']},
             'processes': processes()}  # fmt: skip
    lines = [f'{key} {value["name"]}: top-1 {value["top1"]:.2f}' for key, value in each.items()]
    lines.append(f'ensemble: top-1 {last["ensemble_test_top1"]:.2f}')
    for k, net in enumerate(args.net_names, 1):
        path = folder / f'net{k}.pt'
        how = models.how_to_load(path, net, data_words(args), train.num_classes, train)
        lines.append(f'weights: {how}')
    session.finish(live, [(record, 'peers.pt', facts, 'mean of the networks', '\n'.join(lines))])


def epoch_line(name: str, epochs: int, nets: int, row: dict) -> str:
    each = '  '.join(f'{row[f"net{k}_test_top1"]:.2f}' for k in range(1, nets + 1))
    return (
        f'epoch {row["epoch"]}/{epochs}  {name} {row[name]:.4f}  test {each}  '
        f'ensemble {row["ensemble_test_top1"]:.2f}  {row["seconds"]:.0f} s'
    )


def held_out(reading: Reading, val):
    """Logits of each network and labels on the validation split, if there is one."""
    if not val:
        return None
    outs, target = outputs(reading, val)
    return outs[:-1], target  # without the ensemble


def measure(reading: Reading, val, test) -> dict[str, float]:
    """Accuracies of each network and the ensemble; test_top1 (and val_top1) is the networks' mean."""
    row = {}
    for half, data in (('val', val), ('test', test)):
        if not data:
            continue
        outs, target = outputs(reading, data)
        ranked = outs.topk(min(5, outs.shape[2]), dim=2).indices == target[None, :, None]
        top1, top5 = (100 * exact(ranked[:, :, :k].any(dim=2)).mean(dim=1) for k in (1, 5))
        row |= {f'{half}_top1': float(top1[:-1].mean()), f'{half}_top5': float(top5[:-1].mean())}
        for k in range(len(outs)):
            name = 'ensemble' if k == len(outs) - 1 else f'net{k + 1}'
            row |= {f'{name}_{half}_top1': float(top1[k]), f'{name}_{half}_top5': float(top5[k])}
    return row


if __name__ == '__main__':
    errors.run(main)
