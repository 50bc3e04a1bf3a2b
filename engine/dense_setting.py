"""From the flags of train_dense.py to its pictures, its teacher, and the weights that students start from."""

import copy
import dataclasses
import math
import re
from pathlib import Path

import torch
from torch import nn

import models
from dataset import annotated
from engine import dense as parts
from engine import session
from engine.augment import read_augment
from engine.dense_tasks import TASKS, Setting
from engine.device import autocast
from engine.errors import NonFinite, UserError, user_errors
from engine.meter import all_finite
from engine.optimise import one_cycle, set_learning_rate
from engine.processes import processes, rank
from engine.record import keep
from models.changed import read_state
from models.dense import build

T_LR = 2e-3  # of a teacher that is trained here
# what wrappers leave before the names of weights, one after another
WRAPPERS = re.compile(r'^(?:(?:module|_orig_mod|model|net|student)\.)+')


def make_setting(args, device, root: Path, log, needs_teacher: bool) -> tuple[Setting, nn.Module]:
    """Pictures and teacher, and the weights that every student starts from."""
    with user_errors():
        whole, more, test = annotated.load(args.task, args.data_name, args.img_root, args.size)
    rooms = more is not None
    n = args.labelled or ((50 if args.task == 'segmentation' else 100) if rooms else len(whole))
    n = min(n, len(whole))
    order = picked(len(whole), n, rooms)
    labelled = torch.utils.data.Subset(whole, order[:n])
    rest = more if rooms else torch.utils.data.Subset(whole, order[n:])
    free = len(rest) if rooms and args.unlabelled is None else min(args.unlabelled or 0, len(rest))
    unlabelled = torch.utils.data.Subset(rest, range(free)) if free else None
    crop = args.size if not rooms and args.task == 'segmentation' else None
    if min(n, free or n) < processes():
        raise UserError(f'--labelled, --unlabelled: {n} and {free} pictures for {processes()} processes')
    view, numbers = read_augment(args, args.size)
    shard = rank(), processes()
    steps = annotated.Steps(labelled, unlabelled, args.batch_size, args.seed, crop, view, shard)
    K = len(whole.class_names)
    with user_errors():
        torch.manual_seed(args.seed)
        start = build(args.task, args.s_name, K, args.size, frozen=bool(args.s_init))
        net_t = (
            build(args.task, args.t_name, K, args.size, frozen=frozen_in(args.t_model))
            if needs_teacher
            else None
        )
    if args.s_init:
        log(f'--s_init: {started(start, args.s_init)}')
    start.to(device, memory_format=torch.channels_last)
    setting = Setting(
        test, K, device, autocast(device, args.amp), args.seed, args.steps, steps, n, free,
        whole.class_names, ({'augment': numbers} if numbers else {}) | (
            {} if rooms or n == len(whole) else {'labelled_drawn': True}),
    )  # fmt: skip
    setting.task = TASKS[args.task](setting, start)
    if args.task == 'detection' and not rooms and ':' in args.s_name:
        log(f'{args.s_name}: every picture is scaled to {args.size} pixels on its longer side, see --size')
    if needs_teacher:
        everything = annotated.Steps(whole, None, args.batch_size, 0)
        setting.net_t = the_teacher(args, setting, net_t, everything if rooms else None, root, log)
    log(f'{args.data_name}: {n} labelled and {free} other pictures to learn from, {len(test)} for the test')
    return setting, start


def picked(total: int, n: int, rooms: bool) -> list[int]:
    """All pictures in an order whose first n have labels: of files n by chance, the same for every --seed.

    Rooms are drawn independently of one another, so that their first ones will do; files are sorted by year
    or by number.
    """
    if rooms or n == total:
        return list(range(total))
    return torch.randperm(total, generator=torch.Generator().manual_seed(0)).tolist()


def frozen_in(path: str | None) -> bool:
    """Whether the batch norms of these weights were frozen: they count no batches."""
    if not path:
        return False
    with user_errors():
        state = read_state(path)
    return not any(name.endswith('num_batches_tracked') for name in state)


def started(net: nn.Module, path: str) -> str:
    """Weights of the whole network, or of its backbone alone, as torchvision offers them for ImageNet."""
    with user_errors():
        state = read_state(path)
    own = net.state_dict()
    fits = {}
    for name, value in state.items():
        forms = name, WRAPPERS.sub('', name)
        places = [part + form for form in forms for part in ('', 'backbone.', 'backbone.body.')]
        places += [part + form.removeprefix('features.') for form in forms
                   for part in ('backbone.', 'backbone.body.')]  # fmt: skip
        place = next((p for p in places if p in own and own[p].shape == getattr(value, 'shape', None)), None)
        if place:
            fits[place] = value
    if len(fits) < len(own) / 4:
        raise UserError(f'--s_init {path}: {len(fits)} of {len(own)} tensors of the student are in it')
    net.load_state_dict(own | fits)
    return f'{len(fits)} of {len(own)} tensors from {path}'


OWN_TEACHER = 'train one for these data: --kd_mode alone --s_name NAME --s_init FILE'


def the_teacher(args, setting, net, steps, root: Path, log) -> nn.Module:
    """From --t_model, or trained here once, on all rooms, and kept."""
    if args.t_model:
        path = Path(args.t_model)
    else:
        name = f'dense_teacher_{args.task}_{args.data_name}_{args.size}_{args.t_name}_{args.t_steps}'
        name += f'_b{args.batch_size}' * (args.batch_size != 16) + f'_{args.amp}' * (args.amp != 'off')
        path = root / f'{name}.pt'.replace(':', '')
        if steps is None:
            raise UserError(
                f'--t_model: needed with {args.data_name}; train one: --kd_mode alone --s_name {args.t_name}'
            )

        def weights() -> dict:
            try_step(args.t_name, net, parts.StepPictures(setting, 0, steps[0]))
            torch.manual_seed(0)
            net.load_state_dict(build(args.task, args.t_name, setting.num_classes, args.size).state_dict())
            learn_from_labels(args, setting, net, steps, log)
            if not all_finite(net):
                raise NonFinite('the teacher: a weight is not finite after its training')
            return models.named_weights(net, setting.class_names)

        keep(path, weights)
    with user_errors():
        try:
            models.load_weights(net, path, class_names=setting.class_names, head=OWN_TEACHER)
        except ValueError as error:
            raise ValueError(
                f'{error}{f": {OWN_TEACHER}" if "other classes" in str(error) else ""}'
            ) from None
    net.to(setting.device, memory_format=torch.channels_last).eval().requires_grad_(False)
    if args.task == 'detection':
        same = ('image_mean', 'image_std', 'min_size', 'max_size', 'size_divisible')
        for key in same:
            ours, its = getattr(setting.task.transform, key), getattr(net.transform, key)
            if ours != its:
                raise UserError(
                    f'--t_name, --s_name: pictures are prepared differently, {key} {its} and {ours}'
                )
    figures = setting.task.measure(net)
    if not all(math.isfinite(p.sum()) for p in net.state_dict().values() if p.is_floating_point()):
        raise UserError(f'{path}: a weight is not finite')
    setting.facts = {'name': args.t_name, **figures}
    log(f'teacher {args.t_name}: {path.name}, ' + ', '.join(f'{k} {v:.2f}' for k, v in figures.items()))
    return net


def try_step(name: str, net: nn.Module, seen) -> None:
    """The pictures of a step through a copy of a network: one line where it cannot learn from so few."""
    trial, given = copy.deepcopy(net).to(seen.setting.device).train(), seen.given('labelled')
    try:
        with torch.no_grad(), user_errors():
            seen.setting.task.look(trial, given)
    except UserError as error:
        raise UserError(f'{name}: {error}; a step needs more pictures (--batch_size, --labelled)') from None


def learn_from_labels(args, setting, net, steps, log) -> None:
    """A teacher of rooms: AdamW and one cycle, no checkpoint on the way."""
    net.to(setting.device, memory_format=torch.channels_last).train()
    opt = torch.optim.AdamW(net.parameters(), T_LR, weight_decay=0.01)
    bar = session.progress_bar(args.t_steps, 0, log)
    drawn = dataclasses.replace(setting, seed=0)  # it is kept for students of any --seed
    for step in range(args.t_steps):
        seen = parts.StepPictures(drawn, step, steps[step])
        given = seen.given('labelled')
        loss = setting.task.loss(setting.task.look(net, given), given)
        opt.zero_grad(set_to_none=True)
        loss.backward()
        setting.task.clipped(net.parameters())
        set_learning_rate(opt, T_LR * one_cycle((step + 0.5) / args.t_steps))
        opt.step()
        bar.update()
        if step % 50 == 0 and not bar.disable:
            bar.set_postfix_str(f'teacher, loss {loss.item():.3f}')
    bar.close()
