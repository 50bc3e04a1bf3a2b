"""From the flags of train_kd.py to its students."""

import copy
import math
import random
from dataclasses import replace

import torch
from torch import nn

import models
from dataset.labels import NO_LABEL
from engine import side_by_side
from engine.batch import Batch, Probe
from engine.device import PRECISIONS, random_state
from engine.errors import UserError, user_errors
from engine.evaluate import refuse_misfit
from engine.meter import Meter
from engine.method_flags import (
    built_from,
    refuse_many_processes,
    refuse_repeated,
    refuse_unknown,
    weights_and_options,
)
from engine.optimise import optimiser, phase_epochs
from engine.processes import distributed, gather_batches, processes, rank, same_buffers
from engine.recipe import math_args, resume_point
from engine.record import Record, fingerprint
from engine.stages import read_stages
from engine.student import Run, Student, Term
from methods import KD, PEERS, Method, schedules

# flags that some rows read: which do, and what is said where none does
READ_BY_SOME = {
    'ramp_epochs': (lambda row: isinstance(row.when.ramp, schedules.linear), 'the weight has no ramp'),
    'init_epochs': (lambda row: row.when.alone, 'the training does not begin with a loss alone'),
    'pretrain_epochs': (lambda row: row.when.pretrain, 'no loss has modules that learn before the training'),
    'global_relations': (lambda row: row.needs.relations, 'no loss relates the samples of a batch'),
}


def read_methods(args) -> dict[str, list[Term]]:
    """{'pkt+st': [Term('pkt', ...), Term('st', ...)], ...} from --kd_mode and what goes with it."""
    tokens = {token: token.split('+') for token in args.kd_mode}
    names = {name for terms in tokens.values() for name in terms}
    elsewhere = {name: 'trains networks that learn from each other, use train_dml.py' for name in PEERS}
    refuse_unknown('--kd_mode', names, KD, elsewhere)
    refuse_repeated('--kd_mode', args.kd_mode)
    check_teachers(args, names)
    weights, options = weights_and_options(args, sorted(names), KD)
    stages = read_stages(args, sorted(names), KD)
    wanted = {
        token: [
            Term(name, KD[name], weights[name], options[name], ramp_of(KD[name], args), stages[name])
            for name in terms
        ]
        for token, terms in tokens.items()
    }
    for token, terms in wanted.items():
        for column, what in (
            ('student', 'change the student'),
            ('update', 'have a training step of their own'),
        ):
            several = [term.name for term in terms if getattr(term.method.own, column)]
            if len(several) > 1:
                raise UserError(f'--kd_mode {token}: {" and ".join(several)} {what}, only one can')
        if args.amp == 'fp16' and any(term.method.own.update for term in terms):
            raise UserError(f'--amp fp16: {token} has a training step of its own; use bf16')
    return wanted


def refuse_unread(args, wanted: dict[str, list[Term]]) -> None:
    rows = {term.name: term.method for terms in wanted.values() for term in terms}
    for flag, (reads, why) in READ_BY_SOME.items():
        if getattr(args, flag) and not any(map(reads, rows.values())):
            raise UserError(f'--{flag}: {", ".join(sorted(rows))}: {why}')


def ramp_of(method: Method, args):
    """The schedule of the loss's weight, as long as --ramp_epochs says."""
    ramp = method.when.ramp
    if args.ramp_epochs and isinstance(ramp, schedules.linear):
        return ramp.lasting(args.ramp_epochs, args.epochs)
    return ramp


def check_teachers(args, names: set[str]) -> None:
    if len(args.t_name) != len(args.t_model):
        raise UserError(f'--t_name and --t_model: {len(args.t_name)} names and {len(args.t_model)} files')
    if (args.t_mean or args.t_std) and not args.t_name:
        raise UserError('--t_mean and --t_std: are of the images of a teacher, go with --t_name')
    needy = sorted(name for name in names if KD[name].needs.teacher)
    if args.soft_labels and args.t_name:
        raise UserError('--soft_labels: stands for the teacher, leave out --t_name and --t_model')
    if needy and not args.t_name and not args.soft_labels:
        raise UserError(f'--t_name and --t_model are needed: {", ".join(needy)} distils a teacher')
    if len(args.t_name) > 1 and not any(KD[name].needs.all_teachers for name in names):
        teams = [name for name, method in KD.items() if method.needs.all_teachers]
        raise UserError(f'--t_name: got {len(args.t_name)} teachers; several are for {", ".join(teams)}')
    refuse_many_processes(names, KD)


def check_labels(wanted: dict[str, list[Term]], train, log) -> None:
    """Say how many images have no label, and refuse methods that need everybody's."""
    without = int((train.targets == NO_LABEL).sum())
    if not without:
        return
    for terms in wanted.values():
        for term in terms:
            needs = term.method.needs
            if not needs.teacher or 'pair' in needs.views:
                raise UserError(f'{term.name}: needs the labels of all images, and {without} have none')
    log(f'{without} of {len(train)} training images have no label: the teacher alone speaks of them')


def build_runs(args, wanted, folder, origin, net_s, teachers, train, selected_on, device) -> list[Run]:
    """The students, all with the weights of net_s, each with its losses, optimiser, generator and record."""
    every = [term.method for terms in wanted.values() for term in terms]
    graphs = side_by_side.graphs_wanted(args, device)
    initial, teacher = fingerprint(net_s), '+'.join(map(fingerprint, teachers.nets))
    if teachers.stored:
        teacher = f'{teachers.stored.meta["teacher_weights"]} {teachers.stored.meta["kind"]}'
    net_s.to(device, memory_format=torch.channels_last)
    refuse_misfit(args.s_name, net_s, train)
    whole = {term.name for terms in wanted.values() for term in terms if term.method.needs.full_batches}
    if whole and len(train) < args.batch_size * processes():
        raise UserError(
            f'--batch_size {args.batch_size} x {processes()} processes: the training set has {len(train)} '
            f'images, and {", ".join(sorted(whole))} leaves an incomplete batch out'
        )
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
    # a loss that looks at the training set sees all of it in every process; it counts one process's steps
    all_images = copy.copy(train)
    all_images.shard, all_images.steps = (0, 1), train.steps
    probe = Probe(s, t, net_s, teachers.net_t, all_images, args.batch_size, args.epochs, train.num_classes,
                  another_net, seen.all_t)  # fmt: skip
    runs = []
    for token, terms in wanted.items():
        torch.manual_seed(args.seed)  # a loss's own weights must not depend on the runs built before it
        net = copy.deepcopy(net_s)
        for term in terms:
            net = build_term(term, net, probe, device)
        chosen = recipe_of(terms, args)
        ce, before = chosen['ce'], tuple(chosen['before'])
        inside = args.phases == 'inside'
        if inside and sum(before) >= args.epochs:
            raise UserError(
                f'--phases inside: {token} has {sum(before)} epochs of phases, --epochs {args.epochs} leaves '
                f'none to train'
            )
        epochs = args.epochs - inside * sum(before)
        stops = args.kd_stop is not None and args.kd_stop < epochs  # cross-entropy goes on
        if not ce and not stops and not any(term.weight and not term.method.when.alone for term in terms):
            raise UserError(
                f'{token}: has nothing to learn: a weight of 0, or a loss that only initialises, and no '
                f'cross-entropy (--lambda_ce)'
            )
        gather = gather_batches if args.global_relations else None
        cast = PRECISIONS[args.amp] if graphs else None
        step = Student(net, terms, teachers.amp, args.lambda_ce, gather, cast, args.kd_stop)
        step.all_labelled = bool((train.targets != NO_LABEL).all())
        parameters = [p for p in step.parameters() if p.requires_grad]
        own = next((term for term in terms if term.method.own.optimiser), None)
        if own and args.optim != 'sgd':
            raise UserError(f'--optim {args.optim}: {own.name} has an optimiser of its own')
        with user_errors():
            opt = own.method.own.optimiser(own.loss, parameters, args) if own else optimiser(parameters, args)
        scaler = torch.amp.GradScaler(device.type, enabled=args.amp == 'fp16')
        recipe = math_args(
            args, script='train_kd', student=args.s_name, initial=initial, teacher='+'.join(args.t_name),
            teacher_weights=teacher, **chosen,
            **({'soft_labels': teachers.stored.named(args.epochs)} if teachers.stored else {}),
        )  # fmt: skip
        state = {'net': net, 'kd': step.losses, 'opt': opt, 'scaler': scaler}
        record = Record(folder / token, state, recipe, origin, selected_on)
        run = Run(
            token, step, terms, net, opt, scaler, torch.Generator(device), record, Meter(token, 0, device),
            before, args.batch_size, epochs, inside,
            counters=side_by_side.host_counters(net) if graphs else [],
            usual_only='; '.join(filter(None, (term.method.limits.no_graph for term in terms))),
        )  # fmt: skip
        try_once(run, step, seen)
        record.resume(resume_point(args.resume, folder / token))
        if not record.epoch and rank() == 0:  # the other processes are sent the result
            for term in terms:
                if term.method.own.before:
                    with user_errors():
                        term.method.own.before(term.loss, teachers.teacher, probe)
        same_buffers(step)  # what `before` found; DistributedDataParallel sends parameters only
        run.step = distributed(step, device)
        runs.append(run)
    return runs


def recipe_of(terms: list[Term], args) -> dict:
    """What a run notes down of its methods."""
    replaced = args.lambda_ce is not None and any(callable(term.method.when.ce) for term in terms)
    return {
        'ce': weight_of_ce(terms, args), 'before': list(epochs_before(terms, args)),
        'global_relations': args.global_relations, 'methods': [term.recipe for term in terms],
    } | ({'ce_scheduled': False} if replaced else {})  # fmt: skip


def weight_of_ce(terms: list[Term], args) -> float:
    ces = [term.method.when.ce for term in terms]
    ce = math.prod(1.0 if callable(ce) else ce for ce in ces)
    return ce if args.lambda_ce is None else args.lambda_ce


def epochs_before(terms: list[Term], args) -> tuple[int, int]:
    """Of pretraining and of initialisation, before the training proper."""
    return tuple(
        max((phase_epochs(epochs, args.epochs, chosen) for epochs in of_200), default=0)
        for of_200, chosen in (
            ([term.method.when.pretrain for term in terms], args.pretrain_epochs),
            ([term.method.when.alone for term in terms], args.init_epochs),
        )
    )


def try_once(run: Run, step: Student, seen: Batch) -> None:
    """A step of each phase on a copy: shapes that do not meet show here, before anything is trained.

    With every loss that a step may have, also one that rests at first, or from --kd_stop on.
    """
    trial = copy.deepcopy(step).train()
    trial.gather = trial.stop = None
    state = random_state(seen.img.device)
    generator = torch.Generator(seen.img.device)
    try:
        with user_errors():
            for phase, count in (('pretrain', run.before[0]), ('init', run.before[1]), ('train', 1)):
                if count:
                    batch = replace(seen, now=run.epochs // 2, epochs=run.epochs, generator=generator,
                                    rng=random.Random(0))  # fmt: skip
                    inner = trial.inner(batch.now, run.epochs)
                    weights = trial.weights(phase, batch.now, run.epochs)
                    if phase == 'train':
                        weights |= {
                            t.name: t.weight for t in run.terms if t.weight and not t.method.when.alone
                        }
                    trial(batch, weights, inner, phase)
    except AttributeError as error:  # a network of the user's own, without a part that this method asks for
        raise UserError(f'{run.name}: {error}') from None
    if not torch.equal(state, random_state(seen.img.device)):
        run.draws, run.usual_only = True, '; '.join(filter(None, (run.usual_only, 'it has dropout')))


def build_term(term: Term, net: nn.Module, probe: Probe, device) -> nn.Module:
    """Build the loss of a method, and return the network that this method trains."""
    method = term.method
    with built_from('--kd_args', term.name):
        term.build(probe)
        term.loss.to(device)
        if method.own.student:
            net = method.own.student(net, term.loss, probe).to(device, memory_format=torch.channels_last)
    return net
