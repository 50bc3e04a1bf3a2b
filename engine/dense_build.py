"""From the flags of train_dense.py to its students."""

from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from engine import dense as parts
from engine.dense_setting import try_step
from engine.errors import UserError, user_errors
from engine.meter import Meter
from engine.optimise import adamw, one_cycle, sgd
from engine.processes import averaged, processes, same_weights
from engine.recipe import resume_point
from engine.record import fingerprint
from engine.step_record import StepRecord
from models.dense import build

HEAD_NAMES = {'fasterrcnn': 'Faster R-CNN', 'retinanet': 'RetinaNet', 'fcos': 'FCOS'}
MASKS_LR = 1e-3  # of what a loss learns before the training, by Adam


def rows_for(rows: dict, task: str, s_name: str) -> dict:
    """The rows of a task, with the weight for this kind of detector."""
    head = head_of(s_name)
    return {
        name: replace(row, weight=row.by_head.get(head, row.weight))
        for name, row in rows.items()
        if row.task in ('', task)
    }


def head_of(name: str) -> str:
    """The kind of network that a name means: retinanet of retinanet:resnet10 and retinanet_resnet50_fpn."""
    return name.partition(':')[0].partition('_')[0]


def refuse_other_heads(names, rows: dict, s_name: str, t_name: str) -> None:
    """What is for one kind of detector, from the names: before a teacher is trained for it."""
    for name in names:
        heads = rows[name].heads
        if heads and not all(head_of(network) in heads for network in (s_name, t_name)):
            kinds = ' or '.join(HEAD_NAMES[head] for head in heads)
            raise UserError(
                f'{name}: is for {kinds}: --s_name {heads[0]}:resnet10 --t_name {heads[0]}:resnet18, or '
                'others of it'
            )


def share_of_rate(args, step: int) -> float:
    """Of the highest learning rate, in this step."""
    done = (step + 0.5) / args.steps
    if args.schedule == 'onecycle':
        share = one_cycle(done)
    elif args.schedule == 'poly':
        share = (1 - done) ** 0.9
    else:
        share = 0.1 ** sum(done >= milestone for milestone in args.milestones)
    return share * min(1.0, (step + 1) / max(args.warmup, 1))


def optimiser(args, parameters) -> torch.optim.Optimizer:
    if args.optim == 'sgd':
        return sgd(parameters, Namespace(lr=args.lr, momentum=0.9, weight_decay=1e-4, nesterov=False))
    return adamw(parameters, Namespace(lr=args.lr, weight_decay=0.01))


def make_run(
    args, setting, start: nn.Module, folder: Path, origin: dict, word: str, chosen: dict
) -> parts.Run:
    """chosen: {method: (row, weight, options)} of this student."""
    torch.manual_seed(args.seed)
    net = build(args.task, args.s_name, setting.num_classes, args.size, frozen=bool(args.s_init))
    net.load_state_dict(start.state_dict())
    net.to(setting.device, memory_format=torch.channels_last).train()
    seen = parts.StepPictures(setting, 0)
    try_step(args.s_name, net, seen)
    # losses are built from, and tried on, the first pictures, whatever other students there are
    torch.manual_seed(args.seed)
    terms = []
    for name, (row, weight, options) in chosen.items():
        kd = (
            tried(row, name, options, net, seen)
            if row.needs.teacher
            else row.build(row.loss, None, **options)
        )
        terms.append(parts.Term(name, row, kd.to(setting.device), weight))
    net.load_state_dict(start.state_dict())  # the trial has moved batch norms
    kds = nn.ModuleDict({term.name: term.kd for term in terms})
    same_weights(net, kds)
    opt = optimiser(args, [*net.parameters(), *kds.parameters()])
    run = parts.Run(word, terms, net, opt, Meter(word, 0, setting.device, 'before evaluation'), setting)
    recipe = {key: getattr(args, key) for key in
              ('task', 'data_name', 'size', 'seed', 'steps', 'batch_size', 'lr', 'optim', 'schedule',
               'warmup', 'eval_every', 'amp', 's_name')}  # fmt: skip
    recipe |= {'milestones': args.milestones} if args.schedule == 'steps' else {}
    recipe |= {'processes': processes()} if processes() > 1 else {}
    recipe |= {'script': 'train_dense', 'labelled': setting.pictures, 'unlabelled': setting.unlabelled,
               'initial': fingerprint(start),
               'methods': [[name, weight, options] for name, (_, weight, options) in chosen.items()],
               'teacher': fingerprint(setting.net_t) if taught(chosen) else None,
               **setting.augmented}  # fmt: skip
    state = {'net': net, 'kd': kds, 'opt': opt}
    run.record = StepRecord(folder / word, state, recipe, origin, 'test', setting.task.key)
    run.record.resume(resume_point(args.resume, folder / word))
    if not run.record.epoch:
        learn_masks(args, run)
    return run


def taught(chosen: dict) -> bool:
    return any(row.needs.teacher for row, *_ in chosen.values())


def tried(row, name: str, options: dict, net: nn.Module, seen: parts.StepPictures) -> nn.Module:
    """The module of a loss, which has been called once: what does not fit shows here, in one line."""
    part, setting = seen.part(row), seen.setting
    t = seen.teacher(part)
    state = torch.get_rng_state()
    with torch.no_grad():
        s = setting.task.look(net, seen.given(part))
    torch.set_rng_state(state)
    probe = parts.Probe(s, t, setting.num_classes, setting.pictures)
    try:
        with user_errors():
            kd = row.build(row.loss, probe, **options).to(setting.device)
            state, kept = torch.get_rng_state(), {k: v.clone() for k, v in kd.state_dict().items()}
            seen.seed()
            with torch.no_grad():
                row.feed(kd, s, t, parts.Batch(seen, part))
            kd.load_state_dict(kept)
            torch.set_rng_state(state)
            return kd
    except (TypeError, IndexError) as error:
        raise UserError(f'--kd_args: {name}: {error}') from None
    except UserError as error:
        raise UserError(f'{name}: {error}') from None


def learn_masks(args, run: parts.Run) -> None:
    """What some losses learn of the teacher before the training: a twelfth of its steps."""
    for term in run.terms:
        if not term.method.own.pretrain:
            continue
        opt = torch.optim.Adam(term.kd.parameters(), MASKS_LR)
        for step in range(max(round(args.steps * term.method.when.pretrain / 200), 1)):
            seen = parts.StepPictures(run.setting, step)
            given = seen.given('labelled')
            seen.seed()
            loss = term.method.own.pretrain(term.kd, seen.teacher('labelled'), parts.Batch(seen, 'labelled'))
            opt.zero_grad(set_to_none=True)
            loss.backward()
            averaged(term.kd.parameters())
            opt.step()
            del given
        opt.zero_grad(set_to_none=True)
