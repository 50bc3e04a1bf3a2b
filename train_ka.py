"""Amalgamate frozen teachers that each know a part into students that know everything. No label is read.

    python train_ka.py --ka_mode concat cfl --t_name resnet20 resnet20 --t_model half0.pt half1.pt \\
        --s_name resnet20 --data_name cifar10                      two teachers with half of the classes each
    python train_ka.py --ka_mode sbm --data_name scenes --t_model seg.pt depth.pt normal.pt
                                                                   three teachers of one dense task each
    torchrun --nproc_per_node=2 train_ka.py ...        several processes, --batch_size images each

All students see the same batches and the same teacher forward; a student's result is bit for bit (on the
CPU) the one it gets when trained alone. Train the teachers with train_base.py --num_parts N --part I, those
of dense tasks with train_ka.py --ka_mode scratch --data_name scenes --tasks TASK.

Writes to SAVE_ROOT/NOTE: log.txt, args.json, ensemble/results.json (the teachers themselves), and for each
student a folder with last.pt, best.pt, student.pt (plain weights of the last epoch), ka.pt (the loss's own
modules), metrics.csv, results.json.
"""

import argparse
import copy
import math
import random
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import engine.threads  # noqa: F401  before torch

import torch
from torch import Tensor, nn

from engine import errors, side_by_side
from engine.batch import as_float
from engine.device import compile_networks, setup
from engine.errors import NonFinite, UserError, user_errors
from engine.flags import (
    Parser,
    add_common_flags,
    add_thread_flag,
    positive_float,
    weights_and_options,
)
from engine.meter import Meter
from engine.optimise import one_cycle, sgd
from engine.processes import distributed, processes
from engine.record import (
    Record,
    class_names_of,
    fingerprint,
    math_args,
    output_folder,
    provenance,
    resume_point,
    save_checkpoint,
    tested,
    write_json,
)
from engine.session import Log, StopAfterEpoch, progress_bar, tensorboard
from ka_losses import ConcatKD
from ka_settings import SETTINGS, setting_for
from methods.ka import KA, Method

ENSEMBLE = 'ensemble'  # a word of --ka_mode that trains nothing


def parse_args():
    parser = Parser(__doc__)
    # fmt: off
    flag = parser.add_argument_group('amalgamation').add_argument
    flag('--ka_mode', nargs='+', required=True, metavar='METHOD',
         help=f'one student per word: {", ".join(KA)} (scratch is the reference that reads labels), or '
              f'{ENSEMBLE}: only evaluate the teachers, which is done in any case')
    flag('--lambda_ka', nargs='+', default=[], metavar='W',
         help='weight of the loss: a number, or METHOD=number with several methods; defaults: '
              + ', '.join(f'{name} {m.weight:g}' for name, m in KA.items()))
    flag('--lambda_kd', type=float, metavar='W',
         help='weight of soft targets over all classes beside it; default 1 for '
              + ', '.join(name for name, m in KA.items() if m.kd) + ', 0 for the others')
    flag('--T', type=positive_float, default=1.0, help='temperature of these, default 1')
    flag('--ka_args', nargs='+', default=[], metavar='KEY=VALUE',
         help='arguments of the loss, e.g. h_channels=64, or METHOD.KEY=VALUE with several methods')
    flag('--ka_layers', nargs='+', type=stage, metavar='rbK',
         help='stages of the networks that the loss attaches to, default by method: '
              + ', '.join(f'{name} {" ".join(f"rb{k}" for k in m.layers)}'
                          for name, m in KA.items() if m.layers))
    flag('--t_name', nargs='+', default=[], metavar='NAME',
         help=f'teachers, or one name for all: {"; ".join(setting.networks for setting in SETTINGS)}')
    flag('--t_model', nargs='+', default=[], metavar='FILE', help="the teachers' checkpoints")
    flag('--s_name', metavar='NAME', help='student, one of the same names; default: as the first teacher')
    flag('--s_init', metavar='FILE', help='initial weights of all students; default: drawn from --seed')
    for setting in SETTINGS:
        setting.add_flags(parser)
    flag = parser.add_argument_group('optimiser').add_argument
    flag('--optim', choices=('adam', 'sgd'), default='adam',
         help='adam with cosine to 0 in every step (default), or sgd with milestones; --schedule onecycle '
              'replaces either')
    flag('--lr_ka', type=positive_float, metavar='LR',
         help="learning rate of the loss's own modules; default as --lr with adam, 0.01 with sgd")
    # fmt: on
    more = ''.join(f'; {setting.data_help}' for setting in SETTINGS if setting.data_help)
    rate = 'default 0.001 with adam, 0.1 with sgd'
    add_common_flags(parser, epochs=100, lr=None, rate=rate, more_data=more)
    add_thread_flag(parser)
    args = parser.parse_args()
    args.lr = args.lr or {'adam': 1e-3, 'sgd': 0.1}[args.optim]
    args.lr_ka = args.lr_ka or {'adam': args.lr, 'sgd': 0.01}[args.optim]
    return args


def stage(text: str) -> int:
    if text.startswith('rb') and text[2:].isdigit() and int(text[2:]) > 0:
        return int(text[2:])
    raise argparse.ArgumentTypeError(f'expected rb1, rb2, ..., got {text!r}')


class Step(nn.Module):
    """A student with its loss: one update is one forward pass of this module."""

    def __init__(
        self, net: nn.Module, ka: nn.Module, method: Method, kd: float, weight: float, setting, T: float
    ) -> None:
        super().__init__()
        self.net, self.ka, self.method, self.kd, self.weight, self.setting = (
            net,
            ka,
            method,
            kd,
            weight,
            setting,
        )
        self.soft = ConcatKD(T=T)

    def forward(self, b: SimpleNamespace, ts: list) -> tuple[Tensor, dict]:
        """The loss, and its terms without weights; b: the batch, see methods/ka_shared.py."""
        forward = self.method.forward or self.setting.forward
        with self.setting.amp():
            s = forward(self.net, b)
        s = as_float(s)
        loss, terms = self.method.feed(self.ka, s, ts, b)
        loss = self.weight * loss
        if self.kd and b.update not in self.method.unsoft:
            kd = self.soft(s.out, [t.out for t in ts])
            loss, terms = loss + self.kd * kd, {'kd': kd, **terms}
        return loss, terms


@dataclass
class Run:
    """One student in training: everything that belongs to it and to no other."""

    name: str
    method: Method
    step: nn.Module  # a Step, or DistributedDataParallel around it
    net: nn.Module
    ka: nn.Module
    opts: dict[str, torch.optim.Optimizer]  # by update
    scaler: torch.amp.GradScaler
    record: Record
    layers: tuple
    rng: random.Random = None  # for losses that draw a choice
    meter: Meter | None = None


def main():
    args = parse_args()
    wanted, weights, options = read_methods(args)
    device = setup(args)
    name = f'ka-{args.data_name.replace(":", "")}-{args.s_name or "student"}-s{args.seed}'
    folder = output_folder(Path(args.save_root) / (args.note or name))
    log = Log(folder)
    origin = provenance(device)

    setting = setting_for(args.data_name)(args, wanted, device, log)
    origin |= class_names_of(setting.train)
    if setting.nets:
        write_ensemble(folder, setting, args, origin)
    runs = [
        build_run(args, name, method, weights[name], options[name], setting, folder, origin)
        for name, method in wanted.items()
    ]
    compile_networks(args, *setting.nets, *(run.net for run in runs))
    write_json(folder / 'args.json', {'args': vars(args), **origin})
    if not runs:
        return None
    board = tensorboard(folder, args.tensorboard)
    stop = StopAfterEpoch()
    ends = setting.phases()  # the last epoch of each phase + 1
    total, start = ends[-1], min(run.record.epoch for run in runs)
    images = f'{len(setting.train)} + {len(setting.test)} images'
    log(f'{len(runs)} x {setting.student_name} on {args.data_name}: {images}, {device}')  # fmt: skip
    log(f'{start} of {total} epochs done, output in {folder}')
    if not setting.val:
        log('best.pt is selected on test data (--val_split holds out training images for that)')

    def look(img, target, index, _):
        return img, target, index, setting.teachers_on(img)

    together = side_by_side.choose(args, device, len(runs), log)
    steps, failures = setting.train.steps(args.batch_size), []
    bar = progress_bar(steps * total, steps * start, log)
    for epoch in range(start, total):
        started = time.time()
        active = [run for run in runs if run.record.epoch == epoch]  # a kill may have left others ahead
        phase = sum(epoch >= end for end in ends)
        first = ends[phase - 1] if phase else 0
        for run in active:
            begin_epoch(run, epoch, phase, epoch == first, setting, args, device, log)

        batches = setting.train.train_batches(args.batch_size, args.seed, epoch)
        for k, seen in enumerate(together.looks(look, batches)):
            lr = learning_rates(args, phase, (epoch - first + k / steps) / (ends[phase] - first))
            when = When(epoch, total, phase, (epoch + k / steps) / total, lr)
            together.train(partial(train_student, setting=setting, when=when), active, seen)
            bar.update()
            active = [run for run in active if not run.meter.failure]  # a failed student stops, others go on
            if not active:
                break
            if not bar.disable and (k + 1) % args.print_freq == 0:
                losses = '  '.join(f'{run.name} {run.meter.read().get("loss", 0):.3f}' for run in active)
                bar.set_postfix_str(f'epoch {epoch + 1}, loss: {losses}')

        begun = [run for run in runs if run.record.epoch == epoch]
        rows = {run.name: {'epoch': epoch + 1, 'lr': lr['net'], **run.meter.read(run.step)} for run in begun}
        for run in [run for run in begun if run.meter.failure]:
            log(f'stopped: {run.meter.failure}')
            failures.append(run.meter.failure)
            runs.remove(run)
            begun.remove(run)
        for run, measured in zip(begun, together.each(lambda run: setting.measure(run.net), begun)):
            row = rows[run.name] | measured | {'seconds': time.time() - started}
            run.record.epoch_done(row, save=epoch + 1 == total or (epoch + 1) % args.save_every == 0)
            shown = '  '.join(f'{key} {row[f"test_{key}"]:.2f}' for key in setting.shown)
            log(f'epoch {epoch + 1}/{total}  {run.name:12s} loss {row["loss"]:.4f}  {shown}  '
                f'{row["seconds"]:.0f} s')  # fmt: skip
            if board:
                for key, value in row.items():
                    if isinstance(value, float):
                        board.add_scalar(f'{run.name}/{key}', value, epoch + 1)
        if not runs:
            break
        if (signal := stop.agreed()) and epoch + 1 < total:
            for run in runs:
                run.record.save()
            bar.close()
            log(f'stopped after epoch {epoch + 1}; --resume auto continues')
            return 128 + signal
    bar.close()

    for run in runs:
        facts = {'script': 'train_ka', 'method': run.name, 'student': setting.student_name, **setting.facts,
                 'data': args.data_name, 'seed': args.seed, 'epochs': total, 'trained_with': list(wanted),
                 'processes': processes(), **setting.details(run.net)}  # fmt: skip
        if len(ends) > 1:
            facts['after_first_phase'] = tested(run.record.history[ends[0] - 1])
        save_checkpoint(folder / run.name / 'ka.pt', run.ka.state_dict())
        log(f'{run.name}: {run.record.finish("student.pt", facts)}')
    if failures:
        raise NonFinite('; '.join(failures))


@dataclass
class When:
    """Where in the training a step is."""

    epoch: int
    epochs: int
    phase: int
    done: float  # share of the whole training
    lr: dict[str, float]  # by the role of a group of parameters


def train_student(run: Run, seen: tuple, setting, when: When) -> None:
    """One step of one student: an update, or several. seen: images, labels, numbers, what teachers say."""
    img, target, index, ts = seen
    b = SimpleNamespace(img=img, epoch=when.epoch, epochs=when.epochs, phase=when.phase, layers=run.layers,
                        blocks=setting.blocks, rng=run.rng, soft=ConcatKD())  # fmt: skip
    if run.method.labels:  # nobody else gets to see them
        b.target, b.supervised = target, setting.supervised
    said = {}
    for update in run.method.turn(when.done):
        b.update, opt = update, run.opts[update]
        for group in opt.param_groups:
            group['lr'] = when.lr[group['role']]
        loss, terms = run.step(b, ts)
        if not run.meter.guard(loss, opt):
            break
        run.step.zero_grad(set_to_none=True)
        run.scaler.scale(loss).backward()
        run.scaler.step(opt)
        run.scaler.update()
        if run.method.after:
            run.method.after(run.ka, update)
        said = {'loss': loss, **terms, **said}
    run.meter.add(None, index, **said)


def begin_epoch(run: Run, epoch: int, phase: int, begins: bool, setting, args, device, log) -> None:
    """Generators, meter and modes of a run for this epoch; what its method does where a phase begins."""
    run.rng = random.Random(args.seed * 1_000_003 + epoch)
    run.meter = Meter(run.name, epoch, device)
    if begins:
        for opt in run.opts.values():
            opt.state.clear()
        if run.method.phase:
            said = run.method.phase(run.net, phase, run.ka, setting.teachers_on, setting.sample)
            log(f'{run.name}: phase {phase + 1}{said and ", "}{said}')
    run.step.train()
    if run.method.phase:
        run.net.freeze(phase == 0)


def learning_rates(args, phase: int, done: float) -> dict[str, float]:
    """Of student ('net') and loss ('ka'); done: the share of this phase; a later phase has half the rate."""
    if args.schedule == 'onecycle':
        factor = one_cycle(done)
    elif args.optim == 'adam':
        factor = 0.5 * (1 + math.cos(math.pi * done))
    else:
        factor = args.lr_decay ** sum(done >= share for share in args.milestones)
    return {'net': args.lr * factor / (phase + 1), 'ka': args.lr_ka * factor / (phase + 1)}


def write_ensemble(folder: Path, setting, args, origin: dict) -> None:
    """What the teachers reach by themselves, a row of the table."""
    (folder / ENSEMBLE).mkdir(exist_ok=True)
    facts = {'script': 'train_ka', 'method': ENSEMBLE, 'student': None, **setting.facts,
             'data': args.data_name, 'seed': args.seed}  # fmt: skip
    write_json(folder / ENSEMBLE / 'results.json', facts | {'ensembles': setting.ensembles(), **origin})


def read_methods(args) -> tuple[dict[str, Method], dict, dict]:
    """{word of --ka_mode: its row}, {word: weight}, {word: arguments of the loss}."""
    names = [name for name in args.ka_mode if name != ENSEMBLE]
    dense = setting_for(args.data_name).name == 'dense'
    for name in names:
        if name not in KA:
            raise UserError(f'--ka_mode: no method is called {name!r}; there are {", ".join(KA)}')
        if KA[name].dense not in (None, dense):
            fitting = ', '.join(key for key, m in KA.items() if m.dense in (None, dense))
            raise UserError(f'--ka_mode {name}: not for --data_name {args.data_name}; there are {fitting}')
        if processes() > 1 and KA[name].one_process:
            raise UserError(f'{name} runs in one process only: {KA[name].one_process}')
    if len(set(args.ka_mode)) < len(args.ka_mode):
        raise UserError(f'--ka_mode {" ".join(args.ka_mode)}: something is named twice')
    return {name: KA[name] for name in names}, *weights_and_options(args, names, KA, 'ka')


def build_run(args, name: str, method: Method, weight: float, options: dict, setting, folder, origin) -> Run:
    """A student with its loss, optimisers and record; the record's checkpoint if there is one to continue."""
    device = setting.train.device
    net = setting.student(method)
    initial = fingerprint(net)
    net.to(device, memory_format=torch.channels_last)
    layers = tuple(args.ka_layers or method.layers) if method.layers else ()
    img, target, *_ = next(setting.train.train_batches(args.batch_size, args.seed, 0))
    img, target = img[:2], {k: v[:2] for k, v in target.items()} if isinstance(target, dict) else target[:2]
    b = SimpleNamespace(img=img, epoch=0, epochs=args.epochs, phase=0, layers=layers, blocks=setting.blocks,
                        rng=random.Random(0), target=target, supervised=setting.supervised,
                        soft=ConcatKD())  # fmt: skip
    ts = setting.teachers_on(img)
    with torch.no_grad():
        e = SimpleNamespace(s=setting.forward(net.eval(), b), all_t=ts, net_s=net, layers=layers,
                            tasks=setting.tasks)  # fmt: skip
    if layers:
        check_stages(name, e, layers)
    torch.manual_seed(args.seed)
    try:
        with user_errors():
            ka = method.build(method.loss, e, **options).to(device)
    except TypeError as error:  # an argument that the table fills
        raise UserError(f'--ka_args: {name}: {error}') from None
    kd = method.kd if args.lambda_kd is None else args.lambda_kd * bool(method.kd)
    step = Step(net, ka, method, kd, weight, setting, args.T)
    groups = method.groups(net, ka)
    opts = {update: optimiser(args, *group) for update, group in groups.items()}
    trial = copy.deepcopy(step).train()
    with user_errors():  # shapes that do not meet show here, before anything is trained
        for update in opts:
            b.update = update
            trial(b, ts)
    recipe = math_args(
        args, script='train_ka', student=setting.student_name, initial=initial,
        method=[name, weight, kd, options],
        teachers=[fingerprint(t) for t in setting.nets], layers=list(layers), T=args.T, optim=args.optim,
        lr_ka=args.lr_ka, **setting.recipe,
    )  # fmt: skip
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == 'fp16')
    state = {'net': net, 'ka': ka, 'scaler': scaler, **{f'opt_{key}': opt for key, opt in opts.items()}}
    half = 'val' if setting.val else 'test'
    record = Record(folder / name, state, recipe, origin, half, setting.key)
    record.resume(resume_point(args.resume, folder / name))
    return Run(name, method, distributed(step, device), net, ka, opts, scaler, record, layers)


def check_stages(name: str, e: SimpleNamespace, layers: tuple) -> None:
    """Every network has the stages that the loss attaches to."""
    least = min(len(f.fms) for f in (e.s, *e.all_t)) - 1
    if max(layers) > least:
        raise UserError(f'--ka_layers: {name} attaches to stage {max(layers)}, a network has {least} only')


def optimiser(args, net: list, ka: list) -> torch.optim.Optimizer:
    groups = [{'params': params, 'role': role} for role, params in (('net', net), ('ka', ka)) if params]
    if args.optim == 'adam':
        cuda = groups[0]['params'][0].is_cuda
        return torch.optim.Adam(groups, args.lr, weight_decay=args.weight_decay, fused=cuda)
    return sgd(groups, args)


if __name__ == '__main__':
    errors.run(main)
