"""Distil a teacher into a tree with a head per class, and draw the tree: which classes share what.

    python tools/kdexplainer.py --t_name resnet56 --t_model save/teacher/net.pt --data_name cifar10

Two stages (models/kdexplainer.py has the network, kd_losses/st.py the loss):

    1. search    blocks and branches learn together; the branches harden while the temperature falls
    2. tree      the branches are frozen, all weights start afresh and learn the same loss again

The loss of both is 0.1 * cross-entropy + 0.9 * soft targets at temperature 4. The temperature of the search
is 10 / e in epoch e of the authors' 300; shorter searches run through the same temperatures faster.

Writes to SAVE_ROOT/NOTE: log.txt, search/ and tree/ (last.pt, best.pt, metrics.csv, results.json, net.pt),
results.json (the tree, the groups of classes, accuracies), tree.png. --resume auto continues.
"""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import engine.threads  # noqa: E402, F401  before torch

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

import models  # noqa: E402
from engine import errors  # noqa: E402
from engine.data import first_images, labelled_part, read_data, which_images  # noqa: E402
from engine.device import autocast, refuse_fp16, setup  # noqa: E402
from engine.errors import NonFinite, UserError, user_errors  # noqa: E402
from engine.evaluate import evaluate  # noqa: E402
from engine.flags import (  # noqa: E402
    add_data_flags,
    add_machine_flags,
    add_place_flags,
    fraction,
    positive_float,
    positive_int,
    seed_number,
)
from engine.parser import Parser  # noqa: E402
from engine.recipe import forget, resume_point  # noqa: E402
from engine.record import Record, class_names_of, fingerprint, output_folder, provenance, write_json  # noqa: E402
from engine.session import Log, StopAfterEpoch, progress_bar  # noqa: E402
from engine.teachers import load_teacher  # noqa: E402
from kd_losses.st import SoftTarget  # noqa: E402
from models.kdexplainer import KDExplainer  # noqa: E402
from report.plot import pyplot  # noqa: E402

EPOCHS = 300  # the authors', for the temperature


def parse_args():
    parser = Parser(__doc__)
    # fmt: off
    flag = parser.add_argument_group('the tree').add_argument
    flag('--t_name', required=True, metavar='NAME', help=f'teacher: {models.NAMES}')
    flag('--t_model', required=True, metavar='FILE', help="the teacher's checkpoint")
    flag('--blocks', type=positive_int, nargs='+', default=[2, 4, 8], metavar='N',
         help='of the levels, from the image to the heads; default 2 4 8')
    flag('--width', type=positive_int, default=64, help='channels of the blocks, default 64')
    flag('--last', type=positive_int, default=32, help='channels of the last level, default 32')
    flag('--head', choices=('ce', 'nce'), default='ce',
         help='logits of a head; ce: one; nce: two, of which the larger counts; default ce')
    flag = parser.add_argument_group('training').add_argument
    flag('--epochs', type=positive_int, default=EPOCHS, help=f'of the search, default {EPOCHS}')
    flag('--tree_epochs', type=positive_int, metavar='E', help='of the frozen tree; default: --epochs')
    flag('--batch_size', type=positive_int, default=128, help='default 128')
    flag('--lr_search', type=positive_float, default=0.05, help="Adam's, of the weights; default 0.05")
    flag('--lr_route', type=positive_float, default=0.01, help="Adam's, of the branches; default 0.01")
    flag('--lr_tree', type=positive_float, default=0.05, help="SGD's, of the frozen tree; default 0.05")
    flag('--momentum', type=fraction, default=0.9, help='of SGD, default 0.9')
    flag('--weight_decay', type=fraction, default=5e-4, help='of both, default 0.0005')
    flag('--ce', type=fraction, default=0.1,
         help='weight of cross-entropy, the rest is that of the soft targets; default 0.1')
    flag('--T', type=positive_float, default=4.0, help='temperature of the soft targets, default 4')
    flag('--images', type=positive_int, metavar='N', help='train on N images only, chosen by the seed')
    flag('--test_images', type=positive_int, metavar='N', help='measure on N test images only')
    flag('--seed', type=seed_number, default=2, help='of weights and batches, default 2')
    # fmt: on
    add_data_flags(parser)
    add_machine_flags(parser)
    add_place_flags(parser)
    return parser.parse_args()


def main():
    args = parse_args()
    args.tree_epochs = args.tree_epochs or args.epochs
    refuse_fp16(args)
    device = setup(args)
    amp = autocast(device, args.amp)
    name = f'kdexplainer-{args.data_name.replace(":", "")}-s{args.seed}'
    folder = output_folder(Path(args.save_root) / (args.note or name))
    log = Log(folder)
    train, test = read_data(args, device)
    images = which_images(args, train)
    train = labelled_part(train)
    with user_errors():
        teacher = models.build_for(args.t_model, args.t_name, train.num_classes)
    if args.images:
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(args.seed))
        train = train.subset(order[: args.images].to(device))
    if args.test_images:
        test = first_images(test, args.test_images, args.data_name)
    measured = load_teacher(teacher, args.t_model, test, amp)
    log(f'teacher {args.t_name}: top-1 {measured["top1"]:.2f} on {len(test)} test images')
    if args.batch_size > len(train):
        raise UserError(f'--batch_size {args.batch_size}: there are {len(train)} training images only')

    recipe = {key: getattr(args, key) for key in (
        'blocks', 'width', 'last', 'head', 'epochs', 'tree_epochs', 'batch_size', 'lr_search', 'lr_route',
        'lr_tree', 'momentum', 'weight_decay', 'ce', 'T', 'images', 'test_images', 'seed', 'data_name', 'amp',
    )}  # fmt: skip
    recipe |= {'script': 'kdexplainer', 'teacher': fingerprint(teacher), **images}
    origin = provenance(device) | class_names_of(train)
    torch.manual_seed(args.seed)
    with user_errors():
        net = KDExplainer(train.num_classes, tuple(args.blocks), args.width, args.last, args.head)
    side = test.images.shape[1] if hasattr(test, 'images') else args.image_size
    if side < 2 ** len(args.blocks):
        raise UserError(f'--blocks: {len(args.blocks)} levels halve images of {side} pixels too often')
    net = net.to(device, memory_format=torch.channels_last)
    facts = {'script': 'kdexplainer', 'data': args.data_name, 'teacher': args.t_name, 'seed': args.seed}
    stop = StopAfterEpoch()
    bar = progress_bar(train.steps(args.batch_size) * (args.epochs + args.tree_epochs), 0, log)

    stages = (('search', args.epochs), ('tree', args.tree_epochs))
    records = {}
    for stage, _ in stages:
        forget(args.resume, folder / stage)
    for stage, epochs in stages:
        if stage == 'tree':
            net.freeze()
            torch.manual_seed(args.seed + 1)
            net.fresh()
        opt = optimiser(stage, net, args)
        own = recipe | ({'stage': stage} if stage == 'tree' else {})  # older searches have none in theirs
        record = Record(folder / stage, {'net': net, 'opt': opt}, own, dict(origin), 'test')
        record.resume(resume_point(args.resume, folder / stage))
        record.begin(args.resume)
        records[stage] = record
        bar.update(train.steps(args.batch_size) * record.epoch)
        log(f'{stage}: {record.epoch} of {epochs} epochs done')
        for epoch in range(record.epoch, epochs):
            started = time.time()
            if stage == 'search':
                net.temperature = 10 / ((epoch + 1) * EPOCHS / epochs)
            count = epoch if stage == 'search' else args.epochs + epoch
            row = one_epoch(net, teacher, opt, train, args, count, amp, bar)
            tested = evaluate(net, test, amp)
            row = {'epoch': epoch + 1, 'temperature': net.temperature if stage == 'search' else 0.0} | row
            row |= {'test_top1': tested['top1'], 'test_top5': tested['top5']}
            record.epoch_done(row | {'seconds': time.time() - started})
            log('{} {}/{}  loss {loss:.4f}  train {train_top1:.2f}  test {test_top1:.2f}'.format(
                stage, epoch + 1, epochs, **row))  # fmt: skip
            done = epoch + 1 == epochs and stage == 'tree'
            if stop.signal and not done:
                log(f'stopped after epoch {epoch + 1} of the {stage}; --resume auto continues')
                return 128 + stop.signal
        record.finish('net.pt', facts | {'stage': stage})
    bar.close()

    names = train.class_names or [str(k) for k in range(train.num_classes)]
    result = facts | {
        'teacher_top1': measured['top1'], 'search_top1': records['search'].history[-1]['test_top1'],
        'tree_top1': records['tree'].history[-1]['test_top1'], 'images': len(train), 'test_images': len(test),
        'parameters': parameters(net), 'tree': tree_of(net), 'groups': groups_of(net, names),
        'curves': {k: [round(row['test_top1'], 2) for row in r.history] for k, r in records.items()},
        'recipe': recipe, **records['search'].origin,
    }  # fmt: skip
    write_json(folder / 'results.json', result)
    for group in result['groups']:
        log(f'{" > ".join(group["blocks"])}: {", ".join(group["classes"])}')
    draw(result['tree'], names, folder / 'tree.png', log)
    log(f'the tree: top-1 {result["tree_top1"]:.2f} at the last epoch, {result["parameters"]} parameters')


def optimiser(stage: str, net: KDExplainer, args) -> torch.optim.Optimizer:
    weights = [*net.levels.parameters(), *net.heads.parameters()]
    if stage == 'tree':
        return torch.optim.SGD(weights, args.lr_tree, args.momentum, weight_decay=args.weight_decay)
    groups = [{'params': weights, 'lr': args.lr_search}]
    groups.append({'params': list(net.routes.parameters()), 'lr': args.lr_route})
    return torch.optim.Adam(groups, weight_decay=args.weight_decay)


def one_epoch(net, teacher, opt, train, args, count: int, amp, bar) -> dict[str, float]:
    """count: epochs before this one in both stages, from which all randomness follows."""
    torch.manual_seed(args.seed * 1_000_003 + count)  # of the dropout
    net.train()
    soft, total, hits, n = SoftTarget(args.T), 0.0, 0, 0
    for img, target, *_ in train.train_batches(args.batch_size, args.seed, count):
        with torch.no_grad(), amp():
            out_t = teacher(img)
        with amp():
            out = net(img)
        out = out.float()
        loss = args.ce * F.cross_entropy(out, target) + (1 - args.ce) * soft(out, out_t)
        if not torch.isfinite(loss):
            raise NonFinite(f'kdexplainer: the loss is not finite in epoch {count + 1}')
        opt.zero_grad(set_to_none=True)
        loss.backward()
        opt.step()
        total, n = total + float(loss.detach()) * len(img), n + len(img)
        hits += int((out.argmax(dim=1) == target).sum())
        bar.update()
    return {'loss': total / n, 'train_top1': 100 * hits / n}


# ---------------------------------------------------------------------------------------------- the tree


def parameters(net: KDExplainer) -> int:
    """Of the blocks that the tree uses, and of the heads."""
    used = net.used()
    blocks = [level[j] for level, some in zip(net.levels, used) for j in some]
    return sum(p.numel() for module in (*blocks, net.heads) for p in module.parameters())


def tree_of(net: KDExplainer) -> dict:
    """parents of every child, per level from the image on; how sure each choice was; the blocks in use."""
    return {
        'blocks': [len(level) for level in net.levels],
        'parents': [parents.tolist() for parents in net.parents],
        'sure': [[round(float(x), 4) for x in net.weights(i).max(dim=1).values]
                 for i in range(len(net.routes))],
        'used': net.used()[:-1],
    }  # fmt: skip


def groups_of(net: KDExplainer, names: list[str]) -> list[dict]:
    """The classes that share a block of the last level, with the way that leads to it."""
    made = {}
    parents = [p.tolist() for p in net.parents]
    for k, name in enumerate(names):
        way, child = [], k
        for i in reversed(range(len(parents))):
            child = parents[i][child]
            way.insert(0, f'{i + 1}.{child + 1}')
        made.setdefault(tuple(way), []).append(name)
    return [{'blocks': list(way), 'classes': classes} for way, classes in sorted(made.items())]


def draw(tree: dict, names: list[str], path: Path, log) -> None:
    """Image, blocks, classes from left to right; a line is wider the surer the choice."""
    if not (plt := pyplot('no figure:', log)):
        return
    parents, used = tree['parents'], tree['used']
    depth = len(parents)

    def way(k: int) -> tuple:
        made, child = [], k
        for level in reversed(parents):
            child = level[child]
            made.insert(0, child)
        return tuple(made)

    order = sorted(range(len(names)), key=way)
    height = [{} for _ in range(depth + 1)]
    height[depth] = {k: float(i) for i, k in enumerate(order)}
    for i in reversed(range(depth)):
        for j in used[i]:
            below = [height[i + 1][c] for c in height[i + 1] if parents[i][c] == j]
            height[i][j] = sum(below) / len(below)
    fig, axis = plt.subplots(figsize=(8, 0.42 * len(names) + 1), layout='constrained')
    colours = plt.get_cmap('tab10').colors
    last = {j: colours[i % 10] for i, j in enumerate(sorted(used[-1], key=lambda j: height[depth - 1][j]))}
    middle = sum(height[0].values()) / len(height[0])
    for y in height[0].values():
        axis.plot([0, 1], [middle, y], color='0.6', linewidth=1.5, zorder=1)
    for i in range(depth):
        for child, y in height[i + 1].items():
            j = parents[i][child]
            colour = last[j] if i == depth - 1 else last[child] if i == depth - 2 else '0.6'
            axis.plot([i + 1, i + 2], [height[i][j], y], color=colour, zorder=1,
                      linewidth=0.8 + 4 * tree['sure'][i][child])  # fmt: skip
    box = {'boxstyle': 'round', 'facecolor': 'white', 'edgecolor': '0.4'}
    axis.text(0, middle, 'image', ha='center', va='center', bbox=box)
    for i in range(depth):
        for j, y in height[i].items():
            axis.text(i + 1, y, f'{i + 1}.{j + 1}', ha='center', va='center', fontsize=9, bbox=box)
    for k, y in height[depth].items():
        axis.text(depth + 1.05, y, names[k], va='center', fontsize=10, color=last[parents[-1][k]])
    for i in range(depth):
        spare = tree['blocks'][i] - len(used[i])
        note = f'level {i + 1}' + (f'\n{spare} of {tree["blocks"][i]} unused' if spare else '')
        axis.text(i + 1, len(names) - 0.1, note, ha='center', va='bottom', fontsize=8, color='0.3')
    axis.set(xlim=(-0.4, depth + 2), ylim=(-0.7, len(names) + 0.6))
    axis.axis('off')
    fig.savefig(path, dpi=130)
    plt.close(fig)
    log(f'figure: {path}')


if __name__ == '__main__':
    errors.run(main)
