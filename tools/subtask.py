"""Keep some classes of a network, unlearn the others (ka_losses/subtask.py), and attack the result.

    python tools/subtask.py --t_name resnet20 --t_model net.pt --s_name resnet8 --data_name cifar10 \\
        --sub 0-4 --lambda_adv 0 0.5 --adv_cap 2

A student per value of --lambda_adv learns the wanted classes from the teacher's logits, without a label,
while a linear head on its embedding tries to read the others and the student moves away from what it reads
(0: no unlearning). How much is left is then measured by somebody who wants the other classes back: from
--attack_share of their training images with labels, once with a new classifier on the frozen network, once
with the whole network. Beside the students stand the teacher and a network of random weights, attacked in the
same way. Weight decay is 1e-4, as in train_base.py (authors: --weight_decay 5e-4).

Writes to SAVE_ROOT/NOTE: log.txt, args.json, results.json with the table, and per student a folder with
last.pt (continued by --resume auto), best.pt, student.pt, metrics.csv, results.json.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import engine.threads  # noqa: E402, F401  before torch

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import nn  # noqa: E402

import dataset  # noqa: E402
import models  # noqa: E402
from engine import errors  # noqa: E402
from engine.batch import as_float  # noqa: E402
from engine.data import load_data  # noqa: E402
from engine.device import autocast, setup  # noqa: E402
from engine.errors import UserError, user_errors  # noqa: E402
from engine.evaluate import evaluate  # noqa: E402
from engine.flags import add_common_flags, any_number, fraction, positive_float, positive_int  # noqa: E402
from engine.ka_tools import (  # noqa: E402
    begin,
    check_places,
    record_of,
    refuse_non_finite,
    sound,
    train,
    write_table,
)
from engine.parser import Parser  # noqa: E402
from engine.recipe import math_args  # noqa: E402
from engine.record import class_names_of, fingerprint, provenance, write_json  # noqa: E402
from engine.teachers import load_teacher  # noqa: E402
from ka_losses.subtask import SubTask  # noqa: E402


def parse_args():
    parser = Parser(__doc__)
    # fmt: off
    flag = parser.add_argument_group('unlearning').add_argument
    flag('--t_name', required=True, metavar='NAME', help=f'the teacher of all classes: {models.NAMES}')
    flag('--t_model', required=True, metavar='FILE', help='its checkpoint')
    flag('--s_name', required=True, metavar='NAME', help='students, one of the same names')
    flag('--s_init', metavar='FILE',
         help="what students begin with; all but the classifier, e.g. the teacher's file; default: fresh "
              'weights')
    flag('--sub', required=True, metavar='LIST', help='the classes to keep, e.g. 0-4')
    flag('--lambda_adv', nargs='+', type=any_number, default=[0.0, 0.5], metavar='W',
         help='weights of unlearning; a student each, default 0 0.5')
    flag('--adv_cap', type=positive_float, metavar='KL',
         help="no more unlearning where the head's divergence is above it; default: no limit, as the authors")
    flag('--T', type=positive_float, default=1.0, help='temperature, default 1')
    flag('--attack_share', type=fraction, default=0.1, metavar='F',
         help='labelled share of the images that the attacker has, default 0.1')
    flag('--attack_epochs', type=positive_int, default=50, help="the attacker's epochs, default 50")
    flag('--attack_lr', type=positive_float, default=0.02, help='and learning rate, default 0.02')
    # fmt: on
    add_common_flags(parser, lr=5e-4, rate="Adam's, default 0.0005")
    return parser.parse_args()


def main():
    args = parse_args()
    device = setup(args)
    amp = autocast(device, args.amp)
    folder, log = begin(args, f'subtask-{args.data_name.replace(":", "")}-{args.s_name}-s{args.seed}')
    all_train, _, all_test = load_data(args, device, log)
    with user_errors():
        sub = dataset.read_classes(args.sub, all_train.num_classes)
        others = [k for k in range(all_train.num_classes) if k not in sub]
        losses = {lam: SubTask(sub, all_train.num_classes, lam, args.T, args.adv_cap).to(device)
                  for lam in args.lambda_adv}  # fmt: skip
        teacher = models.build_for(args.t_model, args.t_name, all_train.num_classes)
        kept, lost = dataset.take_classes(all_test, sub), dataset.take_classes(all_test, others)
        known = dataset.take_classes(all_train, others)
        begun(args, len(sub), lambda line: None)
    if len(losses) < len(args.lambda_adv):
        raise UserError('--lambda_adv: a value is named twice')
    if args.attack_share * len(known) < 2:
        raise UserError(f'--attack_share {args.attack_share}: of {len(known)} images, that is less than two')
    stolen, _ = known.split(1 - args.attack_share, args.seed)
    read = load_teacher(teacher, args.t_model, all_test, amp)
    log(f'teacher {args.t_name}: {read["said"]}, top-1 {read["top1"]:.2f}')
    log(f'kept {sub}, unlearnt {others}; the attacker has {len(stolen)} labelled images of these')
    origin = provenance(device) | class_names_of(all_train)
    flags = ('sub', 'adv_cap', 'T')
    recipe = math_args(args, script='subtask', student=args.s_name, teacher=fingerprint(teacher),
                       **{key: getattr(args, key) for key in flags})  # fmt: skip
    places = {lam: f'lambda-{lam:g}' for lam in losses}
    check_places(args, folder, places.values())
    write_json(folder / 'args.json', {'args': vars(args), **origin})

    def batches(epoch):
        return all_train.train_batches(args.batch_size, args.seed, epoch)

    def attacked(net, name: str, row: str) -> dict:
        found = {way: attack(net, name, stolen, lost, args, amp, way == 'classifier')
                 for way in ('classifier', 'network')}  # fmt: skip
        return {'row': row, 'recovered, new classifier': found['classifier'],
                'recovered, whole network': found['network']}  # fmt: skip

    inside = evaluate(Cut(teacher, sub), kept, amp)['top1']
    rows = [attacked(teacher, args.t_name, f'teacher {args.t_name}') | {'kept': inside}]
    rows.append(attacked(fresh(args.s_name, len(sub), args.seed).to(device), args.s_name, 'random weights'))
    facts = {'script': 'subtask', 'method': 'subtask', 'student': args.s_name, 'teacher': args.t_name,
             'data': args.data_name, 'seed': args.seed, 'epochs': args.epochs}  # fmt: skip
    steps = all_train.steps(args.batch_size)
    for lam, loss in losses.items():
        net = begun(args, len(sub), log).to(device)
        with torch.no_grad():
            width = net(next(iter(kept.test_batches(2)))[0], True).feat.shape[1]
        torch.manual_seed(args.seed)
        head = nn.Linear(width, len(others)).to(device)
        opts = {name: torch.optim.Adam(part.parameters(), args.lr, weight_decay=args.weight_decay)
                for name, part in (('student', net), ('head', head))}  # fmt: skip
        name = places[lam]
        parts = {'net': net, 'head': head, **{f'opt_{key}': opt for key, opt in opts.items()}}
        record = record_of(folder / name, parts, recipe | {'lambda_adv': lam},
                           origin | class_names_of(kept), args)  # fmt: skip

        def step(img, *_, net=net, head=head, loss=loss, opts=opts):
            """The student first, then the head on the same features."""
            net.train()
            with torch.no_grad(), amp():
                out_t = teacher(img)
            with amp():
                f = net(img, True)
            f = as_float(f)
            total, terms = loss(f.out, head(f.feat), out_t.float(), return_terms=True)
            sound(total, out_t)
            for part in opts.values():
                part.zero_grad(set_to_none=True)
            total.backward()
            opts['student'].step()
            opts['head'].zero_grad(set_to_none=True)
            loss.adv_loss(head(f.feat.detach()), out_t.float()).backward()
            opts['head'].step()
            return {'loss': total, **terms}

        def measure(net=net):
            return {'test_top1': evaluate(net, kept, amp)['top1']}

        train(record, name, opts.values(), batches, steps, step, measure, args, log)
        log(f'{name}: {record.finish("student.pt", facts | {"lambda_adv": lam})}')
        path = folder / name / 'student.pt'
        log(f'weights: {models.how_to_load(path, args.s_name, None, len(sub), kept)}')
        last = record.history[-1]
        rows.append(attacked(net, args.s_name, f'student, lambda {lam:g}') | {
            'kept': last['test_top1'],
        })  # fmt: skip
        if lam:  # with 0 the head's own loss is 0, so it stays as it was drawn
            rows[-1]['divergence of the head'] = last['adv']
    columns = (
        'row',
        'kept',
        'recovered, new classifier',
        'recovered, whole network',
        'divergence of the head',
    )
    rows = [{key: row[key] for key in columns if key in row} for row in rows]
    start = ', which begins with weights that knew all' if args.s_init else ''
    title = f'{args.t_name} to {args.s_name}{start}, classes {args.sub} kept'
    # an attack changes the table, but no student: students' own recipes, which --resume compares, lack it
    recipe |= {key: getattr(args, key) for key in ('attack_share', 'attack_epochs', 'attack_lr')}
    write_table(folder, facts | {'title': title, 'attack': len(stolen), 'recipe': recipe}, rows, origin, log)


class Cut(nn.Module):
    """A network's logits of some classes."""

    def __init__(self, net: nn.Module, classes: list[int]) -> None:
        super().__init__()
        self.net, self.classes = net, classes

    def forward(self, img):
        return self.net(img)[:, self.classes]


def fresh(name: str, num_classes: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return models.build(name, num_classes)


def begun(args, num_classes: int, log) -> nn.Module:
    """A student before its first step."""
    net = fresh(args.s_name, num_classes, args.seed)
    if args.s_init:
        with user_errors():
            log(f'student: {models.load_weights(net, args.s_init, new_head=True)}')
    return net


def attack(net: nn.Module, name: str, stolen, lost, args, amp, frozen: bool) -> float:
    """Accuracy on the unlearnt classes when a new classifier, or everything, has learnt the stolen images."""
    thief = fresh(name, lost.num_classes, args.seed).to(lost.device)
    classifier = {f'{path}.{key}' for path, module in thief.named_modules()
                  if module is thief.classifier_layer() for key in ('weight', 'bias')}  # fmt: skip
    body = {key: value for key, value in net.state_dict().items() if key not in classifier}
    shapes = {key: x.shape for key, x in thief.state_dict().items() if key not in classifier}
    if shapes != {key: x.shape for key, x in body.items()}:
        raise UserError(f'{name}: its weights are not those of a plain {name}: it cannot be attacked here')
    thief.load_state_dict(body, strict=False)
    part = thief.classifier_layer() if frozen else thief
    opt = torch.optim.SGD(part.parameters(), args.attack_lr, momentum=0.9)
    for epoch in range(args.attack_epochs):
        for img, target, *_ in stolen.train_batches(min(64, len(stolen)), args.seed, epoch):
            if frozen:
                thief.eval()
                with torch.no_grad(), amp():
                    feat = thief(img, True).feat
                out = thief.classifier_layer()(feat.float())
            else:
                thief.train()
                with amp():
                    out = thief(img)
            loss = F.cross_entropy(out.float(), target)
            refuse_non_finite(loss, f'epoch {epoch + 1} of the attack (--attack_lr)')
            opt.zero_grad(set_to_none=True)
            loss.backward()
            opt.step()
    return evaluate(thief, lost, amp)['top1']


if __name__ == '__main__':
    errors.run(main)
