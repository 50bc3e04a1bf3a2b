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
import torch.nn.functional as F
from torch import Tensor, nn

import dataset
import models
import utils
from dataset.dense import TASKS, DenseMetrics, channels_of, supervised
from engine import listing, side_by_side
from engine.batch import as_float
from ka_losses import METHODS, ConcatKD, Method
from models.branching import JointNet
from models.segmentation import SegNet

ENSEMBLE = 'ensemble'  # a word of --ka_mode that trains nothing


def parse_args():
    parser = utils.Parser(__doc__)
    # fmt: off
    flag = parser.add_argument_group('amalgamation').add_argument
    flag('--ka_mode', nargs='+', required=True, metavar='METHOD', action=listing.lists(METHODS),
         help='one student per word (scratch is the reference that reads labels); list: print all methods, '
              f'what they need, their weights and arguments; {ENSEMBLE}: only evaluate the teachers, which '
              'is done in any case')
    flag('--lambda_ka', nargs='+', default=[], metavar='W',
         help='weight of the loss: a number, or METHOD=number with several methods; default: the '
              "method's, see --ka_mode list")
    flag('--lambda_kd', type=float, metavar='W',
         help="weight of soft targets over all classes beside it; default: the method's, 1 or 0")
    flag('--T', type=utils.positive_float, default=1.0, help='temperature of these, default 1')
    flag('--ka_args', nargs='+', default=[], metavar='KEY=VALUE',
         help='arguments of the loss, e.g. h_channels=64, or METHOD.KEY=VALUE with several methods')
    flag('--ka_layers', nargs='+', type=stage, metavar='rbK',
         help="stages of the networks that the loss attaches to; default: the method's")
    flag('--t_name', nargs='+', default=[], metavar='NAME',
         help=f'teachers, or one name for all: {models.NAMES}; scenes: segnet (small, default), segnet_vgg')
    flag('--t_model', nargs='+', default=[], metavar='FILE', help="the teachers' checkpoints")
    flag('--s_name', metavar='NAME', help='student, one of the same names; default: as the first teacher')
    flag('--s_init', metavar='FILE', help='initial weights of all students; default: drawn from --seed')
    flag = parser.add_argument_group('who knows what').add_argument
    flag('--num_parts', type=utils.positive_int, metavar='N',
         help='parts of the classes, one per teacher in turn; default: as many as teachers')
    flag('--split', choices=('contiguous', 'interleaved', 'random'), default='contiguous',
         help='as for train_base.py; default contiguous')
    flag('--t_classes', nargs='+', metavar='LIST', help="or each teacher's classes, e.g. 0-4 5-9")
    flag('--wanted', metavar='LIST',
         help="the student's classes, where teachers share classes or not all are wanted: every teacher is "
              'cut to those it knows')
    flag('--unlabeled', metavar='NAME', help="train on another data set's images instead, e.g. cifar100")
    flag('--limit_train', type=utils.positive_int, metavar='N', help='only N training images')
    flag('--limit_test', type=utils.positive_int, metavar='N', help='only N test images')
    flag('--tasks', nargs='+', choices=TASKS, default=list(TASKS),
         help='scenes, nyuv2: the dense tasks, one per teacher; default ' + ' '.join(TASKS))
    flag('--size', type=utils.positive_int, default=48, help='scenes, nyuv2: side of the images, default 48')
    flag('--labelled', action='store_true',
         help='scenes: train on the images that the teachers had labels for; default where every student '
              'reads labels')
    flag('--epochs_ft', type=utils.whole_number, default=5,
         help='scenes: epochs of fine-tuning after those of --epochs, at half the learning rate; default 5')
    flag = parser.add_argument_group('optimiser').add_argument
    flag('--optim', choices=('adam', 'sgd'), default='adam',
         help='adam with cosine to 0 in every step (default), or sgd with milestones; --schedule onecycle '
              'replaces either')
    flag('--lr_ka', type=utils.positive_float, metavar='LR',
         help="learning rate of the loss's own modules; default as --lr with adam, 0.01 with sgd")
    # fmt: on
    rooms = '; dense tasks: scenes (embedded; scenes:N for N training images) or nyuv2'
    rate = 'default 0.001 with adam, 0.1 with sgd'
    utils.add_common_flags(parser, epochs=100, lr=None, rate=rate, more_data=rooms)
    utils.add_thread_flag(parser)
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
        self, net: nn.Module, ka: nn.Module, method: Method, kd: float, weight: float, world
    ) -> None:
        super().__init__()
        self.net, self.ka, self.method, self.kd, self.weight, self.world = net, ka, method, kd, weight, world
        self.soft = ConcatKD(T=world.T)

    def forward(self, b: SimpleNamespace, ts: list) -> tuple[Tensor, dict]:
        """The loss, and its terms without weights; b: the batch, see ka_losses."""
        forward = self.method.forward or self.world.forward
        with self.world.amp():
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
    record: utils.Record
    layers: tuple
    rng: random.Random = None  # for losses that draw a choice
    meter: utils.Meter | None = None


def main():
    args = parse_args()
    wanted, weights, options = read_methods(args)
    device = utils.setup(args)
    name = f'ka-{args.data_name.replace(":", "")}-{args.s_name or "student"}-s{args.seed}'
    folder = utils.output_folder(Path(args.save_root) / (args.note or name))
    log = utils.Log(folder)
    origin = utils.provenance(device)

    kind = Scenes if args.data_name.partition(':')[0] in ('scenes', 'nyuv2') else Classes
    world = kind(args, wanted, device, log)
    origin |= utils.class_names_of(world.train)
    if world.nets:
        write_ensemble(folder, world, args, origin)
    runs = [
        build_run(args, name, method, weights[name], options[name], world, folder, origin)
        for name, method in wanted.items()
    ]
    utils.compile_networks(args, *world.nets, *(run.net for run in runs))
    utils.write_json(folder / 'args.json', {'args': vars(args), **origin})
    if not runs:
        return None
    board = utils.tensorboard(folder, args.tensorboard)
    stop = utils.StopAfterEpoch()
    ends = world.phases(args)  # the last epoch of each phase + 1
    total, start = ends[-1], min(run.record.epoch for run in runs)
    log(f'{len(runs)} x {world.student_name} on {args.data_name}: {len(world.train)} + {len(world.test)} '
        f'images, {device}')  # fmt: skip
    log(f'{start} of {total} epochs done, output in {folder}')
    if not world.val:
        log('best.pt is selected on test data (--val_split holds out training images for that)')

    def look(img, target, index, _):
        return img, target, index, world.look(img)

    together = side_by_side.choose(args, device, len(runs), log)
    steps, failures = world.train.steps(args.batch_size), []
    bar = utils.progress_bar(steps * total, steps * start, log)
    for epoch in range(start, total):
        started = time.time()
        active = [run for run in runs if run.record.epoch == epoch]  # a kill may have left others ahead
        phase = sum(epoch >= end for end in ends)
        first = ends[phase - 1] if phase else 0
        for run in active:
            begin_epoch(run, epoch, phase, epoch == first, world, args, device, log)

        batches = world.train.train_batches(args.batch_size, args.seed, epoch)
        for k, seen in enumerate(together.looks(look, batches)):
            lr = learning_rates(args, phase, (epoch - first + k / steps) / (ends[phase] - first))
            when = When(epoch, total, phase, (epoch + k / steps) / total, lr)
            together.train(partial(train_student, world=world, when=when), active, seen)
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
        for run, measured in zip(begun, together.each(lambda run: world.measure(run.net), begun)):
            row = rows[run.name] | measured | {'seconds': time.time() - started}
            run.record.epoch_done(row, save=epoch + 1 == total or (epoch + 1) % args.save_every == 0)
            shown = '  '.join(f'{key} {row[f"test_{key}"]:.2f}' for key in world.shown)
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
        facts = {'script': 'train_ka', 'method': run.name, 'student': world.student_name, **world.facts,
                 'data': args.data_name, 'seed': args.seed, 'epochs': total, 'trained_with': list(wanted),
                 'processes': utils.processes(), **world.details(run.net)}  # fmt: skip
        if len(ends) > 1:
            facts['after_first_phase'] = utils.tested(run.record.history[ends[0] - 1])
        utils.save_checkpoint(folder / run.name / 'ka.pt', run.ka.state_dict())
        log(f'{run.name}: {run.record.finish("student.pt", facts)}')
    if failures:
        raise utils.NonFinite('; '.join(failures))


@dataclass
class When:
    """Where in the training a step is."""

    epoch: int
    epochs: int
    phase: int
    done: float  # share of the whole training
    lr: dict[str, float]  # by the role of a group of parameters


def train_student(run: Run, seen: tuple, world, when: When) -> None:
    """One step of one student: an update, or several. seen: images, labels, numbers, what teachers say."""
    img, target, index, ts = seen
    b = SimpleNamespace(img=img, epoch=when.epoch, epochs=when.epochs, phase=when.phase, layers=run.layers,
                        blocks=world.blocks, rng=run.rng)  # fmt: skip
    if run.method.labels:  # nobody else gets to see them
        b.target, b.supervised = target, world.supervised
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


def begin_epoch(run: Run, epoch: int, phase: int, begins: bool, world, args, device, log) -> None:
    """Generators, meter and modes of a run for this epoch; what its method does where a phase begins."""
    run.rng = random.Random(args.seed * 1_000_003 + epoch)
    run.meter = utils.Meter(run.name, epoch, device)
    if begins:
        for opt in run.opts.values():
            opt.state.clear()
        if run.method.phase:
            said = run.method.phase(run.net, phase, run.ka, world.look, world.sample)
            log(f'{run.name}: phase {phase + 1}{said and ", "}{said}')
    run.step.train()
    if run.method.phase:
        run.net.freeze(phase == 0)


def learning_rates(args, phase: int, done: float) -> dict[str, float]:
    """Of student ('net') and loss ('ka'); done: the share of this phase; a later phase has half the rate."""
    if args.schedule == 'onecycle':
        factor = utils.one_cycle(done)
    elif args.optim == 'adam':
        factor = 0.5 * (1 + math.cos(math.pi * done))
    else:
        factor = args.lr_decay ** sum(done >= share for share in args.milestones)
    return {'net': args.lr * factor / (phase + 1), 'ka': args.lr_ka * factor / (phase + 1)}


class Classes:
    """Teachers that know some classes each; students have the classes of all."""

    key, shown = 'top1', ('top1',)

    def __init__(self, args, wanted: dict[str, Method], device, log) -> None:
        self.amp, self.T = utils.autocast(device, args.amp), args.T
        train, val, test = utils.load_data(args, device, log)
        names = args.t_name * len(args.t_model) if len(args.t_name) == 1 else args.t_name
        if len(names) != len(args.t_model) or len(names) < 2:
            raise utils.UserError(
                f'--t_name and --t_model: needs two teachers or more, got {len(args.t_name)} names and '
                f'{len(args.t_model)} files'
            )
        with utils.user_errors():
            parts = self._parts(args, train.num_classes, len(names))
            chosen = dataset.read_classes(args.wanted, train.num_classes) if args.wanted else None
            self.split = dataset.ClassParts(parts, chosen)
        self.blocks = self.split.blocks
        asks = {
            True: 'wants teachers that share the classes of --wanted',
            False: 'wants parts that do not overlap',
        }
        for name, method in wanted.items():
            if method.shared != self.split.overlap and not method.labels:
                raise utils.UserError(f'--ka_mode {name}: {asks[method.shared]}')
        self.nets = [
            self._teacher(i, name, path, part, test, log)
            for i, (name, path, part) in enumerate(zip(names, args.t_model, parts), 1)
        ]
        self.facts = {'teacher': '+'.join(names), 'parts': parts, 'classes': self.split.classes,
                      'teachers': [{'name': name, 'classes': part, 'top1': net.top1}
                                   for name, part, net in zip(names, parts, self.nets)]}  # fmt: skip
        with utils.user_errors():
            self.train, self.val, self.test = (
                data and dataset.take_classes(data, self.split.classes) for data in (train, val, test)
            )
            if args.unlabeled:
                other, _ = dataset.load(args.unlabeled, args.img_root, device)
                self.train = self.train.pictures(other)
        self.train, self.test = limited(self.train, args.limit_train), limited(self.test, args.limit_test)
        self.args, self.student_name = args, args.s_name or names[0]
        self.shown = ('top1', *(f'part{i + 1}' for i in range(len(self.split.distinct()))))

    @staticmethod
    def _parts(args, num_classes: int, teachers: int) -> list[list[int]]:
        if args.t_classes:
            parts = [dataset.read_classes(text, num_classes) for text in args.t_classes]
        else:
            parts = dataset.split_classes(num_classes, args.num_parts or teachers, args.split, args.seed)
        if len(parts) != teachers:
            raise utils.UserError(f'{len(parts)} parts of the classes for {teachers} teachers')
        return parts

    def _teacher(self, i: int, name: str, path: str, part: list[int], test, log) -> nn.Module:
        """A frozen teacher that is good for its part, with its accuracy there as .top1."""
        try:
            with utils.user_errors():
                net = models.build_for(path, name, len(part))
                mine = dataset.take_classes(test, part)
            read = utils.load_teacher(net, path, mine, self.amp)
        except utils.UserError as error:
            raise utils.UserError(f'teacher {i} ({name} for the classes {part}): {error}') from None
        log(f'teacher {i}, {name}: {read["said"]}; classes {part}, top-1 there {read["top1"]:.2f}')
        net.top1 = read['top1']
        return net

    @staticmethod
    def phases(args) -> list[int]:
        return [args.epochs]

    def student(self, method: Method) -> nn.Module:
        torch.manual_seed(self.args.seed)
        with utils.user_errors():
            net = models.build(self.student_name, len(self.split.classes))
            if self.args.s_init:
                models.load_weights(net, self.args.s_init)
        return net

    def forward(self, net: nn.Module, b):
        return net(b.img, True)

    @torch.no_grad()
    def look(self, img: Tensor) -> list:
        """What the teachers see, their logits cut to the classes in use."""
        with self.amp():
            ts = [net(img, True) for net in self.nets]
        ts = [as_float(t) for t in ts]
        return [t._replace(out=t.out[:, columns]) for t, columns in zip(ts, self.split.columns)]

    def supervised(self, s, target: Tensor) -> Tensor:
        return F.cross_entropy(s.out, target)

    def measure(self, net: nn.Module) -> dict[str, float]:
        row = {}
        for half, data in (('val', self.val), ('test', self.test)):
            if data:
                read = self.split.metrics(*self._logits([net], data))
                row |= {f'{half}_{key}': value for key, value in read.items()}
        return row

    def details(self, net: nn.Module) -> dict:
        """Which part the student sends the images of each part to."""
        return {'routing': self.split.routing(*self._logits([net], self.test))}

    def ensembles(self) -> dict:
        """The teachers side by side: A, raw logits; B, each one's softmax; C, logits minus their mean.

        Of teachers that share classes: each by itself, cut to the wanted classes.
        """
        out, target = self._logits(self.nets, self.test)
        whole = out.split([len(part) for part in self.split.parts], dim=1)
        each = [x[:, columns] for x, columns in zip(whole, self.split.columns)]
        if self.split.overlap:  # each source by itself, where it knows all that is wanted
            knows_all = list(range(len(self.split.classes)))
            return {
                f'source {i}': self.split.metrics(x, target) | {'routing': self.split.routing(x, target)}
                for i, (x, block) in enumerate(zip(each, self.blocks), 1)
                if block == knows_all
            }
        forms = {
            'A': lambda x: x,
            'B': lambda x: x.softmax(dim=1),
            'C': lambda x: x - x.mean(1, keepdim=True),
        }
        order = torch.tensor([k for block in self.blocks for k in block], device=out.device).argsort()
        result = {}
        for name, form in forms.items():
            joined = torch.cat([form(x) for x in each], dim=1)[:, order]
            result[name] = self.split.metrics(joined, target) | {
                'routing': self.split.routing(joined, target)
            }
        return result

    def _logits(self, nets: list[nn.Module], data) -> tuple[Tensor, Tensor]:
        """(N, K) of all networks side by side, and the labels."""
        outs, target = utils.outputs(SideBySide(nets, self.amp), data)
        return outs[0], target


class SideBySide(nn.Module):
    """The logits of several networks, concatenated; utils.outputs wants them stacked."""

    def __init__(self, nets: list[nn.Module], amp: torch.autocast) -> None:
        super().__init__()
        self.nets, self.amp = nn.ModuleList(nets), amp

    def forward(self, img: Tensor) -> Tensor:
        with self.amp():
            outs = [net(img) for net in self.nets]
        return torch.cat(outs, dim=1).float()[None]


class Scenes:
    """Teachers of one dense task each; students have all tasks."""

    key, blocks, val = 'score', (), None

    def __init__(self, args, wanted: dict[str, Method], device, log) -> None:
        self.amp, self.T, self.args = utils.autocast(device, args.amp), args.T, args
        labelled = args.labelled or all(method.labels for method in wanted.values())
        if args.val_split:
            raise utils.UserError('--val_split: not for scenes and nyuv2')
        with utils.user_errors():
            self.train, self.test = dataset.load_dense(
                args.data_name, args.img_root, device, args.size, labelled
            )
        utils.share(self.train, self.test)
        needs = [name for name, method in wanted.items() if not method.labels]
        self.tasks, self.student_name = tuple(args.tasks), args.s_name or 'segnet'
        if len(args.t_model) not in ((len(self.tasks),) if needs else (0, len(self.tasks))):
            raise utils.UserError(
                f'--t_model: needs one teacher per task ({", ".join(self.tasks)}), got {len(args.t_model)}'
            )
        names = args.t_name * len(self.tasks) if len(args.t_name) == 1 else args.t_name
        names = names or ['segnet'] * len(self.tasks)
        if len(names) != len(self.tasks):
            raise utils.UserError(f'--t_name: {len(args.t_name)} names for {len(self.tasks)} tasks')
        self.nets, figures = [], []
        for task, name, path in zip(self.tasks, names, args.t_model):
            net = self.network(name, task)
            with utils.user_errors():
                said = models.load_weights(net, path)
            net.requires_grad_(False).eval().to(device, memory_format=torch.channels_last)
            read = self._metrics(lambda img, net=net: [net(img)], (task,))
            if not all(math.isfinite(value) for value in read.values()):
                raise utils.UserError(f'{path}: the teacher is not finite')
            log(f'teacher {task}: {said}; ' + ', '.join(f'{k} {v:.3g}' for k, v in read.items()))
            self.nets.append(net)
            figures.append({'name': name, 'task': task, **read})
        self.facts = {'teacher': '+'.join(names) if self.nets else None, 'tasks': self.tasks,
                      'teachers': figures, 'labelled': labelled}  # fmt: skip
        shown = {'seg': 'miou', 'depth': 'rmse', 'normal': 'angle_mean'}
        self.shown = [shown[task] for task in self.tasks]

    def network(self, name: str, task: str) -> SegNet:
        forms = {
            'segnet': {'widths': (16, 32, 48, 64), 'convolutions': (2, 2, 2, 2)},
            'segnet_vgg': {},
        }
        if name not in forms:
            raise utils.UserError(
                f'no network for dense tasks is called {name!r}; there are {", ".join(forms)}'
            )
        return SegNet(channels_of(task, self.train.num_classes), **forms[name])

    def phases(self, args) -> list[int]:
        return [args.epochs, args.epochs + args.epochs_ft] if args.epochs_ft else [args.epochs]

    def student(self, method: Method) -> nn.Module:
        """One network for all tasks: made of the teachers, or fresh where labels are read."""
        torch.manual_seed(self.args.seed)
        fresh = [self.network(self.student_name, task) for task in self.tasks]
        if method.labels and len(fresh) == 1:
            return fresh[0]  # a teacher
        torch.manual_seed(self.args.seed)
        return JointNet(fresh if method.labels else self.nets)

    def forward(self, net: nn.Module, b):
        out = net(b.img)
        return out if isinstance(out, list) else [out]

    @torch.no_grad()
    def look(self, img: Tensor) -> list[Tensor]:
        with self.amp():
            outs = [net(img) for net in self.nets]
        return [out.float() for out in outs]

    def sample(self):
        """Images without labels on which branch points are chosen: 400 of the training set, as they are."""
        for first in range(0, min(400, len(self.train)), 100):
            yield (self.train.images[first : min(first + 100, 400)] - 0.5,)

    def supervised(self, s: list[Tensor], target: dict) -> Tensor:
        return sum(supervised(task, out, target[task]) for task, out in zip(self.tasks, s))

    def measure(self, net: nn.Module) -> dict[str, float]:
        net.eval()
        utils.same_buffers(net)
        read = self._metrics(lambda img: self.forward(net, SimpleNamespace(img=img)), self.tasks)
        return {f'test_{key}': value for key, value in read.items()}

    def details(self, net: nn.Module) -> dict:
        """Sizes, of what is used, and where the branches leave the trunk."""
        joint = isinstance(net, JointNet)
        sizes = {'parameters': net.parameters_in_use() if joint else count(net),
                 'parameters_of_teachers': sum(map(count, self.nets))}  # fmt: skip
        return sizes | ({'branch_points': net.points.tolist()} if joint else {})

    def ensembles(self) -> dict:
        return {}

    @torch.no_grad()
    def _metrics(self, outputs, tasks: tuple) -> dict[str, float]:
        metrics = DenseMetrics(tasks, self.train.num_classes, self.train.device)
        for img, labels, _ in self.test.test_batches(100):
            with self.amp():
                outs = outputs(img)
            metrics.add(outs, labels)
        metrics.merge(utils.gathered(metrics.state()))
        return metrics.read()


def count(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def limited(data, n: int | None):
    """n images, drawn alike in every run."""
    if not n or n >= len(data):
        return data
    return data.subset(
        torch.randperm(len(data), generator=torch.Generator().manual_seed(0))[:n].to(data.device)
    )


def write_ensemble(folder: Path, world, args, origin: dict) -> None:
    """What the teachers reach by themselves, a row of the table."""
    (folder / ENSEMBLE).mkdir(exist_ok=True)
    facts = {'script': 'train_ka', 'method': ENSEMBLE, 'student': None, **world.facts,
             'data': args.data_name, 'seed': args.seed}  # fmt: skip
    utils.write_json(folder / ENSEMBLE / 'results.json', facts | {'ensembles': world.ensembles(), **origin})


def read_methods(args) -> tuple[dict[str, Method], dict, dict]:
    """{word of --ka_mode: its row}, {word: weight}, {word: arguments of the loss}."""
    names = [name for name in args.ka_mode if name != ENSEMBLE]
    dense = args.data_name.partition(':')[0] in ('scenes', 'nyuv2')
    for name in names:
        if name not in METHODS:
            raise utils.UserError(f'--ka_mode: no method is called {name!r}; there are {", ".join(METHODS)}')
        if METHODS[name].dense not in (None, dense):
            fitting = ', '.join(key for key, m in METHODS.items() if m.dense in (None, dense))
            raise utils.UserError(
                f'--ka_mode {name}: not for --data_name {args.data_name}; there are {fitting}'
            )
        if utils.processes() > 1 and METHODS[name].one_process:
            raise utils.UserError(f'{name} runs in one process only: {METHODS[name].one_process}')
    if len(set(args.ka_mode)) < len(args.ka_mode):
        raise utils.UserError(f'--ka_mode {" ".join(args.ka_mode)}: something is named twice')
    return {name: METHODS[name] for name in names}, *utils.weights_and_options(args, names, METHODS, 'ka')


def build_run(args, name: str, method: Method, weight: float, options: dict, world, folder, origin) -> Run:
    """A student with its loss, optimisers and record; the record's checkpoint if there is one to continue."""
    device = world.train.device
    net = world.student(method)
    initial = utils.fingerprint(net)
    net.to(device, memory_format=torch.channels_last)
    layers = tuple(args.ka_layers or method.layers) if method.layers else ()
    img, target, *_ = next(world.train.train_batches(args.batch_size, args.seed, 0))
    img, target = img[:2], {k: v[:2] for k, v in target.items()} if isinstance(target, dict) else target[:2]
    b = SimpleNamespace(img=img, epoch=0, epochs=args.epochs, phase=0, layers=layers, blocks=world.blocks,
                        rng=random.Random(0), target=target, supervised=world.supervised)  # fmt: skip
    ts = world.look(img)
    with torch.no_grad():
        e = SimpleNamespace(s=world.forward(net.eval(), b), ts=ts, net=net, layers=layers,
                            tasks=getattr(world, 'tasks', ()))  # fmt: skip
    if layers:
        check_stages(name, e, layers)
    torch.manual_seed(args.seed)
    try:
        with utils.user_errors():
            ka = method.build(method.loss, e, **options).to(device)
    except TypeError as error:  # an argument that the table fills
        raise utils.UserError(f'--ka_args: {name}: {error}') from None
    kd = method.kd if args.lambda_kd is None else args.lambda_kd * bool(method.kd)
    step = Step(net, ka, method, kd, weight, world)
    groups = method.groups(net, ka)
    opts = {update: optimiser(args, *group) for update, group in groups.items()}
    trial = copy.deepcopy(step).train()
    with utils.user_errors():  # shapes that do not meet show here, before anything is trained
        for update in opts:
            b.update = update
            trial(b, ts)
    math_args = utils.math_args(
        args, script='train_ka', student=world.student_name, initial=initial,
        method=[name, weight, kd, options],
        teachers=[utils.fingerprint(t) for t in world.nets], layers=list(layers), T=args.T, optim=args.optim,
        lr_ka=args.lr_ka, parts=world.facts.get('parts'), classes=world.facts.get('classes'),
        unlabeled=args.unlabeled, limit_train=args.limit_train, tasks=list(getattr(world, 'tasks', ())),
        size=args.size, epochs_ft=args.epochs_ft, labelled=world.facts.get('labelled'),
    )  # fmt: skip
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == 'fp16')
    state = {'net': net, 'ka': ka, 'scaler': scaler, **{f'opt_{key}': opt for key, opt in opts.items()}}
    half = 'val' if world.val else 'test'
    record = utils.Record(folder / name, state, math_args, origin, half, world.key)
    record.resume(utils.resume_point(args.resume, folder / name))
    return Run(name, method, utils.distributed(step, device), net, ka, opts, scaler, record, layers)


def check_stages(name: str, e: SimpleNamespace, layers: tuple) -> None:
    """Every network has the stages that the loss attaches to."""
    least = min(len(f.fms) for f in (e.s, *e.ts)) - 1
    if max(layers) > least:
        raise utils.UserError(
            f'--ka_layers: {name} attaches to stage {max(layers)}, a network has {least} only'
        )


def optimiser(args, net: list, ka: list) -> torch.optim.Optimizer:
    groups = [{'params': params, 'role': role} for role, params in (('net', net), ('ka', ka)) if params]
    if args.optim == 'adam':
        cuda = groups[0]['params'][0].is_cuda
        return torch.optim.Adam(groups, args.lr, weight_decay=args.weight_decay, fused=cuda)
    return utils.sgd(groups, args)


if __name__ == '__main__':
    utils.run(main)
