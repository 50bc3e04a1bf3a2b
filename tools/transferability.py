"""Which of these trained networks should a new task start from? Every metric, and how the networks rank.

    python tools/transferability.py 'save/*/net.pt' --data_name cifar10 --classes 5-9
    python tools/transferability.py torchvision:resnet18=r18.pth resnet56=r56.pth@cifar100 --data_name folder
    python tools/transferability.py 'save/*/net.pt' --data_name cifar10 --train 20 --out save/ranking

The networks look at training images of the task once; metrics (transferability/) are worked out from what
they say. A number in brackets is the rank, 1 is best. --train N then trains a classifier on each, for N
epochs, and compares the rankings with its accuracy on test images: Kendall's tau, and the tau that weighs the
top of the ranking more (S. Vigna, WWW 2015). With --out FOLDER: table.txt and ranking.json.
"""

import math
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import engine.threads  # noqa: E402, F401  before torch

import scipy.stats  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor, nn  # noqa: E402

import dataset  # noqa: E402
import models  # noqa: E402
import transferability as tr  # noqa: E402
from engine import errors  # noqa: E402
from engine.data import labelled_part, read_data  # noqa: E402
from engine.device import autocast, refuse_fp16, setup  # noqa: E402
from engine.errors import UserError, user_errors  # noqa: E402
from engine.evaluate import evaluate  # noqa: E402
from engine.flags import (  # noqa: E402
    add_data_flags,
    add_machine_flags,
    positive_float,
    positive_int,
    refuse_given,
    seed_number,
)
from engine.ka_tools import refuse_non_finite  # noqa: E402
from engine.parser import Parser  # noqa: E402
from engine.record import output_folder, provenance, write_atomic, write_json  # noqa: E402
from engine.sources import HELP, Seen, Source, look, probe_images, read_sources, some  # noqa: E402

# from what a network says of the task's images; higher is better for all
METRICS = {
    'leep': lambda s: tr.leep(s.out.softmax(1), s.target),
    'nce': lambda s: tr.nce(s.out.argmax(1), s.target),
    'nleep': lambda s: tr.nleep(s.feat, s.target),
    'logme': lambda s: tr.logme(s.feat, s.target),
    'h_score': lambda s: tr.h_score(s.feat, s.target),
    'h_score_reg': lambda s: tr.h_score(s.feat, s.target, regularized=True),
    'transrate': lambda s: tr.transrate(s.feat, s.target),
    'gbc': lambda s: tr.gbc(s.feat, s.target),
    'sfda': lambda s: tr.sfda(s.feat, s.target),
}
OF_LOGITS = ('leep', 'nce')


def parse_args():
    parser = Parser(__doc__)
    parser.add_argument('networks', nargs='+', metavar='NETWORK', help=HELP)
    # fmt: off
    flag = parser.add_argument_group('the task').add_argument
    flag('--classes', metavar='LIST', help='of the data only these, e.g. 5-9; default all')
    flag('--images', type=positive_int, default=2000, metavar='N',
         help='training images that the metrics (and --train) see, default 2000')
    flag('--test_images', type=positive_int, metavar='N', help='test images for --train; default all')
    flag('--target', metavar='NETWORK',
         help='a network that was trained for the task, or for a like one: also rank by attribution maps')
    flag('--probes', type=positive_int, default=200, metavar='N', help='images for --target, default 200')
    flag = parser.add_argument_group('what really happens').add_argument
    flag('--train', type=positive_int, metavar='N', help='train a classifier on every network, N epochs')
    flag('--tune', choices=('head', 'all'), default='head',
         help='head: on the frozen embeddings; all: the whole network, with crops and flips; default head')
    flag('--tune_lr', type=positive_float, help='default 0.01 (head: Adam; all: SGD); falls linearly to 0')
    flag('--seed', type=seed_number, default=2, help='of images and batches, default 2')
    flag('--out', metavar='FOLDER', help='also write table.txt and ranking.json')
    # fmt: on
    add_data_flags(parser)
    add_machine_flags(parser)
    return parser.parse_args()


# ------------------------------------------------------------------------------------- what really happens


def train_head(seen: Seen, test: Seen, epochs: int, lr: float, seed: int) -> float:
    """Top-1 on test images of a linear classifier on standardised embeddings."""
    mean, std = seen.feat.mean(dim=0), seen.feat.std(dim=0, correction=0)
    x, x_test = ((s.feat - mean) / std.clamp(min=1e-6) for s in (seen, test))
    head = nn.Linear(x.shape[1], int(seen.target.max()) + 1).to(x.device)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    opt = torch.optim.Adam(head.parameters(), lr)
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(len(x), generator=generator).to(x.device).split(64) for _ in range(epochs)]
    steps = [index for order in orders for index in order]
    for k, index in enumerate(steps):
        opt.param_groups[0]['lr'] = lr * (1 - k / len(steps))
        loss = F.cross_entropy(head(x[index]), seen.target[index])
        opt.zero_grad()
        loss.backward()
        opt.step()
    with torch.no_grad():
        return 100 * float((head(x_test).argmax(1) == test.target).cpu().double().mean())


def train_all(source: Source, train, test, args, lr: float, amp) -> float:
    """Top-1 on test images of the whole network with a new classifier, after args.train epochs."""
    torch.manual_seed(args.seed)
    with user_errors():
        net = models.narrowed(models.build(source.net, train.num_classes), source.file)
        models.load_weights(net, source.file, new_head=True)
    net.to(train.device, memory_format=torch.channels_last).train()
    opt = torch.optim.SGD(net.parameters(), lr, momentum=0.9, nesterov=True, weight_decay=1e-4)
    steps, done = args.train * train.steps(64), 0
    for epoch in range(args.train):
        for img, target, *_ in train.train_batches(64, args.seed, epoch):
            opt.param_groups[0]['lr'] = lr * (1 - done / steps)
            with amp():
                out = net(source.seen_by(img, args.data_name, (train.mean, train.std)))
            loss = F.cross_entropy(out.float(), target)
            refuse_non_finite(loss, f'{source.name}, epoch {epoch + 1} (--tune_lr)')
            opt.zero_grad()
            loss.backward()
            opt.step()
            done += 1
    return evaluate(_Normalised(net, source, args.data_name, (test.mean, test.std)), test, amp)['top1']


class _Normalised(nn.Module):
    """A network that is given images as another data set normalises them."""

    def __init__(self, net: nn.Module, source: Source, data: str, scale: tuple) -> None:
        super().__init__()
        self.net, self.source, self.data, self.scale = net, source, data, scale

    def forward(self, img: Tensor) -> Tensor:
        return self.net(self.source.seen_by(img, self.data, self.scale))


# ------------------------------------------------------------------------------------------------ rankings


def ranks(values: list[float | None]) -> list[int | None]:
    """1 for the highest; equal values share the better rank; None has none."""
    there = sorted((v for v in values if v is not None), reverse=True)
    return [None if v is None else there.index(v) + 1 for v in values]


def agreement(scores: list[float | None], accuracy: list[float]) -> dict[str, float | None]:
    """Kendall's tau and weighted tau of a metric with what happened."""
    pairs = [(s, a) for s, a in zip(scores, accuracy) if s is not None]
    if len(pairs) < 3:
        return {'kendall': None, 'weighted': None}
    found = {
        'kendall': scipy.stats.kendalltau(*zip(*pairs)),
        'weighted': scipy.stats.weightedtau(*zip(*pairs)),
    }
    return {name: finite(float(tau.statistic)) for name, tau in found.items()}


def finite(x: float) -> float | None:
    return x if math.isfinite(x) else None


def table(rows: list[dict], columns: list[str]) -> str:
    """A line per network, best mean rank first."""
    width = max(len('network'), *(len(r['name']) for r in rows))
    lines = [f'{"network":{width}}' + ''.join(f'{c:>16}' for c in columns)]
    for r in sorted(rows, key=lambda r: r['mean_rank']):
        cells = []
        for c in columns:
            value, rank = (
                (r['accuracy'], r['accuracy_rank']) if c == 'accuracy' else (r['metrics'][c], r['ranks'][c])
            )
            cells.append('-' if value is None else f'{value:.4g} ({rank})')
        lines.append(f'{r["name"]:{width}}' + ''.join(f'{cell:>16}' for cell in cells))
    return '\n'.join(lines)


def _place(tau: float | None) -> tuple:
    """Largest first, None last."""
    return (tau is None, -(tau or 0))


def agreement_table(found: dict[str, dict]) -> str:
    lines = []
    for group, metrics in found.items():
        lines += [
            '',
            f'rank correlation with the accuracy, {group}',
            f'{"":14}{"Kendall":>10}{"weighted":>10}',
        ]
        for name, tau in sorted(metrics.items(), key=lambda item: _place(item[1]['weighted'])):
            cells = ['-' if x is None else f'{x:.3f}' for x in (tau['kendall'], tau['weighted'])]
            lines.append(f'{name:14}{cells[0]:>10}{cells[1]:>10}')
    return '\n'.join(lines)


def main():
    args = parse_args()
    if not args.train:
        unread = {'tune': 'head', 'tune_lr': None, 'test_images': None}
        refuse_given(args, unread, 'nothing is trained or tested without --train')
    if not args.target:
        refuse_given(args, {'probes': 200}, 'no maps are compared without --target')
    if args.train and args.tune == 'all':
        refuse_fp16(args)
    device = setup(args)
    folder = output_folder(Path(args.out)) if args.out else None
    amp = autocast(device, args.amp)
    sources = read_sources(args.networks, args.data_name)
    goal = read_sources([args.target], args.data_name)[0] if args.target else None
    train, test = read_data(args, device)
    own_images = train.digest() if dataset.owned(args.data_name) else None
    train = labelled_part(train)
    classes = None
    with user_errors():
        if args.classes:
            classes = dataset.read_classes(args.classes, train.num_classes)
            train, test = (dataset.take_classes(data, classes) for data in (train, test))
    train, test = some(train, args.images, args.seed), some(test, args.test_images, args.seed)
    here, K = len(train.targets.unique()), train.num_classes
    if K < 2:
        which = f'--classes {args.classes}' if args.classes else f'--data_name {args.data_name}'
        raise UserError(f'{which}: a task has two classes or more')
    if here < K:
        raise UserError(f'--images {args.images}: {here} of {K} classes are among them, take more --images')

    wanted, metrics = None, dict(METRICS)
    if goal:
        probes = some(train, args.probes, args.seed)
        img = probe_images(probes)

        def attribution(source: Source, net: nn.Module) -> tuple[Tensor, Tensor]:
            own = source.seen_by(img, args.data_name, (train.mean, train.std))
            with torch.no_grad():
                feat = net(own, True).feat.flatten(1)
            return tr.attribution_map(lambda x: net(x, True).feat.flatten(1), own), feat

        wanted = attribution(goal, goal.load(device))
        metrics['attribution'] = lambda s: tr.attribution_similarity(s.extra['maps'][0], wanted[0])
        metrics['depara'] = lambda s: tr.depara(*s.extra['maps'], *wanted)

    rows, lr = [], args.tune_lr or 0.01
    for number, source in enumerate(sources, 1):
        net = source.load(device)
        seen = look(net, source, train, args.data_name, amp)
        if goal:
            seen.extra['maps'] = attribution(source, net)
        saw = source.saw(args.data_name, classes, own_images)
        row = source.facts() | {'width': seen.feat.shape[1], 'seen': saw}
        row |= {'metrics': {}, 'seconds': {}}
        for name, metric in metrics.items():
            started = time.process_time()
            with user_errors():
                blind = source.headless and name in OF_LOGITS
                row['metrics'][name] = None if blind else finite(metric(seen))
            row['seconds'][name] = round(time.process_time() - started, 3)
        if args.train and args.tune == 'head':
            seen_test = look(net, source, test, args.data_name, amp)
            row['accuracy'] = train_head(seen, seen_test, args.train, lr, args.seed)
        elif args.train:
            row['accuracy'] = train_all(source, train, test, args, lr, amp)
        rows.append(row)
        said = f', accuracy {row["accuracy"]:.2f}' if args.train else ''
        print(f'{number}/{len(sources)} {source.name}{said}', file=sys.stderr, flush=True)

    for name in metrics:
        for row, rank in zip(rows, ranks([r['metrics'][name] for r in rows])):
            row.setdefault('ranks', {})[name] = rank
    for row in rows:
        there = [rank for rank in row['ranks'].values() if rank is not None]
        row['mean_rank'] = sum(there) / len(there) if there else float(len(rows))
    columns, found = list(metrics), {}
    if args.train:
        for row, rank in zip(rows, ranks([r['accuracy'] for r in rows])):
            row['accuracy_rank'] = rank
        columns.append('accuracy')
        groups = {
            'all networks': rows,
            'networks that saw none of the classes': [r for r in rows if r['seen'] is False],
        }
        for group, members in groups.items():
            if len(members) >= 3 and (group == 'all networks' or len(members) < len(rows)):
                accuracy = [r['accuracy'] for r in members]
                found[group] = {
                    m: agreement([r['metrics'][m] for r in members], accuracy) | {'networks': len(members)}
                    for m in metrics
                }
    text = table(rows, columns) + ('\n' + agreement_table(found) if found else '')
    print(text)
    if folder:
        facts = {'script': 'transferability', 'data': args.data_name, 'classes': classes, 'seed': args.seed}
        facts |= {'images': len(train), 'test_images': len(test), 'train': args.train, 'tune': args.tune}
        facts |= {'tune_lr': lr, 'target': goal and goal.name, 'probes': args.probes, 'networks': rows}
        write_json(folder / 'ranking.json', facts | {'correlation': found} | provenance(device))
        write_atomic(folder / 'table.txt', (text + '\n').encode())


if __name__ == '__main__':
    errors.run(main)
