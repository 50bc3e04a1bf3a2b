"""What a distilled student knows that one trained from labels does not: visual concepts, counted.

    python tools/knowledge.py --t_name resnet56 --t_model save/teacher/net.pt --s_name resnet20 \\
        --data_name cifar10 --epochs 150 --note knowledge

Trains the student twice from the same initial weights: 'labels' with cross-entropy, 'distilled' without
labels, its last map before the ReLU against the teacher's (mean squared error). Weights are kept at epochs
--checkpoints. Then, for some test images, it finds how much noise each cell of an image bears before that
layer notices (transferability/knowledge.py): what the layer knows of the image. A cell that bears less than
the background is a visual concept. Images count if, in both trainings, the background bears no less than the
foreground at the checkpoints from epoch --settled on. The foreground is a central square.

Writes to SAVE_ROOT/NOTE: log.txt, labels/ and distilled/ (last.pt, epochN.pt, metrics.csv), noise/ (what was
found at every checkpoint), results.json, concepts.png, panels.png. --resume auto continues.
"""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import engine.threads  # noqa: E402, F401  before torch

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor, nn  # noqa: E402

import models  # noqa: E402
import transferability.knowledge as kn  # noqa: E402
from engine import errors, optimise  # noqa: E402
from engine.data import first_images, labelled_part, load_data  # noqa: E402
from engine.device import autocast, refuse_fp16, setup  # noqa: E402
from engine.errors import NonFinite, UserError, user_errors  # noqa: E402
from engine.evaluate import evaluate  # noqa: E402
from engine.flags import (  # noqa: E402
    add_common_flags,
    any_number,
    positive_float,
    positive_int,
    refuse_given,
    whole_number,
)
from engine.ka_tools import UNREAD, refuse_processes  # noqa: E402
from engine.parser import Parser  # noqa: E402
from engine.recipe import forget, load_checkpoint, math_args, resume_point  # noqa: E402
from engine.record import (
    Record,
    class_names_of,
    fingerprint,
    output_folder,
    provenance,
    save_checkpoint,
    write_atomic,
    write_json,
)  # noqa: E402
from engine.session import Log, StopAfterEpoch, progress_bar  # noqa: E402
from engine.teachers import load_teacher  # noqa: E402
from report.plot import pyplot  # noqa: E402

WAYS = ('labels', 'distilled')
CHECKPOINTS = [0, 2, 5, 10, 15, 20, 25, 30, 40, 50, 70, 90, 110, 130, 150]
NOISE = ('checkpoints', 'probes', 'grid', 'lam', 'noise_steps', 'noise_lr', 'noise_batch', 'goal')


def parse_args():
    parser = Parser(__doc__)
    # fmt: off
    flag = parser.add_argument_group('networks').add_argument
    flag('--t_name', required=True, metavar='NAME', help=f'teacher: {models.NAMES}')
    flag('--t_model', required=True, metavar='FILE', help="the teacher's checkpoint")
    flag('--s_name', required=True, metavar='NAME', help='student, with a last map of the same shape')
    flag('--checkpoints', type=whole_number, nargs='+', default=CHECKPOINTS, metavar='E',
         help=f'epochs whose weights are looked at, those up to --epochs; default {CHECKPOINTS}')
    flag = parser.add_argument_group('concepts').add_argument
    flag('--probes', type=positive_int, default=50, metavar='N', help='test images, default 50')
    flag('--grid', type=positive_int, default=8, metavar='N', help='cells a side; default 8, for 32 pixels')
    flag('--lam', type=positive_float, default=6.0, help='what entropy is worth, default 6')
    flag('--noise_steps', type=positive_int, default=80, help='of the search for the noise, default 80')
    flag('--noise_lr', type=positive_float, default=1e-4, help='its learning rate, default 0.0001')
    flag('--noise_batch', type=positive_int, default=128, help='noisy images a step, default 128')
    flag('--goal', type=any_number, default=-2.8,
         help='mean entropy at which networks are compared, default -2.8')
    flag('--threshold', type=positive_float, default=0.2, help='of a concept, in nats; default 0.2')
    flag('--settled', type=whole_number, default=40, metavar='E',
         help='first epoch whose checkpoints say which images count; default 40; or the last, if earlier')
    flag('--test_images', type=positive_int, metavar='N', help='accuracy on N test images only')
    # fmt: on
    add_common_flags(parser, epochs=150)
    return parser.parse_args()


def main():
    args = parse_args()
    refuse_processes()
    args.checkpoints = sorted({e for e in args.checkpoints if e <= args.epochs})
    if len(args.checkpoints) < 2:
        raise UserError(f'--checkpoints: two or more must lie within {args.epochs} epochs')
    foreground = kn.central_square(args.grid, args.grid)
    if foreground.all():
        raise UserError(f'--grid {args.grid}: no cell is left outside the foreground; take 6 or more')
    refuse_given(args, {'val_split': 0.0, 'compile': False, 'tensorboard': False, 'save_every': 1}, UNREAD)
    refuse_fp16(args)
    device = setup(args)
    amp = autocast(device, args.amp)
    name = f'knowledge-{args.data_name.replace(":", "")}-{args.s_name}-s{args.seed}'
    folder = output_folder(Path(args.save_root) / (args.note or name))
    log = Log(folder)
    train, _, test = load_data(args, device, log)
    train = labelled_part(train)
    if not hasattr(test, 'images'):
        raise UserError('--data_name folder: not here, images in memory only')
    measured_on = test
    if args.test_images:
        measured_on = first_images(test, args.test_images, args.data_name)
    with user_errors():
        teacher = models.build_for(args.t_model, args.t_name, train.num_classes)
        torch.manual_seed(args.seed)
        start = models.build(args.s_name, train.num_classes)
    measured = load_teacher(teacher, args.t_model, measured_on, amp)
    log(f'teacher {args.t_name}: top-1 {measured["top1"]:.2f} on {len(measured_on)} test images')
    shapes = [
        tuple(map_of(net.eval().to(device), test.crops(*one(test)))[0].shape) for net in (start, teacher)
    ]
    if shapes[0] != shapes[1]:
        raise UserError(f'--s_name {args.s_name}: its last map is {shapes[0]}, the teacher has {shapes[1]}')
    origin = provenance(device) | class_names_of(train)
    recipe = math_args(args, script='knowledge', student=args.s_name, teacher=fingerprint(teacher),
                       checkpoints=args.checkpoints, test_images=args.test_images)  # fmt: skip
    torch.manual_seed(args.seed)
    initial = {k: v.clone() for k, v in models.build(args.s_name, train.num_classes).state_dict().items()}
    stop = StopAfterEpoch()
    bar = progress_bar(2 * args.epochs * train.steps(args.batch_size), 0, log)

    # -------------------------------------------------------------------------------- the two trainings
    records = {}
    for way in WAYS:  # and what was found of them
        forget(args.resume, folder / way)
    for path in (folder / 'noise').glob('*.pt') if args.resume == 'never' else ():
        path.unlink()
    for way in WAYS:
        net = models.build(args.s_name, train.num_classes)
        net.load_state_dict(initial)
        net.to(device, memory_format=torch.channels_last)
        layer = last_convolution(net)
        length = float(layer.weight.detach().norm())
        opt = optimise.sgd(net.parameters(), args)
        record = Record(folder / way, {'net': net, 'opt': opt}, recipe | {'way': way}, dict(origin), 'test')
        point = resume_point(args.resume, folder / way)
        record.resume(point)
        for file in point.parent.glob('epoch*.pt') if point else ():  # the run may move to another folder
            if not (folder / way / file.name).exists():
                write_atomic(folder / way / file.name, file.read_bytes())
        record.begin(args.resume)
        records[way] = record
        bar.update(record.epoch * train.steps(args.batch_size))
        keep(folder / way, net, record.epoch, args)
        for epoch in range(record.epoch, args.epochs):
            started = time.time()
            row = {'epoch': epoch + 1} | one_epoch(
                net, teacher, way, opt, layer, train, args, epoch, amp, bar
            )
            row['path'] /= length
            tested = evaluate(judged(net, teacher, way), measured_on, amp)
            row |= {'test_top1': tested['top1'], 'test_top5': tested['top5']}
            keep(folder / way, net, epoch + 1, args)
            record.epoch_done(row | {'seconds': time.time() - started})
            log('{} {}/{}  loss {loss:.4f}  test {test_top1:.2f}'.format(way, epoch + 1, args.epochs, **row))
            if stop.signal:
                log(f'stopped after epoch {epoch + 1} ({way}); --resume auto continues')
                return 128 + stop.signal
    bar.close()

    # ------------------------------------------------------------------------------- what the layer keeps
    side = test.images.shape[1]
    order = torch.randperm(len(test), generator=torch.Generator().manual_seed(args.seed))
    index = order[: args.probes].to(device)
    images = test.images[index].permute(0, 3, 1, 2).float() / 255
    noise = output_folder(folder / 'noise')
    settings = recipe | {key: getattr(args, key) for key in NOISE}
    sigmas = {way: [] for way in WAYS}
    for way in WAYS:
        for epoch in args.checkpoints:
            path = noise / f'{way}-{epoch}.pt'
            if path.exists() and args.resume == 'auto':
                sigmas[way].append(load_checkpoint(path, settings)['sigma'])
                continue
            started = time.time()
            net = models.build(args.s_name, train.num_classes)
            with user_errors():
                models.load_weights(net, folder / way / f'epoch{epoch}.pt')
            net.to(device).eval().requires_grad_(False)
            sigma = torch.stack([scales(net, test, img, args, k) for k, img in enumerate(images)]).cpu()
            save_checkpoint(path, {'epoch': epoch, 'args': settings, 'sigma': sigma})
            sigmas[way].append(sigma)
            log(f'{way}, epoch {epoch}: mean entropy {float(kn.entropy(sigma).nanmean()):.3f}, '
                f'{time.time() - started:.0f} s')  # fmt: skip
            if stop.signal:
                log('stopped; --resume auto continues')
                return 128 + stop.signal
    sigmas = {way: torch.stack(made, dim=1) for way, made in sigmas.items()}

    # -------------------------------------------------------------------------------------------- numbers
    settled = [m for m, e in enumerate(args.checkpoints) if e >= args.settled] or [-1]
    seen = [torch.isfinite(s).flatten(1).all(dim=1) for s in sigmas.values()]
    usable = [kn.effective(s[:, settled], foreground) for s in sigmas.values()]
    chosen = torch.stack([*seen, *usable]).all(dim=0)
    log(f'{int(chosen.sum())} of {len(images)} images count')
    if not chosen.any():
        raise UserError(f'--probes {args.probes}: none of the images counts; take more, or a longer training')
    facts, found = {}, {}
    for way in WAYS:
        path = [0.0, *(row['path'] for row in records[way].history)]
        found[way] = kn.concepts(sigmas[way][chosen], foreground, args.threshold)
        far = kn.distances(path, args.checkpoints)
        numbers = {k: v if v == v else None for k, v in kn.metrics(found[way], far).items()}  # NaN: none
        facts[way] = {
            'top1': records[way].history[-1]['test_top1'], **numbers,
            'counts_fore': found[way]['fore'].cpu().double().mean(dim=0).tolist(),
            'counts_back': found[way]['back'].cpu().double().mean(dim=0).tolist(),
            'background': found[way]['background'].tolist(), 'distance': far.tolist(),
        }  # fmt: skip
        log(f'{way}: ' + ', '.join(f'{k} {v:.3f}' for k, v in numbers.items() if v is not None))
    result = {
        'script': 'knowledge', 'data': args.data_name, 'teacher': args.t_name, 'student': args.s_name,
        'teacher_top1': measured['top1'], 'seed': args.seed, 'epochs': args.epochs,
        'checkpoints': args.checkpoints, 'train_images': len(train),
        'test_images': len(measured_on), 'images': len(images), 'images_that_count': int(chosen.sum()),
        'side': side, 'foreground_cells': int(foreground.sum()), 'threshold': args.threshold,
        'settled': args.settled, **facts, 'recipe': settings, **records['labels'].origin,
    }  # fmt: skip
    write_json(folder / 'results.json', result)
    draw(result, images[chosen.to(device)].cpu(), {w: s[chosen] for w, s in sigmas.items()}, folder, log)


def one(test) -> tuple[Tensor, Tensor, Tensor]:
    """The first image, as it is, for crops."""
    first = torch.zeros(1, dtype=torch.int64, device=test.device)
    return first, torch.full((1, 2), 4, device=test.device), first


def map_of(net: nn.Module, img: Tensor) -> Tensor:
    return net(img, True).pres[-1]


def last_convolution(net: nn.Module) -> nn.Conv2d:
    """The last one that is larger than 1x1 (shortcuts are not), else the last."""
    every = [m for m in net.modules() if isinstance(m, nn.Conv2d)]
    return ([m for m in every if m.kernel_size != (1, 1)] or every)[-1]


def keep(folder: Path, net: nn.Module, epoch: int, args) -> None:
    """Plain weights of the epochs that are looked at."""
    if epoch in args.checkpoints:
        save_checkpoint(folder / f'epoch{epoch}.pt', dict(net.state_dict()))


def judged(net: nn.Module, teacher: nn.Module, way: str) -> nn.Module:
    """What is measured: a distilled body has no classifier of its own, but the teacher's fits."""
    return net if way == 'labels' else Borrowed(net, teacher)


class Borrowed(nn.Module):
    """A body with another network's classifier."""

    def __init__(self, net: nn.Module, teacher: nn.Module) -> None:
        super().__init__()
        self.net, self.fc = net, teacher.classifier_layer()

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.net(x, True).feat)


def one_epoch(net, teacher, way: str, opt, layer, train, args, epoch: int, amp, bar) -> dict[str, float]:
    """path: how far the weights of the layer went, step by step."""
    net.train()
    torch.manual_seed(args.seed * 1_000_003 + epoch)  # dropout, if it has any
    total = path = n = 0
    steps = train.steps(args.batch_size)
    for number, (img, target, *_) in enumerate(train.train_batches(args.batch_size, args.seed, epoch)):
        optimise.set_learning_rate(opt, optimise.learning_rate(args, epoch + (number + 0.5) / steps))
        with amp():
            seen = net(img, True)
        if way == 'labels':
            loss = F.cross_entropy(seen.out.float(), target)
        else:
            with torch.no_grad(), amp():
                wanted = map_of(teacher, img).float()
            loss = F.mse_loss(seen.pres[-1].float(), wanted)
        if not torch.isfinite(loss):
            raise NonFinite(f'{way}: the loss is not finite in epoch {epoch + 1}')
        opt.zero_grad(set_to_none=True)
        loss.backward()
        before = layer.weight.detach().clone()
        opt.step()
        path += float((layer.weight.detach() - before).norm())
        total, n = total + float(loss.detach()) * len(img), n + len(img)
        bar.update()
    return {'loss': total / n, 'path': path}


def scales(net: nn.Module, test, img: Tensor, args, number: int) -> Tensor:
    """(grid, grid): the noise that the cells of an image bear; NaN where the layer does not see the image.

    The noise depends on the seed and the image alone: the same for every checkpoint of both trainings.
    """
    mean, std = (torch.tensor(x, device=img.device)[:, None, None] for x in (test.mean, test.std))
    generator = torch.Generator().manual_seed(args.seed * 1_000_003 + number)
    with user_errors():
        sigma = kn.discard_entropy(
            lambda x: map_of(net, (x - mean) / std), img, args.grid, args.lam, args.noise_steps,
            args.noise_lr, args.noise_batch, args.goal, generator,
        )  # fmt: skip
    return torch.full((args.grid, args.grid), torch.nan, device=img.device) if sigma is None else sigma


def draw(result: dict, images: Tensor, sigmas: dict[str, Tensor], folder: Path, log) -> None:
    """concepts.png: how many there are at each checkpoint. panels.png: entropy maps of a few images."""
    if not (plt := pyplot('no figures:', log)):
        return
    epochs = result['checkpoints']
    fig, axis = plt.subplots(figsize=(6.4, 4), layout='constrained')
    for way, colour in zip(WAYS, plt.get_cmap('tab10').colors):
        axis.plot(epochs, result[way]['counts_fore'], color=colour, marker='o', label=f'{way}, foreground')
        axis.plot(epochs, result[way]['counts_back'], color=colour, marker='o', linestyle=':', markersize=4,
                  label=f'{way}, background')  # fmt: skip
    axis.set(xlabel='epoch', ylabel='visual concepts per image', ylim=(0, None))
    axis.set_title(f'{result["student"]}, {result["images_that_count"]} images', fontsize=11)
    axis.grid(alpha=0.3)
    axis.legend(frameon=False, fontsize=9)
    fig.savefig(folder / 'concepts.png', dpi=130)
    plt.close(fig)

    rows, shown = min(len(images), 4), list(range(len(epochs)))[-4:]
    across = 1 + 2 * len(shown)
    fig, axes = plt.subplots(
        rows, across, figsize=(1.15 * across, 1.15 * rows + 0.7), squeeze=False, layout='constrained'
    )
    maps = torch.stack([kn.entropy(sigmas[way][:rows, shown]) for way in WAYS], dim=1).flatten(1, 2)
    span = {'vmin': float(maps.min()), 'vmax': float(maps.max())}
    titles = [f'{way}\nepoch {epochs[m]}' for way in WAYS for m in shown]
    for row, (line, img) in enumerate(zip(axes, images)):
        line[0].imshow(img.permute(1, 2, 0).numpy())
        for axis, h, title in zip(line[1:], maps[row], titles):
            picture = axis.imshow(h.numpy(), cmap='hot', **span)
            if row == 0:
                axis.set_title(title, fontsize=7)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    bar = fig.colorbar(picture, ax=axes, shrink=0.8, aspect=30)
    bar.set_label('entropy; dark: kept, bright: discarded', fontsize=7)
    bar.ax.tick_params(labelsize=7)
    fig.savefig(folder / 'panels.png', dpi=150)
    plt.close(fig)
    log(f'figures: {folder / "concepts.png"}, {folder / "panels.png"}')


if __name__ == '__main__':
    errors.run(main)
