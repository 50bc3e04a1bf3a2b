"""Distil one frozen teacher into one or many students, with any method of kd_losses.

    python train_kd.py --kd_mode st --t_name resnet20 --t_model save/base/net.pt --s_name resnet8
    python train_kd.py --kd_mode at rkd pkt+st ...     three students at once; + adds losses on one student
    python train_kd.py --kd_mode cskd sla --s_name resnet8          self-distillation needs no teacher
    torchrun --nproc_per_node=2 train_kd.py ...        several processes, --batch_size images each

All students start from the same weights and see the same batches and the same teacher forward. A student's
result is bit for bit (on the CPU) the one it gets when trained alone.

Writes to SAVE_ROOT/NOTE: log.txt, args.json, and for each student a folder with last.pt, best.pt, student.pt
(plain weights of the last epoch), metrics.csv, results.json.
"""

import copy
import math
import random
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import models
import utils
from kd_losses import METHODS, Method


def parse_args():
    parser = utils.Parser(__doc__)
    # fmt: off
    flag = parser.add_argument_group('distillation').add_argument
    names = [name for name, m in METHODS.items() if not m.peers]
    flag('--kd_mode', nargs='+', required=True, metavar='METHOD',
         help=f'one student per word, methods joined by + share a student: {", ".join(names)}')
    flag('--lambda_kd', nargs='+', default=[], metavar='W',
         help='weight of the loss beside cross-entropy: a number, or METHOD=number with several methods; '
              'defaults: ' + ', '.join(f'{name} {METHODS[name].weight:g}' for name in names))
    flag('--kd_args', nargs='+', default=[], metavar='KEY=VALUE',
         help='arguments of the loss, e.g. T=8, or METHOD.KEY=VALUE with several methods, e.g. st.T=8')
    flag('--t_name', nargs='+', default=[], metavar='NAME',
         help=f'teacher: {models.NAMES}; several, the main '
              'one first, for methods that take assistants; none for methods without a teacher: '
              + ', '.join(name for name in names if not METHODS[name].teacher))
    flag('--t_model', nargs='+', default=[], metavar='FILE', help="the teacher's checkpoint, one per teacher")
    flag('--s_name', required=True, metavar='NAME', help='student, one of the same names')
    flag('--s_init', metavar='FILE',
         help='initial weights of all students, e.g. initial.pt of train_base.py; default: drawn from --seed '
              'just as there')
    flag('--new_head', action='store_true',
         help='of --s_init take all but the classifier: for weights with other classes, or none')
    flag('--init_epochs', type=utils.whole_number, metavar='N',
         help='epochs of the loss alone before cross-entropy alone, for methods that initialise the student: '
              + ', '.join(f'{name} {m.init}' for name, m in METHODS.items() if m.init) + ' of 200, scaled')
    flag('--pretrain_epochs', type=utils.whole_number, metavar='N',
         help="epochs in which the loss's own modules learn first: "
              + ', '.join(f'{name} {m.pretrain}' for name, m in METHODS.items() if m.pretrain)
              + ' of 200, scaled')
    flag('--global_relations', action='store_true',
         help='under torchrun: losses that relate the samples of a batch (rkd, sp, ...) see the batches of '
              'all processes, not only their own')
    # fmt: on
    utils.add_common_flags(parser)
    utils.add_graph_flag(parser)
    return parser.parse_args()


@dataclass
class Part:
    """One method of a student."""

    name: str
    method: Method
    weight: float
    options: dict
    loss: nn.Module | None = None


class Step(nn.Module):
    """A student with its losses: one training step is one forward pass of this module."""

    def __init__(self, net: nn.Module, parts: list[Part], ce: float, amp: torch.autocast, gather) -> None:
        super().__init__()
        self.net, self.losses = net, nn.ModuleList(part.loss for part in parts)
        self.parts, self.ce, self.amp, self.gather = parts, ce, amp, gather

    def forward(self, b: SimpleNamespace, ts: list, phase: str) -> tuple[Tensor | None, ...]:
        """Logits, cross-entropy, and the weighted sum of the losses; b: the batch, see kd_losses."""
        t = ts[0] if ts else None
        if phase == 'pretrain':
            loss = sum(p.method.pretrain_feed(p.loss, t, b) for p in self.parts if p.method.pretrain)
            return None, None, loss

        def student(img):
            with self.amp:
                f = self.net(img, True)
            b.raw = f
            return utils.as_float(f)

        if any(part.method.input_grad for part in self.parts):
            b.img = b.img.detach().requires_grad_()
        b.net_s, b.student, b.ts = self.net, student, ts
        s = student(b.img)
        b.raw_s = b.raw
        loss_kd = 0.0
        for part in self.parts:
            method = part.method
            factor = method.ramp(b.epoch, b.epochs) if method.ramp else 1
            if (phase == 'init') != bool(method.init) or part.weight * factor == 0:
                continue  # a loss that initialises rests afterwards; others rest while it works
            b.raw, b.prepared = b.raw_s, b.shared.get(method.prepare)
            s_all, t_all, b_all = (s, t, b)
            if self.gather and method.relational:
                s_all, t_all, b_all = self.gather(s, t, b)
            loss_kd = loss_kd + part.weight * factor * method.feed(part.loss, s_all, t_all, b_all)
        return s.out, None if phase == 'init' else F.cross_entropy(s.out, b.target), loss_kd

    def ce_weight(self, epoch: int, epochs: int) -> float:
        """Weight of cross-entropy in this epoch."""
        ramps = [part.method.ce_ramp for part in self.parts if part.method.ce_ramp]
        return self.ce * math.prod(ramp(epoch, epochs) for ramp in ramps)


@dataclass
class Run:
    """One student in training: everything that belongs to it and to no other."""

    name: str
    step: nn.Module  # a Step, or DistributedDataParallel around it
    parts: list[Part]
    ce: float  # weight of cross-entropy in this epoch
    net: nn.Module
    opt: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    generator: torch.Generator  # for losses that draw on the device
    record: utils.Record
    before: tuple[int, int]  # epochs of pretraining and of initialisation
    batch_size: int
    rng: random.Random = None  # for losses that draw a choice
    meter: utils.Meter | None = None

    @property
    def epoch(self) -> int:
        """The next epoch; those before the training proper are negative."""
        return self.record.epoch - sum(self.before)

    def phase(self, epoch: int) -> str:
        return 'train' if epoch >= 0 else 'init' if epoch >= -self.before[1] else 'pretrain'


def main():
    args = parse_args()
    if args.new_head and not args.s_init:
        raise utils.UserError('--new_head: goes with --s_init FILE')
    wanted = read_methods(args)
    device = utils.setup(args)
    graphs = utils.graphs_wanted(args, device)
    amp = utils.autocast(device, args.amp, cache=not graphs)
    name = (
        f'kd-{args.data_name.replace(":", "")}-{"-".join(args.t_name) or "self"}-{args.s_name}-s{args.seed}'
    )
    folder = utils.output_folder(Path(args.save_root) / (args.note or name))
    log = utils.Log(folder)

    train, val, test = utils.load_data(args, device, log)
    teachers, facts_t = load_teachers(args, train.num_classes, test, amp, log)
    torch.manual_seed(args.seed)
    with utils.user_errors():
        net_s = models.build(args.s_name, train.num_classes)
        if args.s_init:
            log(f'initial student: {models.load_weights(net_s, args.s_init, new_head=args.new_head)}')

    origin = utils.provenance(device) | utils.class_names_of(train)
    views = sorted({view for parts in wanted.values() for part in parts for view in part.method.views})
    world = Look(teachers, amp, views, next(train.test_batches(2))[0])
    selected_on = 'val' if val else 'test'
    runs = build_runs(args, wanted, folder, origin, net_s, world, train, selected_on, device)
    utils.compile_networks(args, *world.fast, *(run.net for run in runs))
    utils.write_json(folder / 'args.json', {'args': vars(args), **origin})
    board = utils.tensorboard(folder, args.tensorboard)
    stop = utils.StopAfterEpoch()
    first = -max(sum(run.before) for run in runs)
    start = min(max(run.epoch, first) for run in runs)
    log(f'{len(runs)} x {args.s_name} on {args.data_name}: {len(train)} + {len(test)} images, {device}')
    if utils.processes() > 1:
        scope = 'the batches of all processes' if args.global_relations else "each process's own batch"
        log(f'{utils.processes()} processes x {args.batch_size} images; relations between samples: {scope}')
    log(f'{start - first} of {args.epochs - first} epochs done, output in {folder}')
    if not val:
        log('best.pt is selected on test data (--val_split holds out training images for that)')

    steps, failures = train.steps(args.batch_size), []
    bar = utils.progress_bar(steps * (args.epochs - first), steps * (start - first), log)
    for epoch in range(start, args.epochs):
        started = time.time()
        active = [run for run in runs if run.epoch == epoch]  # others begin later, or a kill left them ahead
        lrs = {run.name: begin_epoch(run, epoch, args, device) for run in active}

        recorded = [run for run in active if graphs and not any(part.method.eager for part in run.parts)]
        others = [run for run in active if run not in recorded]

        def shared_step(img, target, index, more, epoch=epoch, active=active, recorded=recorded):
            """What all students need of a batch, and the students that a CUDA graph can train."""
            ts = world.teachers_on(img)
            b = SimpleNamespace(img=img, target=target, index=index, views=more, epoch=epoch,
                                epochs=args.epochs, teacher=world.teacher, net_t=world.net_t)  # fmt: skip
            b.shared = world.prepared(active, ts, b)
            for run in recorded:
                train_student(run, b, ts)
            return b, ts

        recorder = utils.cuda_graph([run.generator for run in recorded]) if recorded else None
        step = utils.Replayed(shared_step, recorder)
        batches = train.train_batches(args.batch_size, args.seed, epoch, views)
        for number, batch in enumerate(batches, 1):
            b, ts = step(*batch)
            for run in others:
                train_student(run, b, ts)

            bar.update()
            active = [run for run in active if not run.meter.failure]  # a failed student stops, others go on
            if not active:
                break
            if not bar.disable and number % args.print_freq == 0:
                losses = '  '.join(f'{run.name} {run.meter.read().get("ce", 0):.3f}' for run in active)
                bar.set_postfix_str(f'epoch {epoch + 1}, ce: {losses}')

        for run in [run for run in runs if run.name in lrs]:
            phase = run.phase(epoch)
            row = {'epoch': epoch + 1, 'phase': phase, 'lr': lrs[run.name], **run.meter.read(run.step)}
            if run.meter.failure:
                log(f'stopped: {run.meter.failure}')
                failures.append(run.meter.failure)
                runs.remove(run)
                continue
            if phase == 'train':
                row |= utils.measure(run.net, val, test, amp)
            row['seconds'] = time.time() - started
            run.record.epoch_done(row)
            log(epoch_line(run, row, args.epochs))
            if board:
                for key, value in row.items():
                    if isinstance(value, float):
                        board.add_scalar(f'{run.name}/{key}', value, epoch + 1)
        if not runs:
            break
        if (signal := stop.agreed()) and epoch + 1 < args.epochs:
            bar.close()
            log(f'stopped after epoch {epoch + 1}; --resume auto continues')
            return 128 + signal
    bar.close()

    for run in runs:
        facts = {'script': 'train_kd', 'method': run.name, 'student': args.s_name, **facts_t,
                 'data': args.data_name, 'seed': args.seed, 'epochs': args.epochs,
                 'trained_with': list(wanted), 'processes': utils.processes(),
                 'global_relations': args.global_relations}  # fmt: skip
        log(f'{run.name}: {run.record.finish("student.pt", facts)}')
        path = folder / run.name / 'student.pt'
        log(f'weights: {models.how_to_load(path, args.s_name, args.data_name, train.num_classes)}')
    if failures:
        raise utils.NonFinite('; '.join(failures))


def train_student(run: Run, b: SimpleNamespace, ts: list) -> None:
    """One step of one student: forward, backward, update."""
    incomplete = len(b.img) < run.batch_size and any(part.method.whole for part in run.parts)
    if run.meter.failure or incomplete:
        return
    phase = run.phase(b.epoch)
    own = SimpleNamespace(**vars(b), generator=run.generator, rng=run.rng)
    out, loss_ce, loss_kd = run.step(own, ts, phase)
    losses = {'kd': loss_kd} if loss_ce is None else {'ce': loss_ce, 'kd': loss_kd}
    # without a weight, cross-entropy stays out: 0 times it would still move the classifier
    loss = loss_kd if loss_ce is None or run.ce == 0 else run.ce * loss_ce + loss_kd

    if not run.meter.guard(loss, run.opt, ts[0].out if ts else None):
        return
    special = [part.method.step for part in run.parts if part.method.step]
    if special and phase == 'train':
        special[0](run.opt, run.ce * loss_ce, loss_kd, b.epoch)
    else:
        run.opt.zero_grad(set_to_none=True)
        run.scaler.scale(loss).backward()
        run.scaler.step(run.opt)
        run.scaler.update()
    run.meter.add(out, b.target, **losses)


def begin_epoch(run: Run, epoch: int, args, device) -> float:
    """Modes, generators, meter, optimiser of a run for this epoch; returns the learning rate."""
    run.step.train()
    pretrain, init = run.before
    if epoch in (-pretrain - init, -init, 0):
        run.opt.state.clear()  # every phase starts with a fresh optimiser
    phase, whole = run.phase(epoch), getattr(run.step, 'module', run.step)  # inside DistributedDataParallel
    run.ce = whole.ce_weight(epoch, args.epochs)
    if phase == 'train':
        lr = utils.learning_rate(args, epoch)
    elif phase == 'init':  # the seed zoo: a tenth, falling after 60 % and 80 %
        lr = args.lr / 10 * args.lr_decay ** sum(epoch + init >= share * init for share in (0.6, 0.8))
    else:
        lr = args.lr / 10
    for group in run.opt.param_groups:
        group['lr'] = lr
    seed = args.seed * 1_000_003 + epoch
    run.generator.manual_seed(seed + 7919 * utils.rank())  # processes draw different numbers
    run.rng = random.Random(seed)
    run.meter = utils.Meter(run.name, epoch, device)
    return lr


def epoch_line(run: Run, row: dict, epochs: int) -> str:
    if row['phase'] != 'train':
        left = run.before[1] if row['phase'] == 'init' else sum(run.before)
        done = row['epoch'] + left
        total = run.before[row['phase'] == 'init']
        return f'{row["phase"]} {done}/{total}  {run.name:12s} kd {row["kd"]:.4f}  {row["seconds"]:.0f} s'
    return (
        f'epoch {row["epoch"]}/{epochs}  {run.name:12s} ce {row["ce"]:.4f}  kd {row["kd"]:.4f}  '
        f'train {row["train_top1"]:.2f}  test {row["test_top1"]:.2f}  '
        f'best {run.record.best["test_top1"]:.2f}  {row["seconds"]:.0f} s'
    )


class Look:
    """What the teachers give for a batch: once for all students.

    nets: the teachers; img: a few images, on which their faster forms are made.
    """

    def __init__(self, nets: list[nn.Module], amp: torch.autocast, views: list[str], img: Tensor) -> None:
        self.nets, self.amp, self.views = nets, amp, views
        self.net_t = nets[0] if nets else None
        self.fast = [models.folded(net, img, utils.precision(amp, img.device)) for net in nets]

    def teacher(self, img: Tensor):
        """The main teacher's features; differentiable with respect to img where that requires grad."""
        with self.amp:
            t = self.fast[0](img, True)
        return utils.as_float(t)

    @torch.no_grad()
    def teachers_on(self, img: Tensor) -> list:
        with self.amp:
            ts = [net(img, True) for net in self.fast]
        return [utils.as_float(t) for t in ts]

    @torch.no_grad()
    def prepared(self, runs: list[Run], ts: list, b: SimpleNamespace) -> dict:
        """What some methods want of the teacher besides, {function: value}."""
        asked = {p.method.prepare for run in runs for p in run.parts if p.method.prepare}
        return {prepare: prepare(self.net_t, ts[0], b) for prepare in sorted(asked, key=lambda f: f.__name__)}


def load_teachers(args, num_classes: int, test, amp, log) -> tuple[list[nn.Module], dict]:
    """The frozen teachers, and what the result files say about them."""
    nets, top1 = [], []
    for name, path in zip(args.t_name, args.t_model):
        with utils.user_errors():
            net = models.build_for(path, name, num_classes)
        teacher = utils.load_teacher(net, path, test, amp)
        log(f'teacher {name}: {teacher["said"]}')
        log(f'teacher {name}: top-1 {teacher["top1"]:.2f}, top-5 {teacher["top5"]:.2f} on the test set')
        nets.append(net)
        top1.append(teacher['top1'])
    facts = {'teacher': '+'.join(args.t_name) or None, 'teacher_top1': top1[0] if top1 else None}
    return nets, facts


def read_methods(args) -> dict[str, list[Part]]:
    """{'pkt+st': [Part('pkt', ...), Part('st', ...)], ...} from --kd_mode, --lambda_kd and --kd_args."""
    tokens = {token: token.split('+') for token in args.kd_mode}
    names = {name for parts in tokens.values() for name in parts}
    for name in sorted(names - METHODS.keys()):
        raise utils.UserError(f'--kd_mode: no method is called {name!r}; there are {", ".join(METHODS)}')
    for name in sorted(name for name in names if METHODS[name].peers):
        raise utils.UserError(
            f'--kd_mode {name}: trains networks that learn from each other, use train_dml.py'
        )
    if len(tokens) < len(args.kd_mode) or any(len(set(parts)) < len(parts) for parts in tokens.values()):
        raise utils.UserError(f'--kd_mode {" ".join(args.kd_mode)}: something is named twice')
    check_teachers(args, names)
    weights, options = utils.weights_and_options(args, sorted(names), METHODS)
    wanted = {
        token: [Part(name, METHODS[name], weights[name], options[name]) for name in parts]
        for token, parts in tokens.items()
    }
    for token, parts in wanted.items():
        for column, what in (
            ('student', 'change the student'),
            ('step', 'have a training step of their own'),
        ):
            several = [part.name for part in parts if getattr(part.method, column)]
            if len(several) > 1:
                raise utils.UserError(f'--kd_mode {token}: {" and ".join(several)} {what}, only one can')
        if args.amp == 'fp16' and any(part.method.step for part in parts):
            raise utils.UserError(f'--amp fp16: {token} has a training step of its own; use bf16')
    return wanted


def check_teachers(args, names: set[str]) -> None:
    if len(args.t_name) != len(args.t_model):
        raise utils.UserError(
            f'--t_name and --t_model: {len(args.t_name)} names and {len(args.t_model)} files'
        )
    needy = sorted(name for name in names if METHODS[name].teacher)
    if needy and not args.t_name:
        raise utils.UserError(f'--t_name and --t_model are needed: {", ".join(needy)} distils a teacher')
    if len(args.t_name) > 1 and not any(METHODS[name].team for name in names):
        teams = [name for name, method in METHODS.items() if method.team]
        raise utils.UserError(
            f'--t_name: got {len(args.t_name)} teachers; only {", ".join(teams)} uses several'
        )
    for name in sorted(names):
        if utils.processes() > 1 and METHODS[name].one_process:
            raise utils.UserError(f'{name} runs in one process only: {METHODS[name].one_process}')


def build_runs(args, wanted, folder, origin, net_s, world, train, selected_on, device) -> list[Run]:
    """The students, all with the weights of net_s, each with its losses, optimiser, generator and record."""
    initial, teacher = utils.fingerprint(net_s), '+'.join(map(utils.fingerprint, world.nets))
    net_s.to(device, memory_format=torch.channels_last)
    whole = any(part.method.whole for parts in wanted.values() for part in parts)
    n = args.batch_size if whole else 2  # a few images tell the losses all shapes
    img, target, index, more = next(train.train_batches(args.batch_size, args.seed, 0, world.views))
    img, target, index, more = img[:n], target[:n], index[:n], {k: v[:n] for k, v in more.items()}
    ts = world.teachers_on(img)
    with torch.no_grad():
        s = net_s.eval()(img, True)

    def fresh(_):
        return models.build(args.s_name, train.num_classes).to(device, memory_format=torch.channels_last)

    e = SimpleNamespace(s=s, t=ts[0] if ts else None, net_s=net_s, net_t=world.net_t, train_set=train,
                        batch_size=args.batch_size, epochs=args.epochs, num_classes=train.num_classes,
                        fresh=fresh)  # fmt: skip
    runs = []
    for token, parts in wanted.items():
        torch.manual_seed(args.seed)  # a loss's own weights must not depend on the runs built before it
        net = copy.deepcopy(net_s)
        for part in parts:
            net = build_part(part, net, e, device)
        ce = math.prod(part.method.ce for part in parts)
        before = tuple(
            max((utils.scaled(getattr(p.method, phase), args.epochs, chosen) for p in parts), default=0)
            for phase, chosen in (('pretrain', args.pretrain_epochs), ('init', args.init_epochs))
        )
        step = Step(net, parts, ce, world.amp, utils.gather_batches if args.global_relations else None)
        b = SimpleNamespace(img=img, target=target, index=index, views=more, epoch=args.epochs // 2,
                            epochs=args.epochs, teacher=world.teacher, net_t=world.net_t,
                            generator=torch.Generator(device), rng=random.Random(0))  # fmt: skip
        optimise = [part.method.optimiser for part in parts if part.method.optimiser] or [utils.sgd]
        opt = optimise[0]([p for p in step.parameters() if p.requires_grad], args)
        scaler = torch.amp.GradScaler(device.type, enabled=args.amp == 'fp16')
        math_args = utils.math_args(
            args, script='train_kd', student=args.s_name, initial=initial, teacher='+'.join(args.t_name),
            teacher_weights=teacher, ce=ce, before=list(before), global_relations=args.global_relations,
            methods=[[part.name, part.weight, part.options] for part in parts],
        )  # fmt: skip
        state = {'net': net, 'kd': step.losses, 'opt': opt, 'scaler': scaler}
        record = utils.Record(folder / token, state, math_args, origin, selected_on)
        run = Run(
            token, step, parts, ce, net, opt, scaler, torch.Generator(device), record, before, args.batch_size
        )
        try_once(run, step, b, ts, world)
        record.resume(utils.resume_point(args.resume, folder / token))
        if not record.epoch and utils.rank() == 0:  # the other processes are sent the result
            for part in parts:
                if part.method.start:
                    with utils.user_errors():
                        part.method.start(part.loss, world.teacher, e)
        run.step = utils.distributed(step, device)
        runs.append(run)
    return runs


def try_once(run: Run, step: Step, b: SimpleNamespace, ts: list, world: Look) -> None:
    """A step of each phase on a copy: shapes that do not meet show here, before anything is trained."""
    trial = copy.deepcopy(step).train()
    trial.gather = None
    try:
        with utils.user_errors():
            b.shared = world.prepared([run], ts, b)
            for phase, count in (('pretrain', run.before[0]), ('init', run.before[1]), ('train', 1)):
                if count:
                    trial(b, ts, phase)
    except AttributeError as error:  # a network of the user's own, without a part that this method asks for
        raise utils.UserError(f'{run.name}: {error}') from None


def build_part(part: Part, net: nn.Module, e: SimpleNamespace, device) -> nn.Module:
    """Build the loss of a method, and return the network that this method trains."""
    method = part.method
    try:
        with utils.user_errors():
            part.loss = method.build(method.loss, e, **part.options).to(device)
            if method.student:
                net = method.student(net, part.loss, e).to(device, memory_format=torch.channels_last)
    except (TypeError, IndexError) as error:  # an argument that the table fills, e.g. s_channels
        raise utils.UserError(f'--kd_args: {part.name}: {error}') from None
    return net


if __name__ == '__main__':
    utils.run(main)
