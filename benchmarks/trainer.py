"""The training loop of train_kd.py against the loop of the old zoos, in images per second.

    python -m benchmarks.trainer                all goals, about ten minutes on two cores
    python -m benchmarks.trainer T2 T4          only these
    python -m benchmarks.trainer --quick        one round

The old way (plain_loop below, our own code): images through PIL and torchvision transforms in two loader
processes, float32 and contiguous, one method per run, `.item()` at every step. Ours: images as bytes on the
device, channels_last, bfloat16 networks (float32 beside it), no read-back, several students on one teacher
forward. Both sides take turns in this run; ratio = ours / theirs in images per second, all cores, median over
rounds. Weights and images are random: only time is looked at. Writes JSON with --out FILE.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision.transforms as transforms
from PIL import Image
from torch.utils.data import DataLoader, Dataset

import models
import train_kd
from dataset import Resident
from engine import side_by_side
from engine.batch import Batch, Probe
from engine.device import autocast
from engine.evaluate import evaluate
from engine.record import provenance, save_checkpoint, write_json
from engine.stages import default_of
from engine.teachers import Teachers
from methods import METHODS

MEAN, STD = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)
EIGHT = ('logits', 'st', 'at', 'fitnet', 'nst', 'pkt', 'rkd', 'cc')
BATCH = 128


class Pictures(Dataset):
    """The same images as PIL, with the recipe's augmentation."""

    def __init__(self, images: torch.Tensor, targets: torch.Tensor) -> None:
        self.images, self.targets = [Image.fromarray(x.numpy()) for x in images], targets.tolist()
        self.transform = transforms.Compose([
            transforms.Pad(4, padding_mode='reflect'), transforms.RandomCrop(32),
            transforms.RandomHorizontalFlip(), transforms.ToTensor(), transforms.Normalize(MEAN, STD),
        ])  # fmt: skip

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int):
        return self.transform(self.images[i]), self.targets[i]


def data(n: int = 20 * BATCH, device: str | torch.device = 'cpu') -> Resident:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (n, 32, 32, 3), generator=generator, dtype=torch.uint8)
    return Resident(images, torch.randint(10, (n,), generator=generator), 10, MEAN, STD, device)


def plain_loop(method: str, teacher: str, train: Resident):
    """An endless training run, a step per next()."""
    torch.manual_seed(0)
    net_t, net_s = models.build(teacher, 10), models.build('resnet20', 10)
    net_t.requires_grad_(False).eval()
    row = METHODS[method]
    loader = DataLoader(
        Pictures(train.images, train.targets), BATCH, shuffle=True, num_workers=2, drop_last=True
    )
    img, target = next(iter(loader))
    with torch.no_grad():
        few = img[:2]
        probe = Probe(net_s(few, True), net_t(few, True), net_s, net_t, train, BATCH, 200, 10)
    stages = default_of(row)
    loss_kd = stages.build(method, row, probe, {})
    opt = torch.optim.SGD(
        [*net_s.parameters(), *loss_kd.parameters()], 0.1, 0.9, weight_decay=1e-4, nesterov=True
    )
    while True:
        for img, target in loader:
            s = net_s(img, True)
            with torch.no_grad():
                t = net_t(img, True)
            loss_ce, batch = F.cross_entropy(s.out, target), Batch(img, target, target, {})
            loss = loss_ce + row.weight * row.feed(loss_kd, stages.of(s), stages.of(t), batch)
            loss_ce.item(), loss.item()
            (s.out.argmax(dim=1) == target).float().mean().item()
            opt.zero_grad()
            loss.backward()
            opt.step()
            yield


def students_of(methods, teacher: str, train: Resident, amp: str, batch_size: int = BATCH, **flags):
    """(runs, teachers, flags) as train_kd.py has them, of untrained networks, before the first epoch.

    Two teachers where a method wants several, and a transformer on both sides where it compares tokens.
    """
    needs = [METHODS[name].needs for words in methods for name in words.split('+')]
    student = 'resnet20'
    if any(needed.tokens for needed in needs):
        student = teacher = 'vit_64_3'
    names = [teacher] * (2 if any(needed.all_teachers for needed in needs) else 1)
    words = ['--kd_mode', *methods, '--t_name', *names, '--t_model', *'-' * len(names), '--s_name', student,
             '--amp', amp, '--batch_size', str(batch_size), '--seed', '0', '--init_epochs', '0',
             '--pretrain_epochs', '0', '--resume', 'never']  # fmt: skip
    args = train_kd.parse_args(words)
    vars(args).update(flags)
    torch.manual_seed(0)
    device = train.device
    nets_t = [models.build(name, 10).requires_grad_(False).eval() for name in names]
    for net in nets_t:
        net.to(device, memory_format=torch.channels_last)
    wanted = train_kd.read_methods(args)
    views = sorted({view for parts in wanted.values() for part in parts for view in part.method.needs.views})
    img = next(train.test_batches(2))[0]
    teachers = Teachers(nets_t, autocast(device, amp), views, img)
    with tempfile.TemporaryDirectory() as folder:
        origin = {'commit': None}
        net_s = models.build(student, 10)
        runs = train_kd.build_runs(args, wanted, Path(folder), origin, net_s, teachers, train, 'test', device)
    return runs, teachers, args


def our_loop(methods, teacher: str, train: Resident, amp: str):
    """The same with the parts and in the order of train_kd.py."""
    runs, teachers, args = students_of(methods, teacher, train, amp)
    for run in runs:
        train_kd.begin_epoch(run, 0, args)
    cores = torch.get_num_threads()
    together = side_by_side.Workers(cores, 1) if cores > 1 else side_by_side.InTurn()
    epoch = 0
    while True:
        for batch in together.looks(teachers, train.train_batches(BATCH, 0, epoch)):
            together.train(train_kd.train_student, runs, batch)
            yield
        epoch += 1


def seconds(loop, steps: int) -> float:
    started = time.perf_counter()
    for _ in range(steps):
        next(loop)
    return time.perf_counter() - started


def race(
    goal: str, what: str, wanted: float, plain: list, ours, students: int, rounds: int, steps: int
) -> dict:
    """plain: loops that are run one after another; ours: one loop that trains as many students."""
    for loop in (*plain, ours):
        seconds(loop, 1)  # start of loader processes, first allocations
    ratios, rates = [], []
    for _ in range(rounds):
        theirs = sum(seconds(loop, steps) for loop in plain)
        mine = seconds(ours, steps)
        ratios.append(theirs / mine)
        rates.append(students * steps * BATCH / mine)
    return report(goal, what, statistics.median(ratios), min(ratios), max(ratios), wanted,
                  images_per_second=round(statistics.median(rates)))  # fmt: skip


def report(goal, what, value, low, high, wanted, at_most=False, **more) -> dict:
    met = value <= wanted if at_most else value >= wanted
    sign = '<=' if at_most else '>='
    print(f'{goal:4s} {what:44s} {value:6.2f}  {low:5.2f}-{high:5.2f}  {sign} {wanted:4.2f}'
          f'{"" if met else "  missed"}', flush=True)  # fmt: skip
    figures = {'value': round(value, 3), 'low': round(low, 3), 'high': round(high, 3)}
    return {'goal': goal, 'what': what, **figures, 'wanted': wanted, 'at_most': at_most, 'met': met, **more}


def pipeline(rounds: int) -> dict:
    """T1: CPU time of a batch, ours against PIL in this process."""
    train, ratios = data(8 * BATCH), []
    pictures = Pictures(train.images, train.targets)
    for epoch in range(rounds + 1):
        started = time.process_time()
        for i in range(BATCH * 4):
            pictures[i]
        theirs = (time.process_time() - started) / (BATCH * 4)
        started = time.process_time()
        for _ in train.train_batches(BATCH, 0, epoch):
            pass
        ours = (time.process_time() - started) / len(train)
        ratios.append(theirs / ours)
    ratios = ratios[1:]
    return report('T1', 'batch pipeline, CPU time', statistics.median(ratios), min(ratios), max(ratios), 8)


def loops(goals: set, rounds: int) -> list[dict]:
    """T2 to T6."""
    rows, train = [], data()
    cases = [
        ('T2', ['st'], 'resnet20', {'bf16': 2.0, 'off': 1.3}, 6),
        ('T3', ['nst'], 'resnet20', {'bf16': 3.0}, 4),
        ('T4', ['st'], 'resnet110', {'bf16': 2.2, 'off': 1.3}, 4),
        ('T5', EIGHT, 'resnet20', {'bf16': 2.8, 'off': 1.8}, 2),
        ('T6', EIGHT, 'resnet110', {'bf16': 4.5, 'off': 3.0}, 2),
    ]
    for goal, methods, teacher, wanted, steps in cases:
        if goals and goal not in goals:
            continue
        for amp, ratio in wanted.items():
            plain = [plain_loop(method, teacher, train) for method in methods]
            ours = our_loop(methods, teacher, train, amp)
            name = methods[0] if len(methods) == 1 else f'{len(methods)} students'
            what = f'{name}, resnet20 from {teacher}, {"float32" if amp == "off" else amp}'
            rows.append(race(goal, what, ratio, plain, ours, len(methods), rounds, steps))
    return rows


def group_cost(rounds: int) -> dict:
    """T7: a batch of M students costs at most 1.1 (M s + T + d): s alone, T teacher, d data."""
    train = data()
    group = our_loop(EIGHT, 'resnet20', train, 'bf16')
    alone = [our_loop([method], 'resnet20', train, 'bf16') for method in EIGHT]
    net_t = models.build('resnet20', 10).eval().to(memory_format=torch.channels_last)
    amp, ratios = autocast(torch.device('cpu'), 'bf16'), []
    for loop in (group, *alone):
        seconds(loop, 1)
    for epoch in range(rounds):
        started = time.perf_counter()
        batches = [img for img, *_ in train.train_batches(BATCH, 1, epoch)]
        d = (time.perf_counter() - started) / len(batches)
        started = time.perf_counter()
        for img in batches[:4]:
            with torch.no_grad(), amp():
                net_t(img, True)
        t = (time.perf_counter() - started) / 4
        s = [seconds(loop, 2) / 2 - t - d for loop in alone]
        ratios.append(seconds(group, 2) / 2 / (sum(s) + t + d))
    middle = statistics.median(ratios)
    return report(
        'T7', 'eight students / (sum of s + T + d)', middle, min(ratios), max(ratios), 1.1, at_most=True
    )


def overhead(rounds: int) -> dict:
    """T9: evaluation of 10 000 images and a checkpoint, as a share of an epoch of 50 000, one student, st."""
    train, test = data(), data(16 * BATCH)
    loop = our_loop(['st'], 'resnet20', train, 'bf16')
    net, amp, shares = models.build('resnet20', 10), autocast(torch.device('cpu'), 'bf16'), []
    net.to(memory_format=torch.channels_last)
    seconds(loop, 1)
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(rounds):
            epoch = seconds(loop, 6) / (6 * BATCH) * 50_000
            started = time.perf_counter()
            evaluate(net, test, amp)
            extra = (time.perf_counter() - started) / len(test) * 10_000
            started = time.perf_counter()
            save_checkpoint(Path(folder) / 'last.pt', {'net': net.state_dict(), 'opt': net.state_dict()})
            extra += time.perf_counter() - started
            shares.append(extra / (epoch + extra))
    what, middle = 'evaluation and checkpoint, share of an epoch', statistics.median(shares)
    return report('T9', what, middle, min(shares), max(shares), 0.06, at_most=True)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('goals', nargs='*', help='T1 ... T9, default all (T8 is a test)')
    parser.add_argument('--quick', action='store_true', help='1 round instead of 3')
    parser.add_argument('--out', help='also write the results here, as JSON')
    args = parser.parse_args()
    rounds, goals = 1 if args.quick else 3, set(args.goals)
    print('goal what                                          ratio       spread   wanted')
    rows = [pipeline(rounds)] if not goals or 'T1' in goals else []
    rows += loops(goals, rounds)
    rows += [group_cost(rounds)] if not goals or 'T7' in goals else []
    rows += [overhead(rounds)] if not goals or 'T9' in goals else []
    if args.out:
        origin = provenance(torch.device('cpu'))
        origin['command'] = ' '.join(['python -m benchmarks.trainer', *sys.argv[1:]])
        write_json(Path(args.out), {'rows': rows, **origin})


if __name__ == '__main__':
    main()
