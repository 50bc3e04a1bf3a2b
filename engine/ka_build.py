"""From the flags of train_ka.py to its students."""

import copy
import random
from dataclasses import replace

import torch
from torch import nn

from engine.device import random_state
from engine.errors import UserError, user_errors
from engine.ka_student import Batch, Probe, Run, Student, Term
from engine.meter import Meter
from engine.method_flags import (
    built_from,
    refuse_many_processes,
    refuse_repeated,
    refuse_unknown,
    weights_and_options,
)
from engine.optimise import adam, sgd
from engine.processes import distributed
from engine.recipe import math_args, resume_point
from engine.record import Record, fingerprint
from ka_losses import ConcatKD, concat_kd
from ka_settings import setting_for
from methods.ka import KA, Method

ENSEMBLE = 'ensemble'  # a word of --ka_mode that trains nothing


def reads_T(method: Method) -> bool:
    """Whether the loss is soft targets itself: ConcatKD, but for its squares."""
    return method.loss is ConcatKD and method.build is not concat_kd.build_mse


def read_methods(args) -> tuple[dict[str, Method], dict[str, Term]]:
    """{word of --ka_mode: its row}, {word: the row with what the other flags make of it}."""
    names = [name for name in args.ka_mode if name != ENSEMBLE]
    refuse_unknown('--ka_mode', names, KA)
    setting = chosen_setting(args)
    for name in [name for name in names if not fits(KA[name], setting)]:
        if alone(KA[name], args.data_name):  # two settings have this data, and a run has one of them
            others = ', '.join(n for n in names if fits(KA[n], setting) and KA[n].needs.setting)
            raise UserError(f'--ka_mode {name}: not in one run with {others}; run it by itself')
        fitting = ', '.join(key for key, m in KA.items() if alone(m, args.data_name))
        raise UserError(f'--ka_mode {name}: not for --data_name {args.data_name}; there are {fitting}')
    refuse_many_processes(names, KA)
    refuse_repeated('--ka_mode', args.ka_mode)
    weights, options = weights_and_options(args, names, KA, 'ka')
    rows = {name: KA[name] for name in names}
    for name, method in rows.items():
        if reads_T(method) and args.T != 1 and 'T' not in options[name]:
            options[name]['T'] = args.T  # its loss is soft targets itself
    terms = {
        name: Term(name, method, weights[name], soft_targets(method, args), options[name])
        for name, method in rows.items()
    }
    soft = [name for name, term in terms.items() if term.soft or reads_T(term.method)]
    for flag, given, reads in (
        ('--lambda_kd', args.lambda_kd is not None, any(method.when.soft for method in rows.values())),
        ('--ka_layers', args.ka_layers, any(method.needs.layers for method in rows.values())),
        ('--T', args.T != 1, soft),
    ):
        if given and not reads:
            raise UserError(f'{flag}: {" ".join(names) or ENSEMBLE} would not read it')
    for name, term in terms.items():
        if not (term.weight or term.soft):
            raise UserError(f'{name}: has nothing to learn: --lambda_ka 0, and no soft targets (--lambda_kd)')
    return rows, terms


def chosen_setting(args):
    """The setting of --data_name, and of --ka_mode where the data set has several."""
    words = [word for name in args.ka_mode if name in KA for word in KA[name].needs.setting.split()]
    return setting_for(args.data_name, words)


def fits(method: Method, setting) -> bool:
    return not method.needs.setting or setting.name in method.needs.setting.split()


def alone(method: Method, data_name: str) -> bool:
    """Whether it could learn from this data in a run of its own."""
    return fits(method, setting_for(data_name, method.needs.setting.split()))


def soft_targets(method: Method, args) -> float:
    """Their weight: --lambda_kd is for the rows that have them."""
    return method.when.soft if args.lambda_kd is None else args.lambda_kd * bool(method.when.soft)


def build_run(args, term: Term, setting, folder, origin) -> Run:
    """A student with its loss, optimisers and record; the record's checkpoint if there is one to continue."""
    name, method, device = term.name, term.method, setting.train.device
    net = setting.student(method)
    initial = fingerprint(net)
    net.to(device, memory_format=torch.channels_last)
    layers = tuple(args.ka_layers or method.needs.layers) if method.needs.layers else ()
    batch, probe = first_look(args, net, setting, layers)
    if layers:
        check_stages(name, probe)
    torch.manual_seed(args.seed)  # a loss's own weights must not depend on the runs built before it
    with built_from('--ka_args' if term.options else '', name):
        ka = method.build(method.loss, probe, **term.options).to(device)
    step = Student(net, ka, term, setting, args.T)
    opts = {update: optimiser(args, *both) for update, both in method.own.parameters(net, ka).items()}
    trial = Student(*copy.deepcopy((net, ka)), term, setting, args.T).train()
    state = random_state(device)
    with user_errors():  # shapes that do not meet show here, before anything is trained
        for update in opts:
            trial(replace(batch, update=update))
    draws = not torch.equal(state, random_state(device))
    recipe = math_args(
        args, script='train_ka', student=setting.student_name, initial=initial,
        method=[name, term.weight, term.soft, term.options],
        teachers=[fingerprint(t) for t in setting.nets], layers=list(layers), T=args.T, optim=args.optim,
        lr_ka=args.lr_ka, **flags_of_all_settings(args) | setting.recipe,
    )  # fmt: skip
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == 'fp16')
    state = {'net': net, 'ka': ka, 'scaler': scaler, **{f'opt_{key}': opt for key, opt in opts.items()}}
    record = Record(folder / name, state, recipe, origin, 'val' if setting.val else 'test', setting.key)
    record.resume(resume_point(args.resume, folder / name))
    step = distributed(step, device)
    return Run(name, method, step, net, ka, opts, scaler, record, layers, Meter(name, 0, device), draws)


def first_look(args, net: nn.Module, setting, layers: tuple[int, ...]) -> tuple[Batch, Probe]:
    """Two images, on which a loss is built and tried."""
    img, target, index, _ = next(setting.train.train_batches(args.batch_size, args.seed, 0))
    img, index = img[:2], index[:2]
    target = {k: v[:2] for k, v in target.items()} if isinstance(target, dict) else target[:2]
    batch = Batch(
        img, target, index, setting.teachers_on(img), layers=layers, blocks=setting.blocks,
        rng=random.Random(0), soft=ConcatKD(), supervised=setting.supervised,
    )  # fmt: skip
    with torch.no_grad():
        s = setting.forward(net.eval(), batch)
    return batch, Probe(s, batch.all_t, net, layers, setting.tasks)


def check_stages(name: str, probe: Probe) -> None:
    """Every network has the stages that the loss attaches to."""
    least = min(len(f.fms) for f in (probe.s, *probe.all_t)) - 1
    if max(probe.layers) > least:
        raise UserError(
            f'--ka_layers: {name} attaches to stage {max(probe.layers)}, a network has {least} only'
        )


def optimiser(args, net: list, ka: list) -> torch.optim.Optimizer:
    """Of parameters of the student and of the loss, each with a learning rate of its own."""
    groups = [{'params': params, 'role': role} for role, params in (('net', net), ('ka', ka)) if params]
    if args.optim == 'adam':
        return adam(groups, args.lr, weight_decay=args.weight_decay)
    return sgd(groups, args)


def flags_of_all_settings(args) -> dict:
    """The recipe of a run names these whatever its setting is: so do the checkpoints that it may resume."""
    return {'parts': None, 'classes': None, 'unlabeled': args.unlabeled, 'limit_train': args.limit_train,
            'limit_test': args.limit_test, 'tasks': [], 'size': args.size, 'epochs_ft': args.epochs_ft,
            'labelled': None}  # fmt: skip
