"""Federated selective aggregation, simulated: K private teachers in one process (ka_losses/fedka.py).

    python tools/fedka.py --t_name resnet20 --t_model part0.pt part1.pt part2.pt part3.pt --s_name resnet8 \\
        --data_name cifar10 --probe 50

Client i has teacher i and the images of its part of the classes, without labels. The server has --probe
labelled images of every class. A round: the drawn clients train a copy of the student each, its last map
against the teacher's through a translator of their own; the server averages. Every --select_every rounds
clients are drawn again, by how alike student and teacher look at the probe images (--select uniform draws
blindly, all takes every client: plain averaging); every --adapt_every rounds a copy of the student gets a new
classifier, learns the probe set, and is measured. The reference: a fresh student on the probe set.

Writes to SAVE_ROOT/NOTE: log.txt, args.json, last.pt (continued by --resume auto) and best.pt with the
server's student, whose classifier never learns, student.pt with the copy that was measured at the end,
metrics.csv, results.json, whose table has the accuracy after each measured round.
"""

import copy
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
from engine.data import first_images, labelled_part, load_data  # noqa: E402
from engine.device import autocast, refuse_fp16, setup  # noqa: E402
from engine.errors import UserError, user_errors  # noqa: E402
from engine.evaluate import measure, measured  # noqa: E402
from engine.flags import add_common_flags, data_words, positive_int, refuse_given  # noqa: E402
from engine.ka_tools import NOT_HERE, UNREAD, refuse_non_finite, refuse_processes  # noqa: E402
from engine.parser import Parser  # noqa: E402
from engine.recipe import math_args, resume_point
from engine.record import (  # noqa: E402
    Record,
    class_names_of,
    fingerprint,
    output_folder,
    provenance,
    save_checkpoint,
    write_json,
)
from engine.session import Log  # noqa: E402
from engine.teachers import load_teacher  # noqa: E402
from ka_losses.fedka import FedKA, fed_average, saliency, selection_prob, transferability  # noqa: E402


def parse_args():
    parser = Parser(__doc__)
    # fmt: off
    flag = parser.add_argument_group('federation').add_argument
    flag('--t_name', required=True, metavar='NAME', help=f'all teachers: {models.NAMES}')
    flag('--t_model', nargs='+', required=True, metavar='FILE', help='checkpoints, one per client')
    flag('--s_name', required=True, metavar='NAME', help='student, one of the same names')
    flag('--split', choices=('contiguous', 'interleaved', 'random'), default='contiguous',
         help='how the classes go to the clients, as for train_base.py')
    flag('--probe', type=positive_int, default=5, help='labelled images per class, default 5')
    flag('--select', choices=('saliency', 'uniform', 'all'), default='saliency',
         help='who trains in a round; saliency, rather those that look where the student looks; uniform, '
              'drawn blindly; all, every client; default saliency')
    flag('--topk', type=positive_int, default=2, help='clients drawn per round, default 2')
    flag('--local_epochs', type=positive_int, default=10, help='of a client per round, default 10')
    flag('--select_every', type=positive_int, default=10, help='rounds between selections, default 10')
    flag('--adapt_every', type=positive_int, default=10, help='rounds between measurements, default 10')
    flag('--adapt_epochs', type=positive_int, default=30, help='epochs on the probe set, default 30')
    flag('--local_images', type=positive_int, metavar='N', help='at most N images per client')
    # fmt: on
    add_common_flags(parser, epochs=50, lr=1e-3, rate="Adam's, default 0.001; --epochs counts rounds")
    return parser.parse_args()


def main():
    args = parse_args()
    refuse_processes()
    refuse_given(args, NOT_HERE | {'weight_decay': 1e-4, 'save_every': 1}, UNREAD)
    refuse_fp16(args)
    if args.select == 'all':
        refuse_given(args, {'topk': 2, 'select_every': 10}, '--select all draws no clients')
    device = setup(args)
    amp = autocast(device, args.amp)
    name = f'fedka-{args.data_name.replace(":", "")}-{args.s_name}-s{args.seed}'
    folder = output_folder(Path(args.save_root) / (args.note or name))
    log = Log(folder)
    train, _, test = load_data(args, device, log)
    train = labelled_part(train)
    clients = len(args.t_model)
    with user_errors():
        parts = dataset.split_classes(train.num_classes, clients, args.split, args.seed)
        homes = [dataset.take_classes(train, part) for part in parts]
        teachers = [models.build_for(path, args.t_name, len(part)) for path, part in zip(args.t_model, parts)]
        torch.manual_seed(args.seed)
        student = models.build(args.s_name, train.num_classes).to(device)
    for part, teacher, path in zip(parts, teachers, args.t_model):
        read = load_teacher(teacher, path, dataset.take_classes(test, part), amp)
        log(f'client {part}: {read["said"]}, top-1 there {read["top1"]:.2f}')
    if args.local_images:
        homes = [first_images(home, args.local_images, args.data_name) for home in homes]
    probe = dataset.few_per_class(train, args.probe, args.seed)
    img, *_ = next(probe.test_batches(2))
    with torch.no_grad():
        c_s, *widths = (net.eval()(img, True).fms[-1].shape[1] for net in (student, *teachers))
    losses = nn.ModuleList(FedKA(c_s, c_t) for c_t in widths).to(device)

    origin = provenance(device) | class_names_of(train)
    recipe = math_args(
        args, script='fedka', student=args.s_name, teachers=[fingerprint(t) for t in teachers],
        parts=parts, looks='with a fitted classifier',
        **{key: getattr(args, key) for key in ('probe', 'topk', 'local_epochs', 'select_every',
                                             'adapt_every', 'adapt_epochs', 'local_images')},
    )  # fmt: skip
    record = Record(folder, {'net': student, 'losses': losses}, recipe, origin, 'test')
    record.resume(resume_point(args.resume, folder))
    record.begin(args.resume)
    write_json(folder / 'args.json', {'args': vars(args), **origin})
    log(f'{clients} clients, probe set of {len(probe)}, {record.epoch} of {args.epochs} rounds done')
    drawn = record.history[-1]['clients'] if record.epoch else []

    for number in range(record.epoch, args.epochs):
        started = time.time()
        if number % args.select_every == 0:
            drawn = select(student, teachers, probe, args, number)
        copies, loss = [], 0.0
        for turn, i in enumerate(drawn):
            one, value = at_home(copy.deepcopy(student), losses[i], teachers[i], homes[i], args, amp,
                                 number * len(drawn) + turn)  # fmt: skip
            copies.append(one.state_dict())
            loss += value / len(drawn)
        student.load_state_dict(fed_average(copies, [1 / len(copies)] * len(copies)))
        row = {'epoch': number + 1, 'clients': drawn, 'loss': loss}
        if (number + 1) % args.adapt_every == 0 or number + 1 == args.epochs:
            row |= measured(measure(adapted(student, probe, args, number), None, test, amp))
        row['seconds'] = time.time() - started
        record.epoch_done(row)
        said = f'  test {row["test_top1"]:.2f}' if 'test_top1' in row else ''
        log(f'round {number + 1}/{args.epochs}  clients {drawn}  loss {loss:.4f}{said}')

    torch.manual_seed(args.seed)
    fresh = models.build(args.s_name, train.num_classes).to(device)
    alone = measured(measure(adapted(fresh, probe, args, 0), None, test, amp))['test_top1']
    log(f'the same student on the probe set alone: top-1 {alone:.2f}')
    facts = {'script': 'fedka', 'method': 'fedka', 'student': args.s_name, 'teacher': args.t_name,
             'data': args.data_name, 'parts': parts, 'seed': args.seed, 'epochs': args.epochs,
             'probe': len(probe), 'probe_alone': alone, 'select': args.select,
             'title': f'{clients} private teachers, {len(probe)} labelled images at the server'}  # fmt: skip
    curve = {f'round {row["epoch"]}': row['test_top1'] for row in record.history if 'test_top1' in row}
    how = {
        'saliency': f'{args.topk} clients a round, drawn by saliency',
        'uniform': f'{args.topk} clients a round, drawn blindly',
        'all': 'all clients every round',
    }
    facts['table'] = [{'row': 'the same student on the probe set alone', 'top-1 at the end': alone},
                      {'row': how[args.select], 'top-1 at the end': record.history[-1]['test_top1'],
                       **curve}]  # fmt: skip
    log(f'fedka: {record.finish("student.pt", facts)}')
    served = adapted(student, probe, args, args.epochs - 1)  # what the last row has measured
    save_checkpoint(folder / 'student.pt', models.named_weights(served, train.class_names, args.own_scale))
    path, data = folder / 'student.pt', data_words(args)
    how = models.how_to_load(path, args.s_name, data, train.num_classes, train)
    log(f'weights: {how}')


def select(student: nn.Module, teachers: list, probe, args, number: int) -> list[int]:
    """Clients of the next rounds, drawn with replacement: rather those that look where the student looks.

    A copy of the student, trained on the probe set, looks for it: clients train maps, never its own
    classifier.
    """
    if args.select == 'all':
        return list(range(len(teachers)))
    prob = torch.ones(len(teachers))
    if args.select == 'saliency':
        imgs = [img for img, *_ in probe.test_batches(64)]
        nets = (adapted(student, probe, args, number), *teachers)
        maps = [torch.cat([saliency_of(net, img) for img in imgs]) for net in nets]
        if len({m.shape[1] for m in maps}) > 1:
            raise UserError('student and teachers must have last maps of one size')
        prob = selection_prob(transferability(maps[0], torch.stack(maps[1:])))
    generator = torch.Generator().manual_seed(args.seed * 1_000_003 + number)
    return torch.multinomial(prob.cpu(), args.topk, replacement=True, generator=generator).tolist()


def saliency_of(net: nn.Module, img):
    net.eval()
    with torch.no_grad():
        fms = net(img, True).fms
    fm = fms[-1].requires_grad_()
    return saliency(fm, net.after(len(fms) - 1, fm).out)


def at_home(student, loss, teacher, home, args, amp, number: int):
    """A client's epochs: no label is read."""
    opt = torch.optim.Adam([*student.parameters(), *loss.parameters()], args.lr)
    student.train(), loss.train()
    for epoch in range(args.local_epochs):
        torch.manual_seed(
            args.seed * 1_000_003 + number * args.local_epochs + epoch
        )  # dropout, if it has any
        total = steps = 0
        for img, *_ in home.train_batches(args.batch_size, args.seed, number * args.local_epochs + epoch):
            with torch.no_grad(), amp():
                fm_t = teacher(img, True).fms[-1]
            with amp():
                fm_s = student(img, True).fms[-1]
            value = loss(fm_s, fm_t)
            refuse_non_finite(value, f'fedka: local epoch {epoch + 1}')
            opt.zero_grad(set_to_none=True)
            value.backward()
            opt.step()
            total, steps = total + float(value.detach()), steps + 1
    return student, total / max(steps, 1)


def adapted(student: nn.Module, probe, args, number: int) -> nn.Module:
    """A copy with a new classifier, all of it trained on the labelled probe set."""
    net = copy.deepcopy(student).train()
    torch.manual_seed(args.seed)
    net.classifier_layer().reset_parameters()
    opt = torch.optim.Adam(net.parameters(), args.lr)
    for epoch in range(args.adapt_epochs):
        for img, target, *_ in probe.train_batches(min(64, len(probe)), args.seed, number + epoch):
            loss = F.cross_entropy(net(img), target)
            refuse_non_finite(loss, f'fedka: epoch {epoch + 1} on the probe set')
            opt.zero_grad(set_to_none=True)
            loss.backward()
            opt.step()
    return net


if __name__ == '__main__':
    errors.run(main)
