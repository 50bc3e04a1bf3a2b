"""Distil one frozen teacher into one or many students, with any method of kd_losses.

    python train_kd.py --kd_mode st --t_name resnet20 --t_model save/base/net.pt --s_name resnet8
    python train_kd.py --kd_mode at rkd pkt+st ...     three students at once; + adds losses on one student

All students start from the same weights and see the same batches and the same teacher forward. A student's
result is bit for bit (on the CPU) the one it gets when trained alone.

Writes to SAVE_ROOT/NOTE: log.txt, args.json, and for each student a folder with last.pt, best.pt, student.pt
(plain weights of the last epoch), metrics.csv, results.json.
"""

import copy
import inspect
import math
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn

import models
import utils
from kd_losses import METHODS, Method


def parse_args():
    parser = utils.Parser(__doc__)
    # fmt: off
    flag = parser.add_argument_group('distillation').add_argument
    flag('--kd_mode', nargs='+', required=True, metavar='METHOD',
         help=f'one student per word, methods joined by + share a student: {", ".join(METHODS)}')
    flag('--lambda_kd', nargs='+', default=[], metavar='W',
         help='weight of the loss beside cross-entropy: a number, or METHOD=number with several methods; '
              'defaults: ' + ', '.join(f'{name} {m.weight:g}' for name, m in METHODS.items()))
    flag('--kd_args', nargs='+', default=[], metavar='KEY=VALUE',
         help='arguments of the loss, e.g. T=8, or METHOD.KEY=VALUE with several methods, e.g. st.T=8')
    flag('--t_name', required=True, metavar='NAME',
         help=f'teacher: {", ".join(models.MODELS)}, any resnetN or resnetNx4 with N = 6n + 2')
    flag('--t_model', required=True, metavar='FILE', help="the teacher's checkpoint")
    flag('--s_name', required=True, metavar='NAME', help='student, one of the same names')
    flag('--s_init', metavar='FILE',
         help='initial weights of all students, e.g. initial.pt of train_base.py; default: drawn from --seed '
              'just as there')
    # fmt: on
    utils.add_common_flags(parser)
    return parser.parse_args()


@dataclass
class Run:
    """One student in training: everything that belongs to it and to no other."""

    name: str
    parts: list[tuple[Method, float, nn.Module]]  # method, weight, loss
    ce: float  # weight of cross-entropy
    net: nn.Module
    opt: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    generator: torch.Generator  # for losses that draw
    record: utils.Record
    meter: utils.Meter | None = None


def main():
    args = parse_args()
    wanted = read_methods(args)
    device = utils.setup(args)
    amp = utils.autocast(device, args.amp)
    name = f'kd-{args.data_name.replace(":", "")}-{args.t_name}-{args.s_name}-s{args.seed}'
    folder = utils.output_folder(Path(args.save_root) / (args.note or name))
    log = utils.Log(folder)

    train, val, test = utils.load_data(args, device)
    with utils.user_errors():
        net_t = models.build(args.t_name, train.num_classes)
    teacher = utils.load_teacher(net_t, args.t_model, test, amp)
    log(f'teacher {args.t_name}: {teacher["said"]}')
    log(f'teacher {args.t_name}: top-1 {teacher["top1"]:.2f}, top-5 {teacher["top5"]:.2f} on the test set')
    torch.manual_seed(args.seed)
    with utils.user_errors():
        net_s = models.build(args.s_name, train.num_classes)
        if args.s_init:
            log(f'initial student: {models.load_weights(net_s, args.s_init)}')

    origin = utils.provenance(device)
    runs = build_runs(args, wanted, folder, origin, net_s, net_t, train, 'val' if val else 'test', device)
    utils.write_json(folder / 'args.json', {'args': vars(args), **origin})
    board = utils.tensorboard(folder, args.tensorboard)
    stop = utils.StopAfterEpoch()
    start = min(run.record.epoch for run in runs)
    log(f'{len(runs)} x {args.s_name} on {args.data_name}: {len(train)} + {len(test)} images, {device}')
    log(f'{start} of {args.epochs} epochs done, output in {folder}')
    if not val:
        log('best.pt is selected on test data (--val_split holds out training images for that)')

    steps, failures = -(-len(train) // args.batch_size), []
    bar = utils.progress_bar(steps * args.epochs, steps * start, log)
    for epoch in range(start, args.epochs):
        started = time.time()
        lr = utils.learning_rate(args, epoch)
        active = [run for run in runs if run.record.epoch == epoch]  # a kill may leave some one epoch ahead
        for run in active:
            run.net.train()
            for _, _, loss in run.parts:
                loss.train()
            for group in run.opt.param_groups:
                group['lr'] = lr
            run.generator.manual_seed(args.seed * 1_000_003 + epoch)
            run.meter = utils.Meter(run.name, epoch, device)

        for img, target, index in train.train_batches(args.batch_size, args.seed, epoch):
            with torch.no_grad(), amp:
                t = net_t(img, True)
            t = utils.as_float(t)

            for run in list(active):
                with amp:
                    s = run.net(img, True)
                s = utils.as_float(s)
                b = SimpleNamespace(img=img, target=target, index=index, epoch=epoch, net_s=run.net,
                                    net_t=net_t, generator=run.generator)  # fmt: skip
                loss_ce = F.cross_entropy(s.out, target)
                loss_kd = 0.0
                for method, weight, kd in run.parts:
                    ramp = method.ramp(epoch, args.epochs) if method.ramp else 1
                    loss_kd = loss_kd + weight * ramp * method.feed(kd, s, t, b)
                loss = run.ce * loss_ce + loss_kd

                if not run.meter.guard(loss, run.opt, t.out):
                    continue
                run.opt.zero_grad(set_to_none=True)
                run.scaler.scale(loss).backward()
                run.scaler.step(run.opt)
                run.scaler.update()
                run.meter.add(s.out, target, ce=loss_ce, kd=loss_kd)

            bar.update()
            active = [
                run for run in active if not run.meter.failure
            ]  # a failed student stops, the others go on
            if not active:
                break
            if not bar.disable and active[0].meter.steps % args.print_freq == 0:
                losses = '  '.join(f'{run.name} {run.meter.read().get("ce", 0):.3f}' for run in active)
                bar.set_postfix_str(f'epoch {epoch + 1}, ce: {losses}')

        for run in [run for run in runs if run.record.epoch == epoch]:
            row = {'epoch': epoch + 1, 'lr': lr, **run.meter.read(run.net)}
            if run.meter.failure:
                log(f'stopped: {run.meter.failure}')
                failures.append(run.meter.failure)
                runs.remove(run)
                continue
            row |= utils.measure(run.net, val, test, amp)
            row['seconds'] = time.time() - started
            run.record.epoch_done(row)
            log(f'epoch {epoch + 1}/{args.epochs}  {run.name:12s} ce {row["ce"]:.4f}  kd {row["kd"]:.4f}  '
                f'train {row["train_top1"]:.2f}  test {row["test_top1"]:.2f}  '
                f'best {run.record.best["test_top1"]:.2f}  {row["seconds"]:.0f} s')  # fmt: skip
            if board:
                for key, value in row.items():
                    board.add_scalar(f'{run.name}/{key}', value, epoch + 1)
        if not runs:
            break
        if stop.signal and epoch + 1 < args.epochs:
            bar.close()
            log(f'stopped after epoch {epoch + 1}; --resume auto continues')
            return 128 + stop.signal
    bar.close()

    for run in runs:
        facts = {'script': 'train_kd', 'method': run.name, 'student': args.s_name, 'teacher': args.t_name,
                 'teacher_top1': teacher['top1'], 'data': args.data_name, 'seed': args.seed,
                 'epochs': args.epochs, 'trained_with': list(wanted)}  # fmt: skip
        log(f'{run.name}: {run.record.finish("student.pt", facts)}')
    if failures:
        raise utils.NonFinite('; '.join(failures))


def read_methods(args) -> dict[str, list[tuple[str, float, dict]]]:
    """{'pkt+st': [('pkt', weight, arguments), ...], ...} from --kd_mode, --lambda_kd and --kd_args."""
    tokens = {token: token.split('+') for token in args.kd_mode}
    names = {name for parts in tokens.values() for name in parts}
    for name in sorted(names - METHODS.keys()):
        raise utils.UserError(f'--kd_mode: no method is called {name!r}; there are {", ".join(METHODS)}')
    if len(tokens) < len(args.kd_mode) or any(len(set(parts)) < len(parts) for parts in tokens.values()):
        raise utils.UserError(f'--kd_mode {" ".join(args.kd_mode)}: something is named twice')

    weights = {name: METHODS[name].weight for name in names}
    if len(args.lambda_kd) == 1 and '=' not in args.lambda_kd[0]:
        if len(names) > 1:
            raise utils.UserError(f'--lambda_kd {args.lambda_kd[0]}: with several methods say METHOD=number')
        args.lambda_kd = [f'{next(iter(names))}={args.lambda_kd[0]}']
    for name, weight in utils.key_values(args.lambda_kd, '--lambda_kd').items():
        if name not in names:
            raise utils.UserError(f'--lambda_kd: {name!r} is not among --kd_mode {" ".join(args.kd_mode)}')
        if not isinstance(weight, (int, float)) or isinstance(weight, bool):
            raise utils.UserError(f'--lambda_kd: the weight of {name} must be a number, got {weight!r}')
        weights[name] = float(weight)

    options = {name: {} for name in names}
    for key, value in utils.key_values(args.kd_args, '--kd_args').items():
        name, _, key = key.rpartition('.')
        if not name and len(names) > 1:
            raise utils.UserError(f'--kd_args {key}: with several methods say METHOD.{key}=VALUE')
        name = name or next(iter(names))
        if name not in names:
            raise utils.UserError(f'--kd_args: {name!r} is not among --kd_mode {" ".join(args.kd_mode)}')
        check_option(name, key, value)
        options[name][key] = value
    return {
        token: [(name, weights[name], options[name]) for name in parts] for token, parts in tokens.items()
    }


def check_option(name: str, key: str, value) -> None:
    """Keys and types of --kd_args against the constructor's signature, before anything else happens."""
    signature = inspect.signature(METHODS[name].loss)
    shown = f'the signature is {METHODS[name].loss.__name__}{str(signature).replace(" -> None", "")}'
    if key not in signature.parameters:
        raise utils.UserError(f'--kd_args: {name} has no argument {key!r}; {shown}')
    kind = signature.parameters[key].annotation
    legal = isinstance(value, int | float if kind is float else kind)
    if not legal or (isinstance(value, bool) and kind is not bool):
        raise utils.UserError(f'--kd_args: {key}={value!r} of {name} has the wrong type; {shown}')


def build_runs(args, wanted, folder, origin, net_s, net_t, train, selected_on, device) -> list[Run]:
    """The students, all with the weights of net_s, each with its losses, optimiser, generator and record."""
    initial, teacher = utils.fingerprint(net_s), utils.fingerprint(net_t)
    net_s.to(device, memory_format=torch.channels_last)
    with torch.no_grad():  # two images tell the losses all shapes
        img, target, index = next(train.test_batches(2))
        probe = SimpleNamespace(s=net_s.eval()(img, True), t=net_t.eval()(img, True),
                                net_s=net_s, net_t=net_t, train_set=train)  # fmt: skip
    b = SimpleNamespace(img=img, target=target, index=index, epoch=0, net_s=net_s, net_t=net_t,
                        generator=torch.Generator(device))  # fmt: skip
    runs = []
    for token, parts in wanted.items():
        torch.manual_seed(args.seed)  # a loss's own weights must not depend on the runs built before it
        built = []
        for name, weight, options in parts:
            method = METHODS[name]
            try:
                with utils.user_errors(), torch.no_grad():
                    kd = method.build(method.loss, probe, **options).to(device)
                    method.feed(copy.deepcopy(kd), probe.s, probe.t, b)  # shapes that do not meet show here
            except TypeError as error:  # an argument that the table fills, e.g. s_channels
                raise utils.UserError(f'--kd_args: {name}: {error}') from None
            built.append((method, weight, kd))
        ce = math.prod(method.ce for method, _, _ in built)
        net = copy.deepcopy(net_s)
        losses = nn.ModuleList(loss for _, _, loss in built)
        opt = utils.sgd([*net.parameters(), *losses.parameters()], args, device)
        scaler = torch.amp.GradScaler(device.type, enabled=args.amp == 'fp16')
        math_args = utils.math_args(
            args, script='train_kd', student=args.s_name, initial=initial, teacher=args.t_name,
            teacher_weights=teacher, ce=ce,
            methods=[[name, weight, options] for name, weight, options in parts],
        )  # fmt: skip
        state = {'net': net, 'kd': losses, 'opt': opt, 'scaler': scaler}
        record = utils.Record(folder / token, state, math_args, origin, selected_on)
        record.resume(utils.resume_point(args.resume, folder / token))
        runs.append(Run(token, built, ce, net, opt, scaler, torch.Generator(device), record))
    return runs


if __name__ == '__main__':
    utils.run(main)
