"""Amalgamate frozen teachers that each know a part into students that know everything. No label is read.

    python train_ka.py --ka_mode concat cfl --t_name resnet20 resnet20 --t_model half0.pt half1.pt \\
        --s_name resnet20 --data_name cifar10                      two teachers with half of the classes each
    python train_ka.py --ka_mode sbm --data_name scenes --t_model seg.pt depth.pt normal.pt
                                                                   three teachers of one dense task each
    torchrun --nproc_per_node=2 train_ka.py ...        several processes, --batch_size images each

All students see the same batches and the same teacher forward; a student's result is bit for bit (on the
CPU) the one it gets when trained alone (beside afk all students get its --epochs_ft, too). Train the teachers
with train_base.py --num_parts N --part I, those of dense tasks with train_ka.py --ka_mode scratch
--data_name scenes --tasks TASK.

Writes to SAVE_ROOT/NOTE: log.txt, args.json, ensemble/results.json (the teachers themselves), and for each
student a folder with last.pt, best.pt, student.pt (plain weights of the last epoch), ka.pt (the loss's own
modules), metrics.csv, results.json.
"""

import argparse
import math
import random
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import engine.threads  # noqa: F401  before torch

import torch

from engine import drawing, errors, listing, session, side_by_side
from engine.data import refuse_too_few
from engine.device import compile_networks, setup
from engine.flags import (
    OF_SGD,
    OF_STEPS,
    add_common_flags,
    add_head_flag,
    add_thread_flag,
    check_head,
    positive_float,
    refuse_given,
)
from engine.ka_build import ENSEMBLE, build_run, chosen_setting, read_methods
from engine.ka_student import Batch, Moment, Run
from engine.meter import Meter
from engine.optimise import one_cycle
from engine.parser import Parser
from engine.processes import processes, rank
from engine.record import (
    class_names_of,
    output_folder,
    provenance,
    save_checkpoint,
    tested,
    write_json,
)
from engine.session import Log
from ka_losses import ConcatKD
from ka_settings import SETTINGS, refuse_flags_of_others
from methods import KA


def parse_args():
    parser = Parser(__doc__)
    # fmt: off
    flag = parser.add_argument_group('amalgamation').add_argument
    flag('--ka_mode', nargs='+', required=True, metavar='METHOD', action=listing.lists(KA),
         help='a student per word; list: print all methods, what they need, their weights and '
              'arguments; scratch '
              f'is the reference that reads labels; {ENSEMBLE}: only evaluate the teachers, which is '
              'done in any case')
    flag('--lambda_ka', nargs='+', default=[], metavar='W',
         help='weight of the loss, or METHOD=number; the second with several methods; default: the '
              "method's; see --ka_mode list")
    flag('--lambda_kd', type=float, metavar='W',
         help="weight of soft targets over all classes, beside the loss; default: the method's, 1 or 0")
    flag('--T', type=positive_float, default=1.0, help='temperature of these, default 1')
    flag('--ka_args', nargs='+', default=[], metavar='KEY=VALUE',
         help='arguments of the loss, e.g. h_channels=64, or METHOD.KEY=VALUE with several methods')
    flag('--ka_layers', nargs='+', type=stage, metavar='rbK',
         help="stages of the networks that the loss attaches to, rb1 the first; default: the method's")
    flag('--t_name', nargs='+', default=[], metavar='NAME',
         help=f'teachers, or one name for all; {"; ".join(s.networks for s in SETTINGS)}')
    flag('--t_model', nargs='+', default=[], metavar='FILE', help="the teachers' checkpoints")
    flag('--s_name', metavar='NAME', help='student, one of the same names; default: as the first teacher')
    flag('--s_init', metavar='FILE', help='initial weights of all students; default: drawn by --seed')
    add_head_flag(flag, '--s_init')
    for setting in SETTINGS:
        setting.add_flags(parser)
    flag = parser.add_argument_group('optimiser').add_argument
    flag('--optim', choices=('adam', 'sgd'), default='adam',
         help='adam with cosine, or sgd with milestones; adam: the rate falls along a cosine, step by step, '
              'to 0 at the end; --schedule onecycle replaces either; default adam')
    flag('--lr_ka', type=positive_float, metavar='LR',
         help="learning rate of the loss's modules; default: as --lr with adam, 0.01 with sgd")
    # fmt: on
    more = ''.join(f'; {setting.data_help}' for setting in SETTINGS if setting.data_help)
    rate = 'default 0.001 with adam, 0.1 with sgd'
    add_common_flags(parser, epochs=100, lr=None, rate=rate, more_data=more)
    drawing.add_draw_flag(parser.add_argument)
    add_thread_flag(parser)
    args = parser.parse_args()
    args.lr = args.lr or {'adam': 1e-3, 'sgd': 0.1}[args.optim]
    args.lr_ka = args.lr_ka or {'adam': args.lr, 'sgd': 0.01}[args.optim]
    if args.optim != 'sgd':
        refuse_given(args, OF_STEPS | OF_SGD, f'--optim {args.optim} does not read it')
    elif args.schedule != 'steps':
        refuse_given(args, OF_STEPS, f'--schedule {args.schedule} does not read it')
    return args


def stage(text: str) -> int:
    if text.startswith('rb') and text[2:].isdigit() and int(text[2:]) > 0:
        return int(text[2:])
    raise argparse.ArgumentTypeError(f'expected rb1, rb2, ..., got {text!r}')


def main():
    args = parse_args()
    check_head(args, '--s_init')
    kind = chosen_setting(args)
    drawing.check(args, kind)
    refuse_flags_of_others(args, kind)
    rows, terms = read_methods(args)
    device = setup(args)
    name = f'ka-{args.data_name.replace(":", "")}-{args.s_name or "student"}-s{args.seed}'
    folder = output_folder(Path(args.save_root) / (args.note or name))
    log = Log(folder)
    origin = provenance(device)

    setting = kind(args, rows, device, log)
    if terms:
        refuse_too_few(setting.train, args.batch_size)
    origin |= class_names_of(setting.train)
    runs = [build_run(args, term, setting, folder, origin) for term in terms.values()]
    if setting.nets:
        write_ensemble(folder, setting, args, origin, log)
    compile_networks(args, *setting.nets, *(run.net for run in runs))
    if not runs:
        write_json(folder / 'args.json', {'args': vars(args), **origin})
        return None
    ends = setting.phases()  # the last epoch of each phase + 1
    total, start = ends[-1], min(run.record.epoch for run in runs)
    steps, images = setting.train.steps(args.batch_size), f'{len(setting.train)} + {len(setting.test)} images'
    log(f'{len(runs)} x {setting.student_name} on {args.data_name}: {images}, {device}')
    records = [run.record for run in runs]
    live = session.start(args, log, origin, records, val=setting.val, done=start, epochs=total, steps=steps)
    together = side_by_side.choose(args, device, runs, log)

    def seen_by_teachers(img, target, index, _):
        return Batch(img, target, index, setting.teachers_on(img))

    for epoch in range(start, total):
        started = time.time()
        active = [run for run in runs if run.record.epoch == epoch]  # a kill may have left others ahead
        begun, last = active, epoch + 1 == total
        phase = sum(epoch >= end for end in ends)
        first = ends[phase - 1] if phase else 0
        for run in active:
            begin_epoch(run, epoch, phase, epoch == first, setting, args, log)

        batches = setting.train.train_batches(args.batch_size, args.seed, epoch)
        for k, batch in enumerate(together.looks(seen_by_teachers, batches)):
            lr = learning_rates(args, phase, (epoch - first + k / steps) / (ends[phase] - first))
            now = Moment(phase, (epoch + k / steps) / total, lr)
            together.train(partial(train_student, setting=setting, now=now), active, batch)
            live.bar.update()
            active = [run for run in active if not run.meter.failure]  # a failed student stops, others go on
            if not active:
                break
            if not live.bar.disable and (k + 1) % args.print_freq == 0:
                losses = '  '.join(f'{run.name} {run.meter.read().get("loss", 0):.3f}' for run in active)
                live.bar.set_postfix_str(f'epoch {epoch + 1}, loss: {losses}')

        read = {run.name: {'epoch': epoch + 1, 'lr': lr['net'], **run.meter.read(run.step)} for run in begun}
        session.drop_failed(live, begun, runs)
        done = []
        for run, figures in zip(begun, together.each(lambda run: setting.measure(run.net), begun)):
            row = read[run.name] | figures | {'seconds': time.time() - started}
            done.append((run.record, row, partial(epoch_line, run, setting, total), f'{run.name}/'))
        drawing.draw(live, setting, begun, [row for _, row, *_ in done], last)
        if code := session.end_epoch(live, epoch, last, done):
            return code
        if not runs:
            break

    done = []
    for run in runs:
        facts = {'script': 'train_ka', 'method': run.name, 'student': setting.student_name, **setting.facts,
                 'data': args.data_name, 'seed': args.seed, 'epochs': total, 'trained_with': list(rows),
                 'processes': processes(), **setting.details(run.net)}  # fmt: skip
        if len(ends) > 1:
            facts['after_first_phase'] = tested(run.record.history[ends[0] - 1])
        save_checkpoint(folder / run.name / 'ka.pt', run.ka.state_dict())
        how = setting.how_to_load(run.net, folder / run.name / 'student.pt')
        done.append((run.record, 'student.pt', facts, run.name, f'weights: {how}'))
    session.finish(live, done)


def train_student(run: Run, seen: Batch, setting, now: Moment) -> None:
    """One step of one student: an update, or several. seen: the batch and what teachers say of it."""
    reads = run.method.needs.labels  # nobody else gets to see them
    batch = replace(
        seen, target=seen.target if reads else None, phase=now.phase, done=now.done, layers=run.layers,
        blocks=setting.blocks, rng=run.rng, soft=ConcatKD(), supervised=setting.supervised,
    )  # fmt: skip
    said = {}
    if run.draws:
        torch.manual_seed(run.seeds.getrandbits(63))
    for update in run.method.when.updates_now(now.done):
        batch.update, opt = update, run.opts[update]
        for group in opt.param_groups:
            group['lr'] = now.lr[group['role']]
        loss, terms = run.step(batch)
        if not run.meter.guard(loss, opt, *(getattr(t, 'out', t) for t in seen.all_t)):
            break
        run.step.zero_grad(set_to_none=True)
        run.scaler.scale(loss).backward()
        run.scaler.step(opt)
        run.scaler.update()
        if run.method.own.after_update:
            run.method.own.after_update(run.ka, update)
        said = {'loss': loss, **terms, **said}
    run.meter.add(None, batch.index, **said)


def begin_epoch(run: Run, epoch: int, phase: int, begins: bool, setting, args, log) -> None:
    """Generators, meter and modes of a run for this epoch; what its method does where a phase begins."""
    seed = args.seed * 1_000_003 + epoch
    run.rng, run.seeds = random.Random(seed), random.Random(seed + 7919 * rank())
    run.meter = Meter(run.name, epoch, setting.train.device)  # a new one: updates differ in their terms
    own = run.method.own
    if own.before and epoch == 0:
        own.before(run.ka, setting.teachers_on, setting.sample)
    if begins:
        for opt in run.opts.values():
            opt.state.clear()
        if own.begin_phase:
            said = own.begin_phase(run.net, phase, run.ka, setting.teachers_on, setting.sample)
            log(f'{run.name}: phase {phase + 1}{said and ", "}{said}')
    run.step.train()
    if own.begin_phase:
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


def epoch_line(run: Run, setting, total: int, row: dict) -> str:
    shown = '  '.join(f'{key} {row[f"test_{key}"]:.2f}' for key in setting.shown)
    return (
        f'epoch {row["epoch"]}/{total}  {run.name:12s} loss {row["loss"]:.4f}  {shown}  '
        f'{row["seconds"]:.0f} s'
    )


def write_ensemble(folder: Path, setting, args, origin: dict, log) -> None:
    """What the teachers reach by themselves: a row of the table, and a line of the log each."""
    ensembles, means = setting.ensembles(), getattr(setting, 'forms', {})
    for name, row in ensembles.items():
        figures = '  '.join(f'{key} {row[key]:.2f}' for key in setting.shown if key in row)
        log(f'{ENSEMBLE}, {means.get(name, name)}: {figures}')
    (folder / ENSEMBLE).mkdir(exist_ok=True)
    facts = {'script': 'train_ka', 'method': ENSEMBLE, 'student': None, **setting.facts,
             'data': args.data_name, 'seed': args.seed}  # fmt: skip
    write_json(folder / ENSEMBLE / 'results.json', facts | {'ensembles': ensembles, **origin})


if __name__ == '__main__':
    errors.run(main)
