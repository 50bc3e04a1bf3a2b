"""Teachers that know some classes each; the student gets the classes of all."""

import copy
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dataset
import engine.evaluate
import models
from engine import pictures
from engine.batch import as_float
from engine.data import load_data
from engine.device import autocast
from engine.errors import UserError, user_errors
from engine.flags import data_words, head_of, positive_int
from engine.teachers import load_teacher


class Classes:
    """Teachers that know some classes each; students have the classes of all."""

    name, data, data_help, networks = 'classes', tuple(dataset.DATA), '', models.NAMES
    key, tasks = 'top1', ()
    forms = {'A': 'A, raw logits', 'B': 'B, softmax each', 'C': 'C, logits - mean'}

    @staticmethod
    def add_flags(parser) -> None:
        # fmt: off
        flag = parser.add_argument_group('who knows which classes').add_argument
        flag('--num_parts', type=positive_int, metavar='N',
             help='parts of the classes; one per teacher in turn; default: one each; as many as teachers')
        flag('--split', choices=('contiguous', 'interleaved', 'random'), default='contiguous',
             help='as for train_base.py; default contiguous')
        flag('--t_classes', nargs='+', metavar='LIST', help="or each teacher's classes, e.g. 0-4 5-9")
        flag('--wanted', metavar='LIST',
             help="the student's classes; where teachers share classes or not all are wanted: every teacher "
                  'is cut to those it knows')
        flag('--unlabeled', metavar='NAME', help="train on another data set's images; e.g. cifar100")
        flag('--limit_train', type=positive_int, metavar='N', help='only N training images')
        flag('--limit_test', type=positive_int, metavar='N', help='only N test images')
        # fmt: on

    def __init__(self, args, wanted: dict, device, log) -> None:
        self.args, self.amp = args, autocast(device, args.amp)
        train, val, test = load_data(args, device, log)
        names = args.t_name * len(args.t_model) if len(args.t_name) == 1 else args.t_name
        if len(names) != len(args.t_model) or len(names) < 2:
            raise UserError(
                f'--t_name and --t_model: needs two teachers or more, got {len(args.t_name)} names and '
                f'{len(args.t_model)} files'
            )
        with user_errors():
            parts = self._parts(args, train.num_classes, len(names))
            chosen = dataset.read_classes(args.wanted, train.num_classes) if args.wanted else None
            self.split = dataset.ClassParts(parts, chosen)
        # on the device, or every step would send the lists there and wait
        self.columns, self.blocks = (
            [torch.tensor(numbers, device=device) for numbers in lists]
            for lists in (self.split.columns, self.split.blocks)
        )
        asks = {
            True: 'wants teachers that share the classes of --wanted',
            False: 'wants parts that do not overlap',
        }
        for name, method in wanted.items():
            needs = method.needs
            if needs.shared_classes != self.split.overlap and not needs.labels:
                raise UserError(f'--ka_mode {name}: {asks[needs.shared_classes]}')
            too_few = any(len(block) < len(self.split.classes) for block in self.split.blocks)
            if needs.shared_classes and too_few:
                raise UserError(
                    f'--ka_mode {name}: every teacher must know all classes of --wanted, or of --t_classes '
                    f'without it'
                )
            if needs.labels and args.unlabeled:
                raise UserError(f'--ka_mode {name}: learns from labels, and --unlabeled images have none')
        self.nets, figures = [], []
        for i, (name, path, part) in enumerate(zip(names, args.t_model, parts), 1):
            net, top1 = self._teacher(i, name, path, part, test, log)
            self.nets.append(net)
            figures.append({'name': name, 'classes': part, 'top1': top1, 'parameters': size_of(net)})
        self.facts = {'teacher': '+'.join(names), 'parts': parts, 'classes': self.split.classes,
                      'teachers': figures}  # fmt: skip
        self.recipe = {'parts': parts, 'classes': self.split.classes}
        if without := int((train.targets < 0).sum()):
            log(f'{without} training images have no label, so nobody knows whose they are: they are left out')
        every = self.split.classes == list(range(train.num_classes))
        self.data_words = data_words(args, None if every else self.split.classes)
        with user_errors():
            self.train, self.val, self.test = (
                data and dataset.take_classes(data, self.split.classes) for data in (train, val, test)
            )
            if args.unlabeled:
                other, _ = dataset.load(args.unlabeled, args.img_root, device)
                self.train = self.train.pictures(other)
                if dataset.owned(args.unlabeled):
                    self.recipe['own_unlabelled'] = other.digest()
        self.train, self.test = limited(self.train, args.limit_train), limited(self.test, args.limit_test)
        if line := dataset.unseen(self.test, self.split.classes):
            log(line)
        self.student_name = args.s_name or names[0]
        self.initial = self._initial(args, log)
        self.shown = ('top1', *(f'part{i + 1}' for i in range(len(self.split.distinct()))))

    @staticmethod
    def _parts(args, num_classes: int, teachers: int) -> list[list[int]]:
        if args.t_classes:
            parts = [dataset.read_classes(text, num_classes) for text in args.t_classes]
        else:
            parts = dataset.split_classes(num_classes, args.num_parts or teachers, args.split, args.seed)
        if len(parts) != teachers:
            raise UserError(f'{len(parts)} parts of the classes for {teachers} teachers')
        return parts

    def _teacher(self, i: int, name: str, path: str, part: list[int], test, log) -> tuple[nn.Module, float]:
        """A frozen teacher that is good for its part, and its accuracy there."""
        try:
            with user_errors():
                net = models.build_for(path, name, len(part))
                mine = dataset.take_classes(test, part)
            head = f'train it with train_base.py --classes {dataset.spelled(part)}, or say its own classes, '
            read = load_teacher(net, path, mine, self.amp, head=f'{head}--t_classes')
        except UserError as error:
            drawn = self.args.split == 'random' and not self.args.t_classes and 'other classes' in str(error)
            hint = " (--split random draws the parts by --seed: say the teachers' seed, or --t_classes)"
            raise UserError(
                f'teacher {i} ({name} for the classes {part}): {error}{hint if drawn else ""}'
            ) from None
        log(f'teacher {i}, {name}: {read["said"]}; classes {part}, top-1 there {read["top1"]:.2f}')
        return net, read['top1']

    def phases(self) -> list[int]:
        return [self.args.epochs]

    def student(self, method) -> nn.Module:
        return copy.deepcopy(self.initial)

    def _initial(self, args, log) -> nn.Module:
        """What all students start from."""
        torch.manual_seed(args.seed)
        with user_errors():
            net = models.build(self.student_name, len(self.split.classes))
            if args.s_init:
                said = models.load_weights(net, args.s_init, new_head=args.new_head, head=head_of('--s_init'))
                log(f'initial student: {said}')
        return net

    def forward(self, net: nn.Module, batch):
        return net(batch.img, True)

    @torch.no_grad()
    def teachers_on(self, img: Tensor) -> list:
        """Feats of every teacher, the logits cut to the classes in use."""
        with self.amp():
            all_t = [net(img, True) for net in self.nets]
        all_t = [as_float(t) for t in all_t]
        return [t._replace(out=t.out[:, columns]) for t, columns in zip(all_t, self.columns)]

    def supervised(self, s, target: Tensor) -> Tensor:
        return F.cross_entropy(s.out, target)

    def measure(self, net: nn.Module) -> dict[str, float]:
        row = {}
        for half, data in (('val', self.val), ('test', self.test)):
            if data:
                read = self.split.metrics(*self._logits([net], data))
                row |= {f'{half}_{key}': value for key, value in read.items()}
        return row

    def details(self, net: nn.Module) -> dict:
        """Which part the student sends the images of each part to."""
        return {'routing': self.split.routing(*self._logits([net], self.test))}

    def how_to_load(self, net: nn.Module, path: Path) -> str:
        count = len(self.split.classes)
        return models.how_to_load(path, self.student_name, self.data_words, count, self.train)

    def shows(self, net: nn.Module) -> dict[str, np.ndarray]:
        return {'routing': np.array([self.details(net)['routing']])}

    @staticmethod
    def drawn(arrays: dict, names: list[str] | None = None) -> np.ndarray:
        return pictures.grid([{'routing, %': pictures.matrix(x)} for x in arrays['routing']], names)

    def ensembles(self) -> dict:
        """The teachers side by side: A, raw logits; B, each one's softmax; C, logits minus their mean.

        Of teachers that share classes: each by itself, cut to the wanted classes.
        """
        out, target = self._logits(self.nets, self.test)
        whole = out.split([len(part) for part in self.split.parts], dim=1)
        each = [x[:, columns] for x, columns in zip(whole, self.columns)]
        if self.split.overlap:  # each source by itself, where it knows all that is wanted
            knows_all = list(range(len(self.split.classes)))
            return {
                f'source {i}': self.split.metrics(x, target) | {'routing': self.split.routing(x, target)}
                for i, (x, block) in enumerate(zip(each, self.split.blocks), 1)
                if block == knows_all
            }
        forms = {
            'A': lambda x: x,
            'B': lambda x: x.softmax(dim=1),
            'C': lambda x: x - x.mean(1, keepdim=True),
        }
        order = torch.cat(self.blocks).argsort()
        result = {}
        for name, form in forms.items():
            joined = torch.cat([form(x) for x in each], dim=1)[:, order]
            result[name] = self.split.metrics(joined, target) | {
                'routing': self.split.routing(joined, target)
            }
        return result

    def _logits(self, nets: list[nn.Module], data) -> tuple[Tensor, Tensor]:
        """(N, K) of all networks side by side, and the labels."""
        outs, target = engine.evaluate.outputs(SideBySide(nets, self.amp), data)
        return outs[0], target


class SideBySide(nn.Module):
    """The logits of several networks, concatenated; engine.evaluate.outputs wants them stacked."""

    def __init__(self, nets: list[nn.Module], amp: torch.autocast) -> None:
        super().__init__()
        self.nets, self.amp = nn.ModuleList(nets), amp

    def forward(self, img: Tensor) -> Tensor:
        with self.amp():
            outs = [net(img) for net in self.nets]
        return torch.cat(outs, dim=1).float()[None]


def size_of(net: nn.Module) -> int:
    """Its parameters."""
    return sum(p.numel() for p in net.parameters())


def limited(data, n: int | None):
    """n images, drawn alike in every run."""
    if not n or n >= len(data):
        return data
    return data.subset(
        torch.randperm(len(data), generator=torch.Generator().manual_seed(0))[:n].to(data.device)
    )
