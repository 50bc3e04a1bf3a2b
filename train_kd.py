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
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import engine.threads  # noqa: F401  before torch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import models
import utils
from engine import listing, side_by_side
from engine.batch import Batch, InFloat32, Probe
from engine.side_by_side import cast_weights
from engine.teachers import Teachers
from methods import KD, PEERS, Method, schedules


def parse_args(words=None):
    parser = utils.Parser(__doc__)
    # fmt: off
    flag = parser.add_argument_group('distillation').add_argument
    flag('--kd_mode', nargs='+', required=True, metavar='METHOD', action=listing.lists(KD),
         help='one student per word, methods joined by + share a student; list: print all methods, what they '
              'need, their weights and arguments')
    flag('--lambda_kd', nargs='+', default=[], metavar='W',
         help='weight of the loss beside cross-entropy: a number, or METHOD=number with several methods; '
              "default: the method's, see --kd_mode list")
    flag('--lambda_ce', type=utils.share_of_ce, metavar='W',
         help='weight of cross-entropy; default 1, or what the methods say')
    flag('--ramp_epochs', type=utils.positive_int, metavar='N',
         help='epochs over which the weight of a loss rises, for methods that have such a ramp; default: '
              "the method's, scaled")
    flag('--kd_args', nargs='+', default=[], metavar='KEY=VALUE',
         help='arguments of the loss, e.g. T=8, or METHOD.KEY=VALUE with several methods, e.g. st.T=8')
    flag('--t_name', nargs='+', default=[], metavar='NAME',
         help=f'teacher: {models.NAMES}; several, the main one first, for methods that take assistants; none '
              'for methods without a teacher')
    flag('--t_model', nargs='+', default=[], metavar='FILE', help="the teacher's checkpoint, one per teacher")
    flag('--s_name', required=True, metavar='NAME', help='student, one of the same names')
    flag('--s_init', metavar='FILE',
         help='initial weights of all students, e.g. initial.pt of train_base.py; default: drawn from --seed '
              'just as there')
    flag('--new_head', action='store_true',
         help='of --s_init take all but the classifier: for weights with other classes, or none')
    flag('--init_epochs', type=utils.whole_number, metavar='N',
         help='epochs of the loss alone before cross-entropy alone, for methods with such a phase; default: '
              "the method's, scaled")
    flag('--pretrain_epochs', type=utils.whole_number, metavar='N',
         help="epochs in which the loss's own modules learn first; default: the method's, scaled")
    flag('--phases', choices=('before', 'inside'), default='before',
         help='before: the epochs of those two come before the --epochs, as in the papers; inside: they are '
              'the first of the --epochs, at a tenth of the learning rate that all share then, so that no '
              'method of a table trains longer than another; default before')
    flag('--global_relations', action='store_true',
         help='under torchrun: losses that relate the samples of a batch (rkd, sp, ...) see the batches of '
              'all processes, not only their own')
    # fmt: on
    utils.add_common_flags(parser)
    utils.add_thread_flag(parser)
    utils.add_graph_flag(parser)
    return parser.parse_args(words)


@dataclass
class Term:
    """One method of a student."""

    name: str
    method: Method
    weight: float
    options: dict
    ramp: Callable[[int, int], float] | None = None
    loss: nn.Module | None = None


class Student(nn.Module):
    """A network with its losses: one training step is one forward pass of this module.

    Args:
        net: the network.
        terms: the methods it learns with.
        ce: weight of cross-entropy; None: what the methods say.
        amp: makes the autocast of its forward passes.
        gather: joins the batches of all processes, for --global_relations.
        cast: the precision into which weights are cast all at once, see --cuda_graphs; None: one by one.
    """

    def __init__(self, net: nn.Module, terms: list[Term], amp, ce=None, gather=None, cast=None) -> None:
        super().__init__()
        self.net, self.losses = net, nn.ModuleList(term.loss for term in terms)
        self.terms, self.amp, self.ce, self.gather, self.cast = terms, amp, ce, gather, cast

    def forward(self, batch: Batch, weights: dict[str, float], inner: dict[str, float], phase: str):
        """Logits, and {'ce': cross-entropy, method: its loss, ...} for the methods that have a weight.

        inner: the value of each method's inner schedule.
        """
        t = batch.all_t[0] if batch.all_t else None
        if phase == 'pretrain':  # the losses' own modules learn, the student does not
            return None, {
                k.name: k.method.own.pretrain(k.loss, t, batch) for k in self.terms if k.name in weights
            }

        if any(term.method.needs.image_gradient for term in self.terms):
            batch.img = batch.img.detach().requires_grad_()
        batch.net_s, batch.student = self.net, self.look_at
        batch.raw = self.raw(batch.img)
        s = InFloat32(batch.raw)
        losses = {} if phase == 'init' else {'ce': F.cross_entropy(s.out, batch.target)}
        for term in self.terms:
            if term.name not in weights:
                continue
            batch.from_teacher = batch.once.get(term.method.own.once_per_batch)
            batch.inner = inner.get(term.name)
            seen = (s, t, batch)
            if self.gather and term.method.needs.relations:
                seen = self.gather(*seen)
            losses[term.name] = term.method.feed(term.loss, *seen)
        return s.out, losses

    def look_at(self, img: Tensor) -> InFloat32:
        """What the student says of further images."""
        return InFloat32(self.raw(img))

    def raw(self, img: Tensor):
        with self.amp():
            if self.cast:
                return torch.func.functional_call(self.net, cast_weights(self.net, self.cast), (img, True))
            return self.net(img, True)

    def inner(self, epoch: int, epochs: int) -> dict[str, float]:
        """{method: the value of its inner schedule in this epoch}"""
        schedules = {term.name: term.method.when.inner for term in self.terms}
        return {name: schedule(epoch, epochs) for name, schedule in schedules.items() if schedule}

    def weights(self, phase: str, epoch: int, epochs: int) -> dict[str, float]:
        """{'ce' or method: its weight in this epoch}, without the methods that rest."""
        if phase == 'pretrain':
            return {term.name: 1.0 for term in self.terms if term.method.when.pretrain}
        weights = {}
        if phase == 'train':
            ces = (term.method.when.ce for term in self.terms)
            own = math.prod(ce(epoch, epochs) if callable(ce) else ce for ce in ces)
            weights['ce'] = own if self.ce is None else self.ce
        for term in self.terms:
            factor = term.ramp(epoch, epochs) if term.ramp else 1
            # a loss that initialises rests afterwards; others rest while it works
            if (phase == 'init') == bool(term.method.when.alone) and term.weight * factor != 0:
                weights[term.name] = term.weight * factor
        return weights


@dataclass
class Run:
    """One student in training: everything that belongs to it and to no other."""

    name: str
    step: nn.Module  # a Student, or DistributedDataParallel around it
    terms: list[Term]
    net: nn.Module
    opt: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    generator: torch.Generator  # for losses that draw on the device
    record: utils.Record
    meter: utils.Meter
    before: tuple[int, int]  # epochs of pretraining and of initialisation
    batch_size: int
    epochs: int  # of the training proper
    inside: bool  # the phases before it are the first of the --epochs, see --phases
    counters: list[Tensor]  # counts of batches that are kept on the host, see --cuda_graphs
    rng: random.Random = None  # for losses that draw a choice
    phase: str = 'train'
    now: int = 0  # epochs of the training proper that lie behind; negative in the phases before
    weights: dict[str, float] = field(default_factory=dict)  # of cross-entropy and the methods, in this epoch
    inner: dict[str, float] = field(default_factory=dict)  # values of inner schedules in this epoch
    usual_only: str = ''  # why a CUDA graph cannot repeat its step
    reads_epoch: bool = False  # a loss asked for the epoch in the last usual step

    @property
    def first(self) -> int:
        """Its first epoch: 0, or less if phases come before the training."""
        return 0 if self.inside else -sum(self.before)

    @property
    def epoch(self) -> int:
        """The next epoch."""
        return self.record.epoch + self.first

    @property
    def generators(self) -> list[torch.Generator]:
        return [self.generator]

    def own(self, epoch: int) -> int:
        """Epochs of the training proper that an epoch has behind it; negative in the phases before."""
        return epoch - self.first - sum(self.before)

    def phase_of(self, epoch: int) -> str:
        own = self.own(epoch)
        return 'train' if own >= 0 else 'init' if own >= -self.before[1] else 'pretrain'

    def learning_rate(self, epoch: float, args) -> float:
        """epoch: with its fraction, as in utils.learning_rate."""
        phase = self.phase_of(math.floor(epoch))
        if phase == 'train' or self.inside:
            return utils.learning_rate(args, epoch) / (1 if phase == 'train' else 10)
        init = self.before[1]
        done = (math.floor(epoch) + init) / init if phase == 'init' else 0
        return args.lr / 10 * args.lr_decay ** sum(done >= share for share in (0.6, 0.8))  # KD-Zoo's

    def decided(self) -> tuple:
        """What Python decides of a step: as long as it stays, a recording of the step holds."""
        rate = self.opt.param_groups[0]['lr']
        return (self.phase, *self.weights.items(), *self.inner.items(),
                None if isinstance(rate, Tensor) else rate,
                self.now if self.reads_epoch else None)  # fmt: skip


def main():
    args = parse_args()
    if args.new_head and not args.s_init:
        raise utils.UserError('--new_head: goes with --s_init FILE')
    wanted = read_methods(args)
    device = utils.setup(args)
    amp = utils.autocast(device, args.amp)
    name = (
        f'kd-{args.data_name.replace(":", "")}-{"-".join(args.t_name) or "self"}-{args.s_name}-s{args.seed}'
    )
    folder = utils.output_folder(Path(args.save_root) / (args.note or name))
    log = utils.Log(folder)

    train, val, test = utils.load_data(args, device, log)
    nets_t, facts_t = load_teachers(args, train.num_classes, test, amp, log)
    torch.manual_seed(args.seed)
    with utils.user_errors():
        net_s = models.build(args.s_name, train.num_classes)
        if args.s_init:
            log(f'initial student: {models.load_weights(net_s, args.s_init, new_head=args.new_head)}')

    origin = utils.provenance(device) | utils.class_names_of(train)
    views = sorted({view for terms in wanted.values() for term in terms for view in term.method.needs.views})
    teachers = Teachers(nets_t, amp, views, next(train.test_batches(2))[0])
    selected_on = 'val' if val else 'test'
    runs = build_runs(args, wanted, folder, origin, net_s, teachers, train, selected_on, device)
    utils.compile_networks(args, *teachers.fast, *(run.net for run in runs))
    utils.write_json(folder / 'args.json', {'args': vars(args), **origin})
    board = utils.tensorboard(folder, args.tensorboard)
    stop = utils.StopAfterEpoch()
    first = min(run.first for run in runs)
    start = min(max(run.epoch, first) for run in runs)
    log(f'{len(runs)} x {args.s_name} on {args.data_name}: {len(train)} + {len(test)} images, {device}')
    if utils.processes() > 1:
        scope = 'the batches of all processes' if args.global_relations else "each process's own batch"
        log(f'{utils.processes()} processes x {args.batch_size} images; relations between samples: {scope}')
    log(f'{start - first} of {args.epochs - first} epochs done, output in {folder}')
    if not val:
        log('best.pt is selected on test data (--val_split holds out training images for that)')

    together = side_by_side.choose(args, device, len(runs), log)
    steps, failures = train.steps(args.batch_size), []
    bar = utils.progress_bar(steps * (args.epochs - first), steps * (start - first), log)
    for epoch in range(start, args.epochs):
        started = time.time()
        active = [run for run in runs if run.epoch == epoch]  # others begin later, or a kill left them ahead
        for run in active:
            begin_epoch(run, epoch, args)
        begun, last = active, epoch + 1 == args.epochs

        batches = train.train_batches(args.batch_size, args.seed, epoch, views)
        for number, batch in enumerate(together.looks(teachers, batches), 1):
            for run in active:
                utils.set_learning_rate(run.opt, run.learning_rate(epoch + (number - 0.5) / steps, args))
            together.train(train_student, active, batch)
            bar.update()
            active = [run for run in active if not run.meter.failure]  # a failed student stops, others go on
            if not active:
                break
            if not bar.disable and number % args.print_freq == 0:
                losses = '  '.join(f'{run.name} {run.meter.read().get("ce", 0):.3f}' for run in active)
                bar.set_postfix_str(f'epoch {epoch + 1}, ce: {losses}')

        rows = {run.name: {'epoch': epoch + 1, 'phase': run.phase, 'lr': run.learning_rate(epoch, args),
                           **run.meter.read(run.step)} for run in begun}  # fmt: skip
        for run in [run for run in begun if run.meter.failure]:
            log(f'stopped: {run.meter.failure}')
            failures.append(run.meter.failure)
            runs.remove(run)
            begun.remove(run)
        in_training = [run for run in begun if run.phase == 'train']
        counts = together.each(lambda run: utils.measure(run.net, val, test, amp), in_training)
        for run, counted in zip(in_training, counts):
            rows[run.name] |= utils.measured(counted)
        for run in begun:
            row = rows[run.name] | {'seconds': time.time() - started}
            run.record.epoch_done(row, save=last or (epoch + 1) % args.save_every == 0)
            log(epoch_line(run, row, args.epochs))
            if board:
                for key, value in row.items():
                    if isinstance(value, float):
                        board.add_scalar(f'{run.name}/{key}', value, epoch + 1)
        if not runs:
            break
        if (signal := stop.agreed()) and not last:
            for run in runs:
                run.record.save()
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


def train_student(run: Run, seen: Batch) -> None:
    """One step of one student: forward, backward, update. seen: the batch and what teachers say of it."""
    incomplete = len(seen.img) < run.batch_size and any(term.method.needs.full_batches for term in run.terms)
    if run.meter.failure or incomplete:
        return
    batch = replace(seen, now=run.now, epochs=run.epochs, generator=run.generator, rng=run.rng)
    out, terms = run.step(batch, run.weights, run.inner, run.phase)
    run.reads_epoch = batch.reads_epoch
    weights = run.weights
    loss_kd = sum(weights[name] * term for name, term in terms.items() if name != 'ce')
    # without a weight, cross-entropy stays out: 0 times it would still move the classifier
    loss = weights['ce'] * terms['ce'] + loss_kd if weights.get('ce') else loss_kd

    if not run.meter.guard(loss, run.opt, seen.all_t[0].out if seen.all_t else None):
        return
    special = [term.method.own.update for term in run.terms if term.method.own.update]
    if special and run.phase == 'train':
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
    if run.now in (-pretrain - init, -init, 0):
        run.opt.state.clear()  # every phase starts with a fresh optimiser
        run.meter.sums.clear()  # and has its own terms
    whole = getattr(run.step, 'module', run.step)  # inside DistributedDataParallel
    run.weights = whole.weights(run.phase, run.now, run.epochs)
    run.inner = whole.inner(run.now, run.epochs)
    seed = args.seed * 1_000_003 + epoch
    run.generator.manual_seed(seed + 7919 * utils.rank())  # processes draw different numbers
    run.rng = random.Random(seed)
    run.meter.reset(epoch)


def epoch_line(run: Run, row: dict, epochs: int) -> str:
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


def read_methods(args) -> dict[str, list[Term]]:
    """{'pkt+st': [Term('pkt', ...), Term('st', ...)], ...} from --kd_mode, --lambda_kd and --kd_args."""
    tokens = {token: token.split('+') for token in args.kd_mode}
    names = {name for terms in tokens.values() for name in terms}
    for name in sorted(names - KD.keys() - PEERS.keys()):
        raise utils.UserError(f'--kd_mode: no method is called {name!r}; there are {", ".join(KD)}')
    for name in sorted(name for name in names if name in PEERS):
        raise utils.UserError(
            f'--kd_mode {name}: trains networks that learn from each other, use train_dml.py'
        )
    if len(tokens) < len(args.kd_mode) or any(len(set(terms)) < len(terms) for terms in tokens.values()):
        raise utils.UserError(f'--kd_mode {" ".join(args.kd_mode)}: something is named twice')
    check_teachers(args, names)
    weights, options = utils.weights_and_options(args, sorted(names), KD)
    wanted = {
        token: [Term(name, KD[name], weights[name], options[name], ramp_of(KD[name], args)) for name in terms]
        for token, terms in tokens.items()
    }
    for token, terms in wanted.items():
        for column, what in (
            ('student', 'change the student'),
            ('update', 'have a training step of their own'),
        ):
            several = [term.name for term in terms if getattr(term.method.own, column)]
            if len(several) > 1:
                raise utils.UserError(f'--kd_mode {token}: {" and ".join(several)} {what}, only one can')
        if args.amp == 'fp16' and any(term.method.own.update for term in terms):
            raise utils.UserError(f'--amp fp16: {token} has a training step of its own; use bf16')
    return wanted


def ramp_of(method: Method, args):
    """The schedule of the loss's weight, as long as --ramp_epochs says."""
    ramp = method.when.ramp
    if args.ramp_epochs and isinstance(ramp, schedules.linear):
        return ramp.lasting(args.ramp_epochs, args.epochs)
    return ramp


def check_teachers(args, names: set[str]) -> None:
    if len(args.t_name) != len(args.t_model):
        raise utils.UserError(
            f'--t_name and --t_model: {len(args.t_name)} names and {len(args.t_model)} files'
        )
    needy = sorted(name for name in names if KD[name].needs.teacher)
    if needy and not args.t_name:
        raise utils.UserError(f'--t_name and --t_model are needed: {", ".join(needy)} distils a teacher')
    if len(args.t_name) > 1 and not any(KD[name].needs.all_teachers for name in names):
        teams = [name for name, method in KD.items() if method.needs.all_teachers]
        raise utils.UserError(
            f'--t_name: got {len(args.t_name)} teachers; only {", ".join(teams)} uses several'
        )
    for name in sorted(names):
        if utils.processes() > 1 and KD[name].limits.one_process:
            raise utils.UserError(f'{name} runs in one process only: {KD[name].limits.one_process}')


def build_runs(args, wanted, folder, origin, net_s, teachers, train, selected_on, device) -> list[Run]:
    """The students, all with the weights of net_s, each with its losses, optimiser, generator and record."""
    every = [term.method for terms in wanted.values() for term in terms]
    graphs = utils.graphs_wanted(args, device)
    initial, teacher = utils.fingerprint(net_s), '+'.join(map(utils.fingerprint, teachers.nets))
    net_s.to(device, memory_format=torch.channels_last)
    whole = any(method.needs.full_batches for method in every)
    n = args.batch_size if whole else 2  # a few images tell the losses all shapes
    img, target, index, more = next(train.train_batches(args.batch_size, args.seed, 0, teachers.views))
    img, target, index, more = img[:n], target[:n], index[:n], {k: v[:n] for k, v in more.items()}
    teachers.prepare = {method.own.once_per_batch for method in every} - {None}
    seen = teachers(img, target, index, more)
    with torch.no_grad():
        s = net_s.eval()(img, True)

    def another_net(_):
        return models.build(args.s_name, train.num_classes).to(device, memory_format=torch.channels_last)

    t = seen.all_t[0] if seen.all_t else None
    probe = Probe(s, t, net_s, teachers.net_t, train, args.batch_size, args.epochs, train.num_classes,
                  another_net)  # fmt: skip
    runs = []
    for token, terms in wanted.items():
        torch.manual_seed(args.seed)  # a loss's own weights must not depend on the runs built before it
        net = copy.deepcopy(net_s)
        for term in terms:
            net = build_term(term, net, probe, device)
        ces = [term.method.when.ce for term in terms]
        ce = math.prod(1.0 if callable(ce) else ce for ce in ces)
        ce = ce if args.lambda_ce is None else args.lambda_ce
        before = tuple(
            max((utils.phase_epochs(epochs, args.epochs, chosen) for epochs in of_200), default=0)
            for of_200, chosen in (
                ([term.method.when.pretrain for term in terms], args.pretrain_epochs),
                ([term.method.when.alone for term in terms], args.init_epochs),
            )
        )
        inside = args.phases == 'inside'
        if inside and sum(before) >= args.epochs:
            raise utils.UserError(f'--phases inside: {token} has {sum(before)} epochs of phases, --epochs '
                                  f'{args.epochs} leaves none to train')  # fmt: skip
        gather = utils.gather_batches if args.global_relations else None
        cast = utils.PRECISIONS[args.amp] if graphs else None
        step = Student(net, terms, teachers.amp, args.lambda_ce, gather, cast)
        optimise = [term.method.own.optimiser for term in terms if term.method.own.optimiser] or [utils.sgd]
        opt = optimise[0]([p for p in step.parameters() if p.requires_grad], args)
        scaler = torch.amp.GradScaler(device.type, enabled=args.amp == 'fp16')
        math_args = utils.math_args(
            args, script='train_kd', student=args.s_name, initial=initial, teacher='+'.join(args.t_name),
            teacher_weights=teacher, ce=ce, before=list(before), global_relations=args.global_relations,
            methods=[[term.name, term.weight, term.options] for term in terms],
        )  # fmt: skip
        state = {'net': net, 'kd': step.losses, 'opt': opt, 'scaler': scaler}
        record = utils.Record(folder / token, state, math_args, origin, selected_on)
        run = Run(
            token, step, terms, net, opt, scaler, torch.Generator(device), record,
            utils.Meter(token, 0, device), before, args.batch_size, args.epochs - inside * sum(before),
            inside, counters=side_by_side.host_counters(net) if graphs else [],
            usual_only='; '.join(filter(None, (term.method.limits.no_graph for term in terms))),
        )  # fmt: skip
        try_once(run, step, seen)
        record.resume(utils.resume_point(args.resume, folder / token))
        if not record.epoch and utils.rank() == 0:  # the other processes are sent the result
            for term in terms:
                if term.method.own.before:
                    with utils.user_errors():
                        term.method.own.before(term.loss, teachers.teacher, probe)
        run.step = utils.distributed(step, device)
        runs.append(run)
    return runs


def try_once(run: Run, step: Student, seen: Batch) -> None:
    """A step of each phase on a copy: shapes that do not meet show here, before anything is trained."""
    trial = copy.deepcopy(step).train()
    trial.gather = None
    generator = torch.Generator(seen.img.device)
    try:
        with utils.user_errors():
            for phase, count in (('pretrain', run.before[0]), ('init', run.before[1]), ('train', 1)):
                if count:
                    batch = replace(seen, now=run.epochs // 2, epochs=run.epochs, generator=generator,
                                    rng=random.Random(0))  # fmt: skip
                    inner = trial.inner(batch.now, run.epochs)
                    trial(batch, trial.weights(phase, batch.now, run.epochs), inner, phase)
    except AttributeError as error:  # a network of the user's own, without a term that this method asks for
        raise utils.UserError(f'{run.name}: {error}') from None


def build_term(term: Term, net: nn.Module, probe: Probe, device) -> nn.Module:
    """Build the loss of a method, and return the network that this method trains."""
    method = term.method
    try:
        with utils.user_errors():
            term.loss = method.build(method.loss, probe, **term.options).to(device)
            if method.own.student:
                net = method.own.student(net, term.loss, probe).to(device, memory_format=torch.channels_last)
    except (TypeError, IndexError) as error:  # an argument that the table fills, e.g. s_channels
        raise utils.UserError(f'--kd_args: {term.name}: {error}') from None
    return net


if __name__ == '__main__':
    utils.run(main)
