"""What a training step costs with every row of methods/kd.py, against the student's own step.

    python -m benchmarks.steps                  all rows
    python -m benchmarks.steps rkd st           some
    python -m benchmarks.steps --out FILE       writes JSON

resnet20 teaches resnet8, 64 images of 32 pixels, 10 classes, float32, one thread. A step is the teacher's
forward pass (where the row has one), the student's, the loss and the backward pass; the update is not
counted. Times are CPU time: medians of several rounds, in which both sides take turns. Memory is the peak
beyond that of the student's own step. A row that these networks cannot have is left out.
"""

import argparse
import copy
import random
import statistics
import time
from dataclasses import replace
from pathlib import Path

import torch

import models
from benchmarks.losses import peak
from engine.batch import Probe
from engine.device import autocast
from engine.record import provenance, write_json
from engine.student import Student, Term
from engine.teachers import Teachers
from methods import KD

IMAGES, CLASSES, ROUNDS = 64, 10, 7
LINE = '{:24}{:>10}{:>10}{:>10}'


class Many:
    """A training set of CIFAR's length, of which only the first batch has images."""

    targets = torch.arange(50000) % CLASSES
    mean, std = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)

    def __init__(self, img) -> None:
        self.img = img

    def __len__(self) -> int:
        return len(self.targets)

    def subset(self, index):
        return self

    def test_batches(self, size):
        yield self.img, self.targets[: len(self.img)], None


def step_of(name: str | None):
    """() -> loss of one step with the row of this name, None: with cross-entropy alone."""
    torch.manual_seed(0)
    amp = autocast(torch.device('cpu'), 'off')
    img, target = torch.randn(IMAGES, 3, 32, 32), torch.arange(IMAGES) % CLASSES
    net_s = models.build('resnet8', CLASSES)
    net_t = models.build('resnet20', CLASSES).eval().requires_grad_(False)
    row = KD[name] if name else None
    views = {view: img.flip(3) for view in row.needs.views} if row else {}
    taught = bool(row) and row.needs.teacher
    teachers = Teachers([net_t] * (2 if row and row.needs.all_teachers else 1), amp, [], img)
    teachers.prepare = {row.own.once_per_batch} - {None} if row else set()
    seen = teachers(img, target, torch.arange(IMAGES), views)
    terms = [Term(name, row, row.weight, {})] if row else []
    with torch.no_grad():
        s = net_s.eval()(img, True)
    probe = Probe(s, seen.all_t[0], net_s, net_t, Many(img), IMAGES, 240, CLASSES,
                  another_net=copy.deepcopy, all_t=seen.all_t)  # fmt: skip
    net = net_s
    for term in terms:
        term.build(probe)
        net = row.own.student(net_s, term.loss, probe) if row.own.student else net_s
        if row.own.before:
            row.own.before(term.loss, teachers.teacher, probe)
    student = Student(net, terms, amp).train()
    generator, rng = torch.Generator(), random.Random(0)
    weights, phase = {'ce': 1.0, **({name: row.weight} if row else {})}, 'train'
    if row and row.when.alone:
        phase = 'init'

    def step():
        now = teachers(img, target, torch.arange(IMAGES), views) if taught else seen
        batch = replace(now, now=60, epochs=240, generator=generator, rng=rng)
        _, losses = student(batch, weights, student.inner(60, 240), phase)
        student.zero_grad(set_to_none=True)
        return sum(weights[key] * loss for key, loss in losses.items())

    return step


def seconds(step) -> float:
    start = time.process_time()
    step().backward()
    return time.process_time() - start


def measure(name: str, alone) -> dict:
    step = step_of(name)
    seconds(step)  # the first one allocates
    pairs = [(seconds(step), seconds(alone)) for _ in range(ROUNDS)]
    ours, own = map(statistics.median, zip(*pairs))
    ratios = sorted(a / b for a, b in pairs)
    return {
        'row': name, 'ms': round(1e3 * ours, 1), 'ms_alone': round(1e3 * own, 1),
        'ratio': round(statistics.median(ratios), 2), 'ratio_low': round(ratios[0], 2),
        'ratio_high': round(ratios[-1], 2), 'mib': round(peak(step, True) - peak(alone, True), 1),
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('names', nargs='*', help='rows of methods/kd.py; default all')
    parser.add_argument('--out', help='also write the results here, as JSON')
    args = parser.parse_args()
    torch.set_num_threads(1)
    alone, rows = step_of(None), []
    print(LINE.format('row', 'ms', 'ratio', 'MiB'))
    for name in args.names or sorted(KD):
        try:
            rows.append(measure(name, alone))
        except ValueError as error:
            print(f'{name}: left out, {error}', flush=True)
            continue
        print(LINE.format(name, *(rows[-1][key] for key in ('ms', 'ratio', 'mib'))), flush=True)
    if args.out:
        origin = provenance(torch.device('cpu'))
        origin['command'] = ' '.join(
            ['python -m benchmarks.steps', *args.names, '--out', 'results/benchmarks-steps.json']
        )
        write_json(Path(args.out), {'rows': rows, **origin})
    return 0


if __name__ == '__main__':
    raise SystemExit(main())
