"""Amalgamate two toy detectors of different kinds of objects into one (ka_losses/transformer_ka.py).

    python tools/transformer_ka.py --data_name scenes:1000 --kinds box sphere,cylinder --epochs 40

One small detection transformer per word of --kinds learns these objects of embedded rooms from labels; for
it all others are background. Then students of all kinds learn from them on other rooms without labels: sa_ta
(sequences and detections), ta (detections alone), agg_ta (the baseline of one sequence after a linear map of
the teachers' sequences, and detections); labels is the reference, the same detector with the labels of all
kinds on the teachers' rooms. AP50 is the area under precision over recall at an overlap of 0.5, on rooms that
nobody has seen.

Writes to SAVE_ROOT/NOTE: log.txt, args.json, results.json with the table, and per network a folder with
last.pt (continued by --resume auto), best.pt, student.pt, metrics.csv, results.json.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import engine.threads  # noqa: E402, F401  before torch

import torch  # noqa: E402
from torch import nn  # noqa: E402

from dataset.boxes import KINDS, load_boxes  # noqa: E402
from engine import errors  # noqa: E402
from engine.detection import WithLabels, ap_of_kinds  # noqa: E402
from engine.device import setup  # noqa: E402
from engine.errors import UserError, user_errors  # noqa: E402
from engine.flags import add_common_flags, positive_float, positive_int  # noqa: E402
from engine.ka_tools import begin, check_places, record_of, sound, train, write_table  # noqa: E402
from engine.method_flags import refuse_repeated  # noqa: E402
from engine.parser import Parser  # noqa: E402
from engine.recipe import math_args  # noqa: E402
from engine.record import fingerprint, provenance, write_json  # noqa: E402
from ka_losses.transformer_ka import SeqAgg, SeqHint, TaskAmalgamation  # noqa: E402
from models.detector import Detector  # noqa: E402

STUDENTS = ('sa_ta', 'ta', 'agg_ta', 'labels')


def parse_args():
    parser = Parser(__doc__)
    # fmt: off
    flag = parser.add_argument_group('detectors').add_argument
    flag('--kinds', nargs='+', default=['box', 'sphere,cylinder'], metavar='LIST',
         help=f'what each teacher knows, of {", ".join(KINDS)}; default box sphere,cylinder')
    flag('--students', nargs='+', choices=STUDENTS, default=list(STUDENTS), metavar='NAME',
         help=f'which; default all: {" ".join(STUDENTS)}')
    flag('--size', type=positive_int, default=48, help='side of the rooms, a multiple of 16, default 48')
    flag('--norm', choices=('channel', 'layer'), default='channel', help='of sequences, default channel')
    flag('--threshold', type=positive_float, default=0.1, help='least probability of a target, default 0.1')
    flag('--T', type=positive_float, default=4.0, help='temperature of the classes, default 4')
    flag('--clip', type=positive_float, default=1.0, help='largest norm of a gradient, default 1')
    # fmt: on
    add_common_flags(
        parser,
        epochs=60,
        lr=1e-3,
        rate="AdamW's, default 0.001",
        more_data='; here: scenes, scenes:N (embedded rooms, N for teachers, N for students)',
        batch_size=32,
    )  # fmt: skip
    return parser.parse_args()


def main():
    args = parse_args()
    if args.device not in (None, 'cpu'):
        raise UserError(f'--device {args.device}: these detectors are small and run on the CPU')
    args.device = 'cpu'
    device = setup(args)
    refuse_repeated('--students', args.students)
    tasks, n = read_kinds(args.kinds), rooms_of(args)
    names = [KINDS[k] for k in sorted(sum(tasks, []))]  # classes of the student
    blocks = [[names.index(KINDS[k]) for k in task] for task in tasks]
    folder, log = begin(args, f'transformer_ka-{args.data_name.replace(":", "")}-s{args.seed}',
                        amp='off', pad='reflect')  # fmt: skip
    with user_errors():
        labelled, plain, test = load_boxes(n, args.size)
    log(f'{n} rooms with labels, {n} without, {len(test)} to measure on')
    every = [KINDS.index(name) for name in names]
    origin = provenance(device)
    recipe = math_args(args, script='transformer_ka', kinds=args.kinds, size=args.size, clip=args.clip)
    check_places(args, folder, [*(f'teacher{i}' for i in range(1, len(tasks) + 1)), *args.students])
    write_json(folder / 'args.json', {'args': vars(args), **origin})
    facts = {'script': 'transformer_ka', 'method': 'transformer_ka', 'student': 'detector', 'seed': args.seed,
             'teacher': ' + '.join(args.kinds), 'data': args.data_name, 'epochs': args.epochs}  # fmt: skip

    def learn(name: str, net: Detector, more: nn.Module, data, loss, watch, **recipe_of) -> dict:
        """Train a detector; loss: (found, sequences, batch) -> value and terms; watch: rooms and kinds."""
        params = [*net.parameters(), *more.parameters()]
        opt = torch.optim.AdamW(params, args.lr, weight_decay=args.weight_decay)
        record = record_of(folder / name, {'net': net, 'more': more, 'opt': opt},
                           recipe | {'network': name, **recipe_of}, origin, args, 'AP50')  # fmt: skip
        steps = data.steps(args.batch_size)

        def step(*batch):
            net.train(), more.train()
            value, terms = loss(*net(batch[0]), batch)
            sound(value)
            opt.zero_grad(set_to_none=True)
            value.backward()
            nn.utils.clip_grad_norm_(params, args.clip)
            opt.step()
            return {'loss': value, **terms}

        def rate(done: float) -> float:  # up in 100 steps or a tenth, down for the last quarter
            warm = min(100, max(steps * args.epochs // 10, 1))
            return min(1.0, (done * steps * args.epochs + 1) / warm) * (0.1 if done >= 0.75 else 1.0)

        def measure():
            last = record.epoch + 1 == args.epochs
            if not last and (record.epoch + 1) % 10:
                return {}
            return {f'test_{key}': value for key, value in ap_of_kinds(net, *watch).items()}

        train(record, name, [opt], lambda epoch: data.train_batches(args.batch_size, args.seed, epoch), steps,
              step, measure, args, log, rate=rate)  # fmt: skip
        log(f'{name}: {record.finish("student.pt", facts)}')
        read = {key.removeprefix('test_'): value for key, value in record.history[-1].items()
                if key.startswith('test_AP50')}  # fmt: skip
        return {'parameters': sum(p.numel() for p in net.parameters()), **read}

    teachers, known = [], {}
    for i, task in enumerate(tasks, 1):
        torch.manual_seed(args.seed * 1000 + i)
        net, loss = Detector(len(task)), WithLabels(len(task))
        words = [KINDS[k] for k in task]
        known |= learn(f'teacher{i}', net, nn.ModuleList(), labelled.of(task),
                       lambda found, _, batch, loss=loss: loss(found, *batch[1:]),
                       (test.of(task), words))  # fmt: skip
        teachers.append(net.eval().requires_grad_(False))
    each = {f'AP50 {name}': known[f'AP50 {name}'] for name in names}
    size = sum(p.numel() for net in teachers for p in net.parameters())
    row = {'row': 'the teachers, each its kinds', 'parameters': size, 'AP50': sum(each.values()) / len(each)}
    rows = [row | each]
    marks = [fingerprint(net) for net in teachers]
    for name in args.students:
        torch.manual_seed(args.seed)
        net = Detector(len(names), chunks=len(tasks) if name in ('sa_ta', 'ta') else 1)
        if name == 'labels':
            loss = WithLabels(len(names))
            read = learn(name, net, nn.ModuleList(), labelled.of(every),
                         lambda found, _, batch, loss=loss: loss(found, *batch[1:]),
                         (test.of(every), names))  # fmt: skip
        else:
            amalgam = Amalgamation(name, blocks, len(names), net.dim, args)
            read = learn(name, net, amalgam.levels, plain, amalgam.told_by(teachers), (test.of(every), names),
                         teachers=marks, norm=args.norm, threshold=args.threshold, T=args.T)  # fmt: skip
        rows.append({'row': f'{name} ({"reads labels" if name == "labels" else "no labels"})', **read})
    # of students without labels alone: the other networks' own recipes, which --resume compares, lack them
    recipe |= {key: getattr(args, key) for key in ('norm', 'threshold', 'T')}
    facts |= {'title': f'toy detectors of {" and of ".join(args.kinds)} into one', 'recipe': recipe}
    write_table(folder, facts, rows, origin, log)


class Amalgamation:
    """What a student without labels minimises: SA at its levels of sequences, TA at every decoder layer."""

    def __init__(self, name: str, blocks: list[list[int]], num_classes: int, dim: int, args) -> None:
        kinds = {'sa_ta': SeqHint, 'agg_ta': SeqAgg}
        levels = [kinds[name](len(blocks), dim, args.norm) for _ in range(3)] if name in kinds else []
        self.levels = nn.ModuleList(levels)
        self.detections = TaskAmalgamation(blocks, num_classes, args.threshold, n_max=8, T=args.T)

    def told_by(self, teachers: list[Detector]):
        def loss(found, sequences, batch):
            with torch.no_grad():
                told = [net(batch[0]) for net in teachers]
            final = [outs[-1] for outs, _ in told]  # every layer of the student's decoder learns from it
            total, terms = 0.0, {}
            for out in found:
                value, parts = self.detections(out, final, return_terms=True)
                total = total + value
                terms = {key: terms.get(key, 0.0) + part for key, part in parts.items()}
            for k, level in enumerate(self.levels):
                hint = level(sequences[k], [seqs[k] for _, seqs in told])
                total, terms['sequences'] = total + hint, terms.get('sequences', 0.0) + hint
            return total, terms

        return loss


def read_kinds(words: list[str]) -> list[list[int]]:
    tasks = [[KINDS.index(kind) if kind in KINDS else -1 for kind in word.split(',')] for word in words]
    flat = sum(tasks, [])
    if -1 in flat or len(set(flat)) < len(flat) or len(tasks) < 2:
        raise UserError(
            f'--kinds: two words or more of different kinds of {", ".join(KINDS)}, got {" ".join(words)}'
        )
    return tasks


def rooms_of(args) -> int:
    kind, _, number = args.data_name.partition(':')
    if kind != 'scenes' or (number and (not number.isdigit() or int(number) < 10)) or args.size % 16:
        raise UserError(
            f'--data_name {args.data_name} --size {args.size}: there are scenes and scenes:N, N >= 10, at '
            'multiples of 16'
        )
    return int(number or 2000)


if __name__ == '__main__':
    errors.run(main)
