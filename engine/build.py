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
from engine.evaluate import features_of, refuse_misfit
from engine.meter import Meter
from engine.method_flags import built_from, named
from engine.optimise import optimiser, phase_epochs
from engine.processes import distributed, gather_batches, processes, same_buffers
from engine.recipe import math_args, resume_point
from engine.record import Record, fingerprint
from engine.student import Run, Student, Term
from methods import schedules


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
    with torch.no_grad():
        s = features_of(args.s_name, net_s.eval(), img)
    teachers.prepare = {method.own.once_per_batch for method in every} - {None}
    once = [term.name for terms in wanted.values() for term in terms if term.method.own.once_per_batch]
    with built_from('', '+'.join(dict.fromkeys(once))) if once else user_errors():
        seen = teachers(img, target, index, more)

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
        chosen = recipe_of(terms, args)
        ce, before = chosen['ce'], tuple(chosen['before'])
        inside = args.phases == 'inside'
        if inside and sum(before) >= args.epochs:
            raise UserError(
                f'--phases inside: {token} has {sum(before)} epochs of phases, --epochs {args.epochs} leaves '
                f'none to train'
            )
        epochs = args.epochs - inside * sum(before)
        for term in terms:
            net = build_term(term, net, replace(probe, epochs=epochs), device)
            if args.ramp_epochs and isinstance(term.ramp, schedules.linear):
                term.ramp = term.ramp.lasting(args.ramp_epochs, epochs)
        stops = args.kd_stop is not None and args.kd_stop < epochs  # cross-entropy goes on
        if not ce and not stops and not any(term.weight and not term.method.when.alone for term in terms):
            raise UserError(
                f'{token}: has nothing to learn: a weight of 0, or a loss that only initialises, and no '
                f'cross-entropy (--lambda_ce)'
            )
        own_step = next((term.name for term in terms if term.method.own.update), None)
        later = args.lambda_ce is None and any(callable(term.method.when.ce) for term in terms)
        if own_step and (later or not ce):
            raise UserError(
                f'{token}: the step of {own_step} sets the loss against cross-entropy, whose weight is 0'
                f'{" at first" if later else ""}; --lambda_ce gives it one'
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
        if not record.epoch:  # every process looks itself: waiting for another has a time limit
            for term in terms:
                if term.method.own.before:
                    with user_errors():
                        term.method.own.before(term.loss, teachers.teacher, probe)
        same_buffers(step)  # as the first has found it
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
        with named(run.name):
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
                    check_terms(trial(batch, weights, inner, phase)[1])
    except AttributeError as error:  # a network of the user's own, without a part that this method asks for
        raise UserError(f'{run.name}: {error}') from None
    if not torch.equal(state, random_state(seen.img.device)):
        run.draws, run.usual_only = True, '; '.join(filter(None, (run.usual_only, 'it has dropout')))


def check_terms(terms: dict) -> None:
    """A loss that is no number, or has lost its graph, would leave the student to the others in silence."""
    for name, x in terms.items():
        if not isinstance(x, torch.Tensor) or x.dim() or not x.requires_grad:
            got = f'a tensor of shape {tuple(x.shape)}' if isinstance(x, torch.Tensor) else type(x).__name__
            got += ', detached' if isinstance(x, torch.Tensor) and not x.requires_grad else ''
            raise UserError(f'{name}: the loss must be one number with a gradient, got {got}')


def build_term(term: Term, net: nn.Module, probe: Probe, device) -> nn.Module:
    """Build the loss of a method, and return the network that this method trains."""
    method = term.method
    with built_from('--kd_args' if term.options else '', term.name):
        term.build(probe)
        term.loss.to(device)
        if method.own.student:
            net = method.own.student(net, term.loss, probe).to(device, memory_format=torch.channels_last)
    return net
