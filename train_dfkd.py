"""Distil a frozen teacher into a student without data: images are made from what the teacher knows.

    python train_dfkd.py --kd_mode dafl --t_name resnet20 --t_model save/base/net.pt --s_name resnet8
    python train_dfkd.py --kd_mode dafl dfad ...     students that share teacher and test set
    python train_dfkd.py --kd_mode cmi --pool_save pool.pt ...    keeps the images that were made
    python train_dfkd.py --kd_mode kd_pool --pool_init pool.pt ...    trains on such images only

No image of the training set is read, it need not be there; the test set is only measured on. A method's
preset (--kd_mode list) is its authors' for CIFAR-10 (docs/data-free.md has the exceptions) on a GPU, hours to
days; every flag overrides a value.

Writes to SAVE_ROOT/NOTE: log.txt, args.json, and for each student a folder with last.pt (with the image
source), best.pt, student.pt (plain weights of the last epoch), metrics.csv, results.json, images/.
"""

import time
from functools import partial
from pathlib import Path

import engine.threads  # noqa: F401  before torch

import torch
from torch import nn
from torchvision.utils import make_grid, save_image

import dataset
import models
from engine import errors, listing, session
from engine.data import read_test
from engine.device import autocast, setup
from engine.dfkd_build import Run, build_run, read_teacher, setting_of
from engine.dfkd_flags import WEIGHTS, read_methods
from engine.errors import UserError, user_errors
from engine.evaluate import classes, counted, figures
from engine.flags import (
    add_data_flags,
    add_head_flag,
    add_machine_flags,
    add_output_flags,
    any_number,
    check_head,
    data_words,
    fraction,
    head_of,
    milestone,
    positive_float,
    positive_int,
    seed_number,
    share_of_ce,
    whole_number,
)
from engine.parser import Parser
from engine.record import class_names_of, output_folder, provenance, save_checkpoint
from engine.session import Log
from methods.dfkd import DFKD


def parse_args(words=None):
    parser = Parser(__doc__)
    # fmt: off
    flag = parser.add_argument_group('distillation').add_argument
    flag('--kd_mode', nargs='+', required=True, metavar='METHOD', action=listing.lists(DFKD),
         help='one student per word; list: print all methods, what they need, their presets and options')
    flag('--kd_args', nargs='+', default=[], metavar='KEY=VALUE',
         help='options of a method, e.g. meta=none, or METHOD.KEY=VALUE with several; see --kd_mode list')
    flag('--t_name', nargs='+', default=[], metavar='NAME', help=f'teacher: {models.NAMES}')
    flag('--t_model', nargs='+', default=[], metavar='FILE', help="the teacher's checkpoint")
    flag('--s_name', required=True, metavar='NAME', help='student, one of the same names')
    flag('--s_init', metavar='FILE', help='initial weights of all students; default: drawn from --seed')
    add_head_flag(flag, '--s_init')
    flag('--ood_name', metavar='NAME',
         help="real images of another domain, for a method that wants some: shapes, cifar10, cifar100, or "
              'scenes (embedded rooms), each also as NAME:N')
    flag('--pool_init', metavar='FILE', help='images to begin with, of --pool_save')
    flag('--pool_save', metavar='FILE', help='write the images that one method has made to this file')
    flag('--dry_run', action='store_true',
         help='three rounds of everything, small, into a folder whose name ends with -dry; without --t_model '
              'of a random teacher')
    flag = parser.add_argument_group("recipe (defaults are the method's preset)").add_argument
    flag('--epochs', type=positive_int, help='with those of --warmup')
    flag('--ep_steps', type=positive_int, metavar='N', help="the student's updates in an epoch")
    flag('--kd_steps', type=positive_int, metavar='N', help="the student's updates in a round")
    flag('--g_steps', type=whole_number, metavar='N', help="the image source's updates in a round")
    flag('--batch_size', type=positive_int, help='of the student')
    flag('--synth_batch_size', type=positive_int, metavar='N', help='of the image source')
    flag('--warmup', type=whole_number, metavar='N', help='epochs in which only images are made')
    flag('--T', type=positive_float, help='temperature of the soft targets')
    flag('--optim', choices=('sgd', 'adam'), help="the student's")
    flag('--lr', type=positive_float, help="the student's learning rate")
    flag('--momentum', type=fraction, help='SGD, plain')
    flag('--weight_decay', type=fraction, help='on all parameters of the student')
    flag('--sched', choices=('cosine', 'steps'), help="of the student's learning rate")
    own = ', '.join(f'{method} {" ".join(map(str, row.recipe.milestones))}'
                    for method, row in DFKD.items() if row.recipe.milestones)  # fmt: skip
    flag('--milestones', type=milestone, nargs='*', metavar='F',
         help="steps: shares of the student's epochs after which the rate is a tenth; default: of "
              f'{own}, of others none')
    flag('--eta_min', type=fraction, help='cosine: the last learning rate')
    flag('--lr_g', type=positive_float, help="the image source's learning rate")
    flag('--sched_g', choices=('constant', 'student'), help='whether it moves, and then as the student\'s')
    flag('--lr_z', type=positive_float, help='of the noise, where it is optimised')
    flag('--clip', type=share_of_ce, help="limit of both gradients' norms, 0: none")
    flag('--nz', type=positive_int, help='length of the noise')
    flag('--width', type=positive_int, help="of generators but kegnet's; all authors have 64")
    flag('--pool_max', type=positive_int, metavar='N', help='how many images a pool keeps; default all')
    flag('--seed', type=seed_number, default=2, help='of initial weights and images, default 2')
    flag = parser.add_argument_group('weights of what the images minimise').add_argument
    for name in WEIGHTS:
        having = {method: row.weights[name] for method, row in DFKD.items() if name in row.weights}
        of = ', '.join(f'{method} {weight:g}' for method, weight in having.items())
        flag(f'--{name}', type=any_number, metavar='W', help=f'of {of}')
    add_data_flags(parser)
    add_machine_flags(parser)
    add_output_flags(parser)
    flag = parser.add_argument_group('measurements').add_argument
    flag('--eval_every', type=positive_int, default=1, metavar='N', help='epochs between tests, default 1')
    flag('--log_images', type=positive_int, nargs='?', const=1, metavar='N',
         help='every N epochs (default 1) write 64 images as a PNG, and to TensorBoard with --tensorboard')
    # fmt: on
    return parser.parse_args(words)


def main():
    args = parse_args()
    check_head(args, '--s_init')
    wanted = read_methods(args)
    if args.pool_save and len(wanted) > 1:
        raise UserError(f'--pool_save: a file is for one method, --kd_mode has {len(wanted)}')
    device = setup(args)
    amp = autocast(device, args.amp)
    name = f'dfkd-{args.data_name.replace(":", "")}-{"-".join(args.t_name)}-{args.s_name}-s{args.seed}'
    # a dry run beside the real one, which would take its checkpoints for its own
    folder = output_folder(Path(args.save_root) / ((args.note or name) + '-dry' * args.dry_run))
    log = Log(folder)

    test = read_test(args, device)
    args.own_images = test.digest() if dataset.owned(args.data_name) else None
    (net_t,), facts_t = read_teacher(args, test, amp, log)
    said_t = classes(net_t, test, amp)
    torch.manual_seed(args.seed)
    with user_errors():
        net_s = models.build(args.s_name, test.num_classes)
        if args.s_init:
            said = models.load_weights(net_s, args.s_init, new_head=args.new_head, head=head_of('--s_init'))
            log(f'initial student: {said}')
    origin, setting = provenance(device) | class_names_of(test), setting_of(args, test, device, amp)
    runs = [
        build_run(args, name, want, folder, origin, net_s, net_t, setting) for name, want in wanted.items()
    ]
    if args.pool_save:
        if not hasattr(runs[0].source, 'fill'):
            raise UserError(f'--pool_save: {" ".join(wanted)} keeps no images')
        output_folder(Path(args.pool_save).absolute().parent)
    log(f'{len(runs)} x {args.s_name} on {args.data_name}: {len(test)} test images, no others, {device}')
    log('best.pt is selected on test data, as published figures are; the last epoch stands beside it')
    total, start = max(run.recipe.epochs for run in runs), min(run.record.epoch for run in runs)
    steps = sum(run.recipe.ep_steps for run in runs)
    records = [run.record for run in runs]
    live = session.start(args, log, origin, records, val=test, done=start, epochs=total, steps=steps)
    for epoch in range(start, total):
        # others have fewer epochs, or a kill left them ahead
        begun = [run for run in runs if run.record.epoch == epoch < run.recipe.epochs]
        spent = {}
        for run in begun:
            started = time.time()
            train_epoch(run, epoch, args.seed, live)
            spent[run.name] = time.time() - started
        rows = {}
        for run in begun:
            made = run.source.meter.read()  # on CUDA a loss that was not finite shows here first
            run.meter.failure = run.meter.failure or run.source.meter.failure
            rows[run.name] = {'epoch': epoch + 1, **run.meter.read(run.net), **made}
        session.drop_failed(live, begun, runs)
        done = []
        for run in begun:
            row = rows[run.name] | run.source.facts()
            if (epoch + 1) % args.eval_every == 0 or epoch + 1 == run.recipe.epochs:
                row |= measure(run, test, amp, said_t)
            if args.log_images and (epoch + 1) % args.log_images == 0:
                draw(run, folder / run.name, epoch + 1, live.board)
            row['seconds'] = spent[run.name]
            done.append((run.record, row, partial(epoch_line, run), f'{run.name}/'))
        code = session.end_epoch(live, epoch, epoch + 1 == total, done)
        for run in begun:  # with --save_every, too; methods differ in length
            if run.record.epoch == run.recipe.epochs:
                run.record.save()
        if code:
            return code
        if not runs:
            break

    done = []
    for run in runs:
        run.check_teacher()
        facts = {'script': 'train_dfkd', 'method': run.name, 'student': args.s_name, **facts_t,
                 'data': args.data_name, 'seed': args.seed, 'epochs': run.recipe.epochs,
                 'hours_synth': sum(row['seconds_synth'] for row in run.record.history) / 3600}  # fmt: skip
        path = folder / run.name / 'student.pt'
        how = models.how_to_load(path, args.s_name, data_words(args), test.num_classes, test)
        done.append((run.record, path.name, facts, run.name, f'weights: {how}'))
    session.finish(live, done)
    if args.pool_save and runs:
        save_checkpoint(Path(args.pool_save), {'pool': runs[0].source.pool.images})


def train_epoch(run: Run, epoch: int, seed: int, live) -> None:
    """Rounds of an update of the images' source and of the student."""
    recipe, source = run.recipe, run.source
    torch.manual_seed(seed * 1_000_003 + epoch)  # dropout
    run.net.train()
    run.meter.reset(epoch)
    source.begin_epoch(seed, epoch)
    for k in range(0, recipe.ep_steps - recipe.kd_steps + 1, recipe.kd_steps):
        run.set_rates(epoch + k / recipe.ep_steps)
        if not run.row.images.student_first:
            source.synthesize()
        for _ in range(recipe.kd_steps if epoch >= recipe.warmup else 0):
            if run.meter.failure or source.meter.failure:
                break
            train_student(run)
            live.bar.update()
        if run.row.images.student_first:
            source.synthesize()
        run.meter.failure = run.meter.failure or source.meter.failure
        if run.meter.failure:
            return


def train_student(run: Run) -> None:
    """One step of a student on images that were made."""
    source, x = run.source, run.source.sample()
    t, s = source.says(x), source.student(x)
    loss = run.row.student(run.kd, s, t, run.recipe.T)
    if not run.meter.guard(loss, run.opt, t.out):
        return
    run.opt.zero_grad(set_to_none=True)
    loss.backward()
    if run.recipe.clip:
        nn.utils.clip_grad_norm_(run.net.parameters(), run.recipe.clip)
    run.opt.step()
    agree = (s.out.detach().argmax(dim=1) == t.out.detach().argmax(dim=1)).float().mean()
    run.meter.add(None, x, kd=loss, agree=100 * agree)


def measure(run: Run, test, amp, said_t) -> dict:
    """On the real test set: accuracies, cross-entropy, and how often it agrees with the teacher."""
    *counts, agreed = counted(run.net, test, amp, said_t)
    seen = figures(torch.stack(counts)) | {'agreement': 100 * float(agreed / counts[-1])}
    return {f'test_{key}': seen[key] for key in ('top1', 'top5', 'loss', 'agreement')}


def draw(run: Run, folder: Path, epoch: int, board) -> None:
    images = run.source.show(64).cpu()
    (folder / 'images').mkdir(exist_ok=True)
    save_image(images, folder / 'images' / f'epoch{epoch:04d}.png', nrow=8)
    if board:
        board.add_image(f'{run.name}/images', make_grid(images, nrow=8), epoch)


def epoch_line(run: Run, row: dict) -> str:
    shown = '  '.join(
        f'{name} {row[name]:.3f}' for name in ('kd', 'loss_g', *run.source.weights) if name in row
    )
    if 'test_top1' in row:
        shown += f'  test {row["test_top1"]:.2f}  agreement {row["test_agreement"]:.2f}'
    made = f'made {row["classes"]}, confidence {row["confidence"]:.2f}'
    return (
        f'epoch {row["epoch"]}/{run.recipe.epochs}  {run.name:9s} {shown}  {made}  '
        f'{row["seconds"]:.1f} s ({row["seconds_synth"]:.1f} s images)'
    )


if __name__ == '__main__':
    errors.run(main)
