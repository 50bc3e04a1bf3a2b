"""Few-shot distillation by grafting: parts of a student grow in the teacher, first alone, then together.

    python tools/graft.py --t_name resnet20 --t_model save/teacher/net.pt --s_name resnet8 \\
        --data_name cifar10 --shots 1 5 10 --seed 2 3 4 --note graft

The student keeps the first parts of the teacher and has --s_name's from part --first on, between 1x1
convolutions (models/grafting.py). With so few images per class as --shots says, and without their labels:

    1. block grafting     each part by itself in the frozen teacher
    2. network grafting   the first two parts together, then the first three, ...

always so that the logits keep the teacher's direction (kd_losses/graftkd.py). For comparison two students of
the same shape see the same images for as many steps: 'at once' trains all parts together from the start, with
the same loss, beside the same parts of the teacher; 'alone' starts from random weights and learns the labels.

Writes to SAVE_ROOT/NOTE: log.txt, last.pt (after every phase, continued by --resume auto), results.json,
student-SHOTS-sSEED.pt (of the grafted students), few-shot.png. Results of several runs, of other seeds or
numbers of images, make one figure: python -m report explain FILE... --out few-shot.png
"""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import engine.threads  # noqa: E402, F401  before torch

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import nn  # noqa: E402

import dataset  # noqa: E402
import models  # noqa: E402
from engine import errors  # noqa: E402
from engine.data import first_images, labelled_part, own_scale, read_data, which_images  # noqa: E402
from engine.device import autocast, refuse_fp16, setup  # noqa: E402
from engine.errors import NonFinite, UserError, user_errors  # noqa: E402
from engine.evaluate import evaluate  # noqa: E402
from engine.flags import (  # noqa: E402
    add_data_flags,
    add_machine_flags,
    add_place_flags,
    positive_float,
    positive_int,
    seed_number,
)
from engine.parser import Parser  # noqa: E402
from engine.recipe import forget, load_checkpoint, resume_point  # noqa: E402
from engine.record import fingerprint, output_folder, provenance, save_checkpoint, write_json  # noqa: E402
from engine.session import Log, progress_bar  # noqa: E402
from engine.teachers import load_teacher  # noqa: E402
from kd_losses.graftkd import GraftKD  # noqa: E402
from models.grafting import Grafted  # noqa: E402
from report.explain import few_shot_figure  # noqa: E402


def parse_args():
    parser = Parser(__doc__)
    # fmt: off
    flag = parser.add_argument_group('grafting').add_argument
    flag('--t_name', required=True, metavar='NAME', help='teacher, a resnet or vgg of CIFAR')
    flag('--t_model', required=True, metavar='FILE', help="the teacher's checkpoint")
    flag('--s_name', required=True, metavar='NAME', help='student, of the same family')
    flag('--first', type=positive_int, default=2, metavar='K',
         help="the first stage that is the student's; what is before it stays the teacher's; default 2")
    flag('--shots', type=positive_int, nargs='+', default=[1, 5, 10], metavar='S',
         help='images per class, a student for each; default 1 5 10')
    flag('--block_epochs', type=positive_int, nargs='+', default=[100, 60], metavar='E',
         help='of the parts in turn, the last number for those that remain; default 100 60')
    flag('--net_epochs', type=positive_int, default=100, metavar='E',
         help='of each step of network grafting, default 100')
    flag('--lr_block', type=positive_float, default=2.5e-4,
         help="Adam's, of the parts, for 10 images per class; times S / 10 for S; default 0.00025")
    flag('--lr_adapter', type=positive_float, default=2.5e-3,
         help='the same, of the 1x1 convolutions, default 0.0025')
    flag('--lr_net', type=positive_float, default=1e-4, help='of network grafting, for any S; default 0.0001')
    flag('--fixed_lr', action='store_true', help='do not scale the rates of block grafting by S / 10')
    flag('--lr_alone', type=positive_float, default=1e-3, help="of the student alone, default 0.001")
    flag('--batch_size', type=positive_int, default=64,
         help='for 10 images per class; times S / 10 for S, at least 2; default 64')
    flag('--test_images', type=positive_int, metavar='N', help='measure on N test images only')
    flag('--seed', type=seed_number, nargs='+', default=[2], metavar='N',
         help='of the images, the weights and the batches; each is a run of its own; default 2')
    # fmt: on
    add_data_flags(parser)
    add_machine_flags(parser)
    add_place_flags(parser)
    return parser.parse_args()


def main():
    args = parse_args()
    seeds, args.seed = args.seed, args.seed[0]
    refuse_fp16(args)
    device = setup(args)
    amp = autocast(device, args.amp)
    folder = output_folder(Path(args.save_root) / (args.note or f'graft-{args.t_name}-{args.s_name}'))
    log = Log(folder)
    train, test = read_data(args, device)
    images = which_images(args, train)
    train = labelled_part(train)
    if args.test_images:
        test = first_images(test, args.test_images, args.data_name)
    with user_errors():
        teacher = models.build_for(args.t_model, args.t_name, train.num_classes)
        start = grafted(args, train.num_classes, test, args.seed)
    measured = load_teacher(teacher, args.t_model, test, amp)
    log(f'teacher {args.t_name}: top-1 {measured["top1"]:.2f} on {len(test)} test images')
    same_as_parts(teacher, start, args, test)
    least = int(torch.bincount(train.targets, minlength=train.num_classes).min())
    if max(args.shots) > least or len(set(args.shots)) < len(args.shots):
        raise UserError(f'--shots {max(args.shots)}: each once, and a class has {least} images only')

    phases = phases_of(args, list(start.numbers))
    work = [(seed, shots, phase) for seed in seeds for shots in args.shots for phase in phases]
    recipe = {key: getattr(args, key) for key in (
        't_name', 's_name', 'first', 'shots', 'block_epochs', 'net_epochs', 'lr_block', 'lr_adapter',
        'lr_net', 'fixed_lr', 'lr_alone', 'batch_size', 'test_images', 'data_name', 'amp')}  # fmt: skip
    recipe |= {'script': 'graft', 'seeds': seeds, 'teacher': fingerprint(teacher), **images}
    state = {'epoch': 0, 'args': recipe, 'origin': provenance(device), 'rows': [], 'net': None}
    if at := resume_point(args.resume, folder):
        state = load_checkpoint(at, recipe)
    if at or args.resume == 'auto':
        log(f'{state["epoch"]} of {len(work)} phases done')
    forget(args.resume, folder)
    bar = progress_bar(sum(phase['epochs'] for *_, phase in work), 0, log)

    for number, (seed, shots, phase) in enumerate(work):
        if number < state['epoch']:
            bar.update(phase['epochs'])
            continue
        started = time.time()
        few = dataset.few_per_class(train, shots, seed)
        net = grafted(args, train.num_classes, test, seed, teacher).to(
            device, memory_format=torch.channels_last
        )
        if phase['way'] == 'alone':
            net = net.merged()
            fresh(net, seed)
        elif state['net']:
            net.load_state_dict(state['net'])
        groups = parameters(net, phase, args, 1 if args.fixed_lr else shots / 10)
        loss, steps = fit(net, teacher, groups, phase, few, max(args.batch_size * shots // 10, 2), seed,
                          amp, bar)  # fmt: skip
        said = f'{shots} per class, seed {seed}, {phase["name"]}: loss {loss:.4f}'
        kept = net.state_dict() if phase['way'] == 'grafted' and not phase['last'] else None
        row = {'seed': seed, 'shots': shots, 'way': phase['way'], 'phase': phase['name'], 'steps': steps}
        if phase['measure']:
            tested = evaluate(net, test, amp)
            row |= {'top1': tested['top1'], 'top5': tested['top5']}
            said += f', top-1 {tested["top1"]:.2f}'
        row |= {'loss': loss, 'seconds': round(time.time() - started, 1), 'last': phase['last']}
        log(said)
        if phase['way'] == 'grafted' and phase['last']:
            scale = own_scale(args.data_name, train)
            weights = models.named_weights(net.merged(), train.class_names, scale)
            save_checkpoint(folder / f'student-{shots}-s{seed}.pt', weights)
        state |= {'epoch': number + 1, 'rows': [*state['rows'], row], 'net': kept}
        save_checkpoint(folder / 'last.pt', state)
    bar.close()

    result = {
        'script': 'graft', 'data': args.data_name, 'teacher': args.t_name, 'student': args.s_name,
        'first': args.first, 'teacher_top1': measured['top1'], 'test_images': len(test),
        'parameters': sizes(teacher, start), 'rows': state['rows'], 'recipe': recipe, **state['origin'],
    }  # fmt: skip
    write_json(folder / 'results.json', result)
    few_shot_figure([result], folder / 'few-shot.png', log)


def phases_of(args, numbers: list[int]) -> list[dict]:
    """What is trained for one number of images, in order."""
    epochs = [*args.block_epochs, *args.block_epochs[-1:] * len(numbers)][: len(numbers)]
    made = [
        {'way': 'grafted', 'name': f'part {k}', 'parts': (k,), 'epochs': e, 'measure': False, 'last': False}
        for k, e in zip(numbers, epochs)
    ]
    made += [
        {'way': 'grafted', 'name': f'parts {numbers[0]} to {k}', 'parts': tuple(numbers[: i + 2]),
         'epochs': args.net_epochs, 'measure': True, 'last': k == numbers[-1]}
        for i, k in enumerate(numbers[1:])
    ]  # fmt: skip
    whole = sum(phase['epochs'] for phase in made)
    return made + [
        {'way': way, 'name': way, 'parts': tuple(numbers), 'epochs': whole, 'measure': True, 'last': True}
        for way in ('at once', 'alone')
    ]


def grafted(args, num_classes: int, test, seed: int, teacher: nn.Module | None = None) -> Grafted:
    """A fresh student's parts in (a copy of) the teacher."""
    torch.manual_seed(seed)
    student = models.build(args.s_name, num_classes)
    copied = models.build_for(args.t_model, args.t_name, num_classes)
    if teacher is not None:
        copied.load_state_dict(teacher.state_dict())
    size = test.images.shape[1] if hasattr(test, 'images') else args.image_size
    return Grafted(copied, student, args.first, size)


def same_as_parts(teacher: nn.Module, net: Grafted, args, test) -> None:
    """Refuse a teacher that is more than its parts (a vgg pools images of 64 pixels once more)."""
    img, _, _ = next(iter(test.test_batches(2)))
    with torch.no_grad():
        x = grafted(args, test.num_classes, test, args.seed, teacher).to(img.device).eval()(img)
        if not torch.allclose(x, teacher(img), rtol=1e-3, atol=1e-3):
            raise UserError(f'--t_name {args.t_name}: not for images of {img.shape[2]} pixels')


def fresh(net: nn.Module, seed: int) -> None:
    """Random weights for every layer."""
    torch.manual_seed(seed)
    for module in net.modules():
        if hasattr(module, 'reset_parameters'):
            module.reset_parameters()
    net.requires_grad_(True)


def parameters(net: nn.Module, phase: dict, args, scale: float) -> list[dict]:
    """Groups for Adam: the parts and the 1x1 convolutions that this phase trains."""
    if phase['way'] == 'alone':
        return [{'params': list(net.parameters()), 'lr': args.lr_alone}]
    grafts = [graft for k, graft in zip(net.numbers, net.grafts) if k in phase['parts']]
    joint = phase['way'] == 'grafted' and len(phase['parts']) > 1
    rates = (args.lr_net, args.lr_net) if joint else (args.lr_block * scale, args.lr_adapter * scale)
    return [
        {'params': [p for graft in grafts for p in graft.part.parameters()], 'lr': rates[0]},
        {'params': [p for graft in grafts for p in graft.adapters()], 'lr': rates[1]},
    ]


def fit(net, teacher, groups, phase: dict, few, batch_size: int, seed: int, amp, bar) -> tuple[float, int]:
    """Train; the mean loss per image of the last epoch, and how many steps there were."""
    alone = phase['way'] == 'alone'
    (net if alone else net.use(phase['parts'])).train()
    opt, loss_kd, steps = torch.optim.Adam(groups), GraftKD(), 0
    for epoch in range(phase['epochs']):
        total = images = 0
        for img, target, *_ in few.train_batches(batch_size, seed, epoch):
            with torch.no_grad(), amp():
                out_t = None if alone else teacher(img)
            with amp():
                out_s = net(img)
            loss = F.cross_entropy(out_s.float(), target, reduction='sum') if alone else loss_kd(out_s, out_t)
            if not torch.isfinite(loss):
                raise NonFinite(f'{phase["name"]}: the loss is not finite in epoch {epoch + 1}')
            opt.zero_grad(set_to_none=True)
            (loss / len(img) if alone else loss).backward()
            opt.step()
            total, images, steps = total + float(loss.detach()), images + len(img), steps + 1
        bar.update()
    return total / images, steps


def sizes(teacher: nn.Module, net: Grafted) -> dict[str, int]:
    return {
        'teacher': sum(p.numel() for p in teacher.parameters()),
        'student': sum(p.numel() for p in net.merged().parameters()),
    }


if __name__ == '__main__':
    errors.run(main)
