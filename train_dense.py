"""Distil a small network for segmentation or detection from a larger one, torchvision's classes of both.

    python train_dense.py --kd_mode alone cwd st                     embedded rooms: a class for every pixel
    python train_dense.py --task detection --kd_mode alone pkd       boxes around objects
    python train_dense.py --kd_mode cwd+ifvd --labelled 200          two losses on one student
    torchrun --nproc_per_node=2 train_dense.py ...    several processes, --batch_size pictures each
    python train_dense.py --task detection --data_name coco --s_name fasterrcnn_resnet18_fpn \\
        --t_name fasterrcnn_resnet101_fpn --t_model teacher.pt --kd_mode dkd reviewkd --optim sgd --lr 0.01

Rooms: the teacher is trained first, on many labelled pictures, and kept in SAVE_ROOT; students have labels
for a few, and pictures without labels on which losses that need none compare them with the teacher. Other
data: all pictures have labels, and --t_model is a network that this script has trained, --kd_mode alone.
Students start from the same weights and see the same pictures and the same teacher forward. A student's
result is bit for bit (on the CPU) the one it gets when trained alone.

Writes to SAVE_ROOT/NOTE: log.txt, args.json, panels.npz (what was found in some test pictures of the rooms),
and for each student a folder with last.pt, best.pt, student.pt (plain weights after the last step),
metrics.csv, results.json.
"""

import time
from functools import partial
from pathlib import Path

import engine.threads  # noqa: F401  before torch

import torch
from torch.nn.utils import clip_grad_norm_

from dataset import annotated
from dataset.average_precision import library
from engine import dense as parts
from engine import errors, listing, session
from engine.augment import add_augment_flag
from engine.dense_build import make_run, refuse_other_heads, rows_for, share_of_rate, taught
from engine.dense_panels import keep_panels
from engine.dense_setting import make_setting
from engine.device import refuse_fp16, setup
from engine.errors import UserError
from engine.flags import (
    add_board_flag,
    add_machine_flags,
    add_place_flags,
    milestone,
    positive_float,
    positive_int,
    refuse_given,
    seed_number,
    whole_number,
)
from engine.method_flags import refuse_many_processes, refuse_repeated, refuse_unknown, weights_and_options
from engine.optimise import set_learning_rate
from engine.parser import Parser
from engine.processes import averaged, processes, rank
from engine.record import output_folder, provenance
from engine.session import Log
from methods.dense import DENSE

NETWORKS = {'segmentation': ('lraspp:resnet18', 'lraspp:mobilenet_v3_small@0.5'),
            'detection': ('fasterrcnn:resnet18', 'fasterrcnn:resnet10')}  # fmt: skip


def parse_args(words=None):
    parser = Parser(__doc__)
    # fmt: off
    flag = parser.add_argument_group('distillation').add_argument
    flag('--task', choices=tuple(NETWORKS), default='segmentation', help='default segmentation')
    flag('--kd_mode', nargs='+', required=True, metavar='METHOD', action=listing.lists(DENSE),
         help='one student per word; A+B joins losses; alone: labels only, no teacher; list: print all '
              'methods, what they need, their weights and arguments')
    flag('--lambda_kd', nargs='+', default=[], metavar='W',
         help="weight of the loss: a number, or METHOD=number with several methods; default: the method's, "
              'see --kd_mode list')
    flag('--kd_args', nargs='+', default=[], metavar='KEY=VALUE',
         help='arguments of the loss, e.g. tau=1, or METHOD.KEY=VALUE with several methods')
    flag = parser.add_argument_group('networks').add_argument
    flag('--s_name', metavar='NAME',
         help="student: a name of torchvision's, deeplabv3_resnet50, fasterrcnn_resnet50_fpn, or a small "
              'one, HEAD:BACKBONE; heads lraspp, fcn, deeplabv3; fasterrcnn, retinanet, fcos; backbones '
              'resnet10, resnet18 ..., mobilenet_v2, mobilenet_v3_small@0.5 ...; default '
              + ', '.join(pair[1] for pair in NETWORKS.values()))
    flag('--t_name', metavar='NAME',
         help='teacher, a name likewise; default ' + ', '.join(pair[0] for pair in NETWORKS.values()))
    flag('--t_model', metavar='FILE', help='weights of the teacher; default: see above')
    flag('--s_init', metavar='FILE',
         help="weights that students start from, of the whole network or torchvision's of its backbone; "
              'batch norms of FPN detectors on a ResNet or MobileNetV2 are frozen then')
    flag = parser.add_argument_group('data').add_argument
    flag('--data_name', default='scenes', metavar='NAME',
         help='scenes or scenes:N (embedded rooms, N training pictures, 1200), voc (2012), coco (detection); '
              'default scenes')
    flag('--img_root', default='./data',
         help='where VOCdevkit/ or coco/ lies, and where rooms are kept; default ./data')
    flag('--size', type=positive_int, default=64,
         help='side of the rooms; segmentation of voc: of the crops; small detectors (HEAD:BACKBONE): every '
              'picture is scaled to it; default 64')
    flag('--labelled', type=positive_int, metavar='N',
         help='pictures whose labels students see; default: 50 or, for detection, 100 of scenes, else all')
    flag('--unlabelled', type=whole_number, metavar='N',
         help='further pictures, without labels; 0: every loss gets the labelled ones; default: as many '
              'as scenes has, else 0')
    add_augment_flag(flag, 'segmentation')
    flag('--workers', type=whole_number, default=0, help='processes that prepare pictures, default 0')
    flag = parser.add_argument_group('recipe').add_argument
    flag('--steps', type=positive_int, default=300, help='steps of each student, default 300')
    flag('--t_steps', type=positive_int, default=350, help="steps of the rooms' teacher, default 350")
    flag('--batch_size', type=positive_int, default=16,
         help='labelled pictures of a step, and as many others, of each process; default 16')
    flag('--optim', choices=('adamw', 'sgd'), default='adamw',
         help='adamw: weight decay 0.01; sgd: momentum 0.9, weight decay 1e-4; default adamw')
    flag('--lr', type=positive_float, default=2e-3, help='highest learning rate, default 0.002')
    flag('--schedule', choices=('onecycle', 'poly', 'steps'), default='onecycle',
         help='onecycle: up over a fifth, then down to 0; poly: (1 - share of the run)^0.9; steps: a tenth '
              'at each of --milestones; default onecycle')
    flag('--milestones', type=milestone, nargs='*', default=[0.667, 0.889], metavar='F',
         help='steps: shares of the run; default 0.667 0.889')
    flag('--warmup', type=whole_number, default=0, metavar='N',
         help='first steps, in which the rate rises linearly; default 0')
    flag('--eval_every', type=positive_int, default=150, metavar='N',
         help='look at the test pictures and write last.pt every N steps: a kill loses up to N; default 150')
    flag('--seed', type=seed_number, default=2, help='of students and pictures, default 2')
    # fmt: on
    add_machine_flags(parser)
    flag = add_place_flags(parser)
    add_board_flag(flag)
    flag('--dry_run', action='store_true', help='say what would be trained, and end')
    args = parser.parse_args(words)
    if args.schedule != 'steps':
        refuse_given(args, {'milestones': [0.667, 0.889]}, f'--schedule {args.schedule} does not read it')
    return args


def read_methods(args) -> dict[str, dict]:
    """{word: {method: (row, weight, options)}}; names of networks are filled in."""
    args.t_name, args.s_name = (a or b for a, b in zip((args.t_name, args.s_name), NETWORKS[args.task]))
    rows = rows_for(DENSE, args.task, args.s_name)
    names = list(dict.fromkeys(name for word in args.kd_mode for name in word.split('+')))
    other = {name: f'is for --task {row.task}' for name, row in DENSE.items() if name not in rows}
    refuse_unknown('--kd_mode', names, rows, other)
    refuse_repeated('--kd_mode', args.kd_mode)
    refuse_other_heads(names, rows, args.s_name, args.t_name)
    refuse_many_processes(names, rows)
    refuse_fp16(args)
    if args.augment is not None and args.task == 'detection':
        raise UserError('--augment: for --task segmentation; boxes are only mirrored')
    if args.size % 32:
        raise UserError(f'--size {args.size}: must be a multiple of 32')
    if not any(rows[name].needs.teacher for name in names):
        refuse_given(args, {'t_model': None, 't_steps': 350}, f'{" ".join(names)} has no teacher')
    if args.t_model:
        refuse_given(args, {'t_steps': 350}, 'no teacher is trained here')
    weights, options = weights_and_options(args, names, rows)
    return {word: {name: (rows[name], weights[name], options[name]) for name in word.split('+')}
            for word in args.kd_mode}  # fmt: skip


def main():
    args = parse_args()
    wanted = read_methods(args)
    device = setup(args)
    if not args.data_name.startswith('scenes'):  # pictures of other sizes in every step
        torch.backends.cudnn.benchmark = False
    if args.dry_run:
        if rank() > 0:
            return
        print(f'{args.task} of {args.data_name}: {args.t_name} teaches {args.s_name}, {args.steps} steps')
        for word, chosen in wanted.items():
            print(
                f'{word:16s} ' + ', '.join(f'{n} weight {w:g} {o or ""}' for n, (_, w, o) in chosen.items())
            )
        return
    root = Path(args.save_root)
    folder = output_folder(
        root / (args.note or f'{args.task}-{args.data_name}-s{args.seed}'.replace(':', ''))
    )
    log, origin = Log(folder), provenance(device)
    setting, net = make_setting(args, device, root, log, any(map(taught, wanted.values())))
    origin |= {'class_names': list(setting.class_names)}
    runs = [make_run(args, setting, net, folder, origin, word, chosen) for word, chosen in wanted.items()]
    records = [run.record for run in runs]
    live, segments = session.start_by_steps(args, log, origin, records, val=None, what='pictures')
    for segment in segments:
        started = time.time()
        begun = active = [run for run in runs if run.record.epoch == segment]  # a kill left others ahead
        for run in active:
            run.train(True)
            run.meter.reset(segment)
        last = min((segment + 1) * args.eval_every, args.steps)
        numbers = range(segment * args.eval_every, last)
        for step, pictures in zip(numbers, annotated.in_order(setting.batches, numbers, args.workers)):
            seen = parts.StepPictures(setting, step, pictures)
            for run in active:
                train_student(run, seen, args)
            live.bar.update()
            active = [run for run in active if not run.meter.failure]  # a failed student stops, others go on
            if not active:
                break
        rows = {run.name: {'epoch': segment + 1, 'step': last, **run.meter.read(run.net)} for run in begun}
        session.drop_failed(live, begun, runs)
        done = []
        for run in begun:
            run.train(False)
            figures = {f'test_{key}': value for key, value in setting.task.measure(run.net).items()}
            row = rows[run.name] | figures | {'seconds': time.time() - started}
            done.append((run.record, row, partial(line, run, args.steps), f'{run.name}/'))
        if code := session.end_epoch(live, segment, segment + 1 == live.epochs, done):
            return code
        if not runs:
            break

    if args.data_name.startswith('scenes') and rank() == 0:
        keep_panels(setting, runs, folder / 'panels.npz')
    done = []
    for run in runs:
        facts = {'script': 'train_dense', 'task': args.task, 'method': run.name, 'student': args.s_name,
                 'teacher': setting.facts, 'data': args.data_name, 'size': args.size, 'seed': args.seed,
                 'steps': args.steps, 'labelled': setting.pictures, 'unlabelled': setting.unlabelled,
                 **setting.augmented, 'trained_with': list(wanted), 'processes': processes(),
                 'parameters': sum(p.numel() for p in run.net.parameters())}  # fmt: skip
        if args.task == 'detection':
            facts['ap_by'] = library()
        path = folder / run.name / 'student.pt'
        done.append(
            (run.record, path.name, facts, run.name, f'weights: {path}; {how_to_build(args, setting)}')
        )
    session.finish(live, done)


def train_student(run: parts.Run, seen: parts.StepPictures, args) -> None:
    """One step of one student: its own loss with labels, the methods' on their pictures, backward, update."""
    task = run.setting.task
    given = seen.given('labelled')
    seen.seed()
    s = {'labelled': task.look(run.net, given)}
    loss = task.loss(s['labelled'], given)
    terms = {'task': loss}
    for term in run.terms:
        if not term.weight:
            continue
        part = seen.part(term.method)
        if part not in s:
            s[part] = task.look(run.net, seen.given(part))
        terms[term.name] = term.method.feed(term.kd, s[part], seen.teacher(part), parts.Batch(seen, part))
        loss = loss + term.weight * terms[term.name]
    if not run.meter.guard(loss, run.opt, *seen.heard()):
        return
    run.opt.zero_grad(set_to_none=True)
    loss.backward()
    averaged(run.parameters)
    task.clipped(run.parameters)
    for term in run.terms:
        if term.method.clip:
            clip_grad_norm_(term.kd.parameters(), term.method.clip)
    set_learning_rate(run.opt, args.lr * share_of_rate(args, seen.step))
    run.opt.step()
    run.meter.add(None, seen.parts['labelled'][0], **terms)


def how_to_build(args, setting) -> str:
    """For the log: the network that a file of weights is of."""
    words = f'{args.task!r}, {args.s_name!r}, {setting.num_classes}, {args.size}, frozen={bool(args.s_init)}'
    return f'models.dense.build({words}) is the network, models.load_weights(net, path) fills it'


def line(run: parts.Run, steps: int, row: dict) -> str:
    figures = '  '.join(f'{key} {row[f"test_{key}"]:5.2f}' for key in run.setting.task.shown)
    start = f'step {row["step"]}/{steps}  {run.name:16s} loss {row["task"]:.3f}'
    return f'{start}  {figures}  {row["seconds"]:.0f} s'


if __name__ == '__main__':
    errors.run(main)
