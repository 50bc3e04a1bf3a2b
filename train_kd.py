"""Distil one frozen teacher into one or many students, with any method that `--kd_mode list` prints.

    python train_kd.py --kd_mode st --t_name resnet20 --t_model save/base/net.pt --s_name resnet8
    python train_kd.py --kd_mode at rkd pkt+st ...     three students at once; + adds losses on one student
    python train_kd.py --kd_mode cskd sla --s_name resnet8          self-distillation needs no teacher
    torchrun --nproc_per_node=2 train_kd.py ...        several processes, --batch_size images each

All students start from the same weights and see the same batches and the same teacher forward. A student's
result is bit for bit (on the CPU) the one it gets when trained alone.

Writes to SAVE_ROOT/NOTE: log.txt, args.json, and for each student a folder with last.pt, best.pt, student.pt
(plain weights of the last epoch), metrics.csv, results.json.
"""

import random
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import engine.threads  # noqa: F401  before torch

import torch

import models
from engine import errors, listing, optimise, session, side_by_side
from engine.batch import Batch
from engine.build import build_runs
from engine.data import load_data, refuse_too_few
from engine.device import autocast, compile_networks, setup
from engine.errors import user_errors
from engine.evaluate import measure, measured
from engine.flags import (
    RATE,
    add_common_flags,
    add_graph_flag,
    add_head_flag,
    add_label_flag,
    add_optimiser_flag,
    add_thread_flag,
    check_head,
    data_words,
    head_of,
    one_weight,
    positive_int,
    whole_number,
    with_rate,
)
from engine.kd_flags import check_labels, read_methods, refuse_unread
from engine.parser import Parser
from engine.processes import processes, rank, same_buffers
from engine.record import class_names_of, output_folder, provenance
from engine.session import Log
from engine.student import Run, Student, Term  # noqa: F401  what tests and benchmarks build with
from engine.teachers import Teachers, load_teachers, open_store
from methods import KD


def parse_args(words=None):
    parser = Parser(__doc__)
    # fmt: off
    flag = parser.add_argument_group('distillation').add_argument
    flag('--kd_mode', nargs='+', required=True, metavar='METHOD', action=listing.lists(KD),
         help='one student per word, A+B joins losses on one; list: print all methods, what they need, their '
              'weights and arguments')
    flag('--lambda_kd', nargs='+', default=[], metavar='W',
         help="weight of the loss, or METHOD=W with several; default: the method's, see --kd_mode list")
    flag('--lambda_ce', type=one_weight, metavar='W',
         help="weight of cross-entropy, of all students of the command; default: 1, or the method's")
    flag('--kd_stop', type=whole_number, metavar='E',
         help='distil in the first E epochs only; then cross-entropy alone trains, at weight 1, and the '
              'teacher is not asked (early-stopped distillation); default: to the end')
    flag('--ramp_epochs', type=positive_int, metavar='N',
         help="epochs in which a loss's weight rises, if it does; default: the method's, scaled to --epochs")
    flag('--kd_args', nargs='+', default=[], metavar='KEY=VALUE',
         help='arguments of the loss, e.g. T=8, or st.T=8 with several methods')
    flag('--kd_layers', nargs='+', default=[], metavar='STAGES',
         help='stages whose maps are compared; e.g. fitnet=2, sp=-1 (the last), nst=all, or with weights in '
              'the mean over them ofd=1:0.25,2:0.5,3; of methods that --kd_mode list says it of; '
              "default: the method's")
    flag('--t_name', nargs='+', default=[], metavar='NAME',
         help=f'teacher: {models.NAMES}; several for methods that take several, the main one first; none for '
              'methods without a teacher')
    flag('--t_model', nargs='+', default=[], metavar='FILE', help='one checkpoint per teacher')
    for name, what in (('mean', 'mean'), ('std', 'deviation')):
        flag(f'--t_{name}', nargs=3, type=float, metavar='X',
             help=f"{what} per channel of the teachers' training images; of pixels from 0 to 1; default: the "
                  "data's")
    flag('--soft_labels', metavar='FOLDER',
         help='of tools/pseudo_labels.py, instead of a teacher; for methods that read logits only')
    add_label_flag(flag)
    flag('--s_name', required=True, metavar='NAME', help='student, one of the same names')
    flag('--s_init', metavar='FILE',
         help='initial weights of all students; initial.pt of train_base.py, say; default: drawn by --seed')
    add_head_flag(flag, '--s_init')
    flag('--init_epochs', type=whole_number, metavar='N',
         help="epochs of the loss alone, if a method begins so; default: the method's, scaled to --epochs")
    flag('--pretrain_epochs', type=whole_number, metavar='N',
         help="epochs of a loss's own modules, before those; default: the method's, scaled to --epochs")
    flag('--phases', choices=('before', 'inside'), default='before',
         help='where these two kinds of epochs are; before: before the --epochs, as in the papers; inside: '
              'the first of the --epochs, at a tenth of the learning rate that all share then, so that no '
              'method of a table trains longer than another; default before')
    flag('--global_relations', action='store_true',
         help='torchrun: relate the samples of all processes; for losses that relate the samples of a batch')
    # fmt: on
    add_common_flags(parser, lr=None, rate=RATE)
    add_optimiser_flag(parser)
    add_thread_flag(parser)
    add_graph_flag(parser)
    return with_rate(parser.parse_args(words))


def main():
    args = parse_args()
    check_head(args, '--s_init')
    wanted = read_methods(args)
    refuse_unread(args, wanted)
    device = setup(args)
    amp = autocast(device, args.amp)
    name = (
        f'kd-{args.data_name.replace(":", "")}-{"-".join(args.t_name) or "self"}-{args.s_name}-s{args.seed}'
    )
    folder = output_folder(Path(args.save_root) / (args.note or name))
    log = Log(folder)

    train, val, test = load_data(args, device, log)
    refuse_too_few(train, args.batch_size)
    nets_t, facts_t = load_teachers(args, train.num_classes, test, amp, log, args.t_mean, args.t_std)
    stored, facts_stored = open_store(args, train, log)
    facts_t |= facts_stored
    torch.manual_seed(args.seed)
    with user_errors():
        net_s = models.build(args.s_name, train.num_classes)
        net_s = models.narrowed(net_s, args.s_init)
        if args.s_init:
            scale = train.mean, train.std
            said = models.load_weights(net_s, args.s_init, new_head=args.new_head, scale=scale,
                                       head=head_of('--s_init'))  # fmt: skip
            log(f'initial student: {said}')

    origin = provenance(device) | class_names_of(train)
    check_labels(wanted, train, log)
    views = sorted({view for terms in wanted.values() for term in terms for view in term.method.needs.views})
    teachers = Teachers(nets_t, amp, views, next(train.test_batches(2))[0], stored)
    selected_on = 'val' if val else 'test'
    runs = build_runs(args, wanted, folder, origin, net_s, teachers, train, selected_on, device)
    compile_networks(args, *teachers.fast, *(run.net for run in runs))
    first = min(run.first for run in runs)
    start = min(max(run.epoch, first) for run in runs)
    log(f'{len(runs)} x {args.s_name} on {args.data_name}: {len(train)} + {len(test)} images, {device}')
    for run in runs:
        for name in run.resting():
            log(f'{run.name}: the weight of {name} is 0 in each epoch, its schedule is for longer trainings')
    if processes() > 1:
        scope = 'the batches of all processes' if args.global_relations else "each process's own batch"
        log(f'{processes()} processes x {args.batch_size} images; relations between samples: {scope}')
    together = side_by_side.choose(args, device, runs, log)
    steps = train.steps(args.batch_size)
    records = [run.record for run in runs]
    live = session.start(
        args, log, origin, records, val=val, done=start - first, epochs=args.epochs - first, steps=steps
    )
    for epoch in range(start, args.epochs):
        started = time.time()
        active = [run for run in runs if run.epoch == epoch]  # others begin later, or a kill left them ahead
        for run in active:
            begin_epoch(run, epoch, args)
        begun, last = active, epoch + 1 == args.epochs
        teachers.resting = all(set(run.weights) == {'ce'} for run in active)  # nobody would listen

        crops = epoch  # of which epoch
        if stored:
            crops = stored.epoch_of(epoch)
            with user_errors():
                stored.read(crops)
        batches = train.train_batches(args.batch_size, args.seed, crops, views, views_epoch=epoch)
        for number, batch in enumerate(together.looks(teachers, batches), 1):
            for run in active:
                optimise.set_learning_rate(run.opt, run.learning_rate(epoch + (number - 0.5) / steps, args))
            together.train(train_student, active, batch)
            live.bar.update()
            active = [run for run in active if not run.meter.failure]  # a failed student stops, others go on
            if not active:
                break
            if not live.bar.disable and number % args.print_freq == 0:
                losses = '  '.join(f'{run.name} {run.meter.read().get("ce", 0):.3f}' for run in active)
                live.bar.set_postfix_str(f'epoch {epoch + 1}, ce: {losses}')

        rows = {run.name: {'epoch': epoch + 1, 'phase': run.phase, 'lr': run.learning_rate(epoch, args),
                           **run.meter.read(run.step)} for run in begun}  # fmt: skip
        session.drop_failed(live, begun, runs)
        in_training = [run for run in begun if run.phase == 'train']
        counts = together.each(lambda run: measure(run.net, val, test, amp), in_training)
        for run, counted in zip(in_training, counts):
            rows[run.name] |= measured(counted)
        done = []
        for run in begun:
            row = rows[run.name] | {'seconds': time.time() - started}
            done.append((run.record, row, partial(epoch_line, run, args.epochs), f'{run.name}/'))
        if code := session.end_epoch(live, epoch, last, done):
            return code
        if not runs:
            break

    done = []
    for run in runs:
        facts = {'script': 'train_kd', 'method': run.name, 'student': args.s_name, **facts_t,
                 'data': args.data_name, 'seed': args.seed, 'epochs': args.epochs,
                 'trained_with': list(wanted), 'processes': processes(),
                 'global_relations': args.global_relations}  # fmt: skip
        facts |= {} if args.kd_stop is None else {'kd_stop': args.kd_stop}
        path = folder / run.name / 'student.pt'
        how = models.how_to_load(path, args.s_name, data_words(args), train.num_classes, train)
        done.append((run.record, path.name, facts, run.name, f'weights: {how}'))
    session.finish(live, done)


def train_student(run: Run, seen: Batch) -> None:
    """One step of one student: forward, backward, update. seen: the batch and what teachers say of it."""
    incomplete = len(seen.img) < run.batch_size and any(term.method.needs.full_batches for term in run.terms)
    if run.meter.failure or incomplete:
        return
    batch = replace(seen, now=run.now, epochs=run.epochs, generator=run.generator, rng=run.rng)
    if run.draws:
        torch.manual_seed(run.seeds.getrandbits(63))
    out, terms = run.step(batch, run.weights, run.inner, run.phase)
    run.reads_epoch = batch.reads_epoch
    weights = run.weights
    loss_kd = sum(weights[name] * term for name, term in terms.items() if name != 'ce')
    # without a weight, cross-entropy stays out: 0 times it would still move the classifier
    loss = weights['ce'] * terms['ce'] + loss_kd if weights.get('ce') else loss_kd

    if not isinstance(loss, torch.Tensor):  # in this epoch its method rests, and there is no cross-entropy
        run.meter.add(out, batch.target, **terms)
        return
    if not run.meter.guard(loss, run.opt, *(t.out for t in seen.all_t)):
        return
    special = [
        term.method.own.update for term in run.terms if term.method.own.update and term.name in weights
    ]
    if special and weights.get('ce') and run.phase == 'train':
        special[0](run.opt, weights['ce'] * terms['ce'], loss_kd, batch.epoch)
    else:
        run.opt.zero_grad(set_to_none=True)
        run.scaler.scale(loss).backward()
        run.scaler.step(run.opt)
        run.scaler.update()
    run.meter.add(out, batch.target, **terms)


def begin_epoch(run: Run, epoch: int, args) -> None:
    """Phase, weights, modes, generators, meter and optimiser of a run for this epoch."""
    run.step.train()
    run.now, run.phase = run.own(epoch), run.phase_of(epoch)
    pretrain, init = run.before
    begins = run.now in (-pretrain - init, -init, 0)
    whole = getattr(run.step, 'module', run.step)  # inside DistributedDataParallel
    if begins:
        run.opt.state.clear()  # every phase starts with a fresh optimiser
        same_buffers(whole)  # the statistics that a loss has made in its own phase, and uses from here on
    taught = set(run.weights)
    run.weights = whole.weights(run.phase, run.now, run.epochs)
    run.inner = whole.inner(run.now, run.epochs)
    if begins or set(run.weights) != taught:  # a loss that rests has no term, and not 0
        run.meter.sums.clear()
    seed = args.seed * 1_000_003 + epoch
    run.generator.manual_seed(seed + 7919 * rank())  # processes draw different numbers
    run.rng, run.seeds = random.Random(seed), random.Random(seed + 7919 * rank())
    run.meter.reset(epoch)


def epoch_line(run: Run, epochs: int, row: dict) -> str:
    shown = '  '.join(
        f'{name} {row[name]:.4f}' for name in ('ce', *(k.name for k in run.terms)) if name in row
    )
    if row['phase'] != 'train':
        left = run.before[1] if row['phase'] == 'init' else sum(run.before)
        done = run.own(row['epoch']) + left
        total = run.before[row['phase'] == 'init']
        return f'{row["phase"]} {done}/{total}  {run.name:12s} {shown}  {row["seconds"]:.0f} s'
    return (
        f'epoch {row["epoch"]}/{epochs}  {run.name:12s} {shown}  '
        f'train {row["train_top1"]:.2f}  test {row["test_top1"]:.2f}  '
        f'best {run.record.best["test_top1"]:.2f}  {row["seconds"]:.0f} s'
    )


if __name__ == '__main__':
    errors.run(main)
