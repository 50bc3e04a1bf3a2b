"""Teachers that know some yes-or-no attributes each, of faces; the student gets those that are wanted."""

import copy
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dataset
import engine.data
import models
from dataset.attributes import attribute_figures, majority
from engine.batch import as_float
from engine.device import autocast, exact
from engine.errors import UserError, user_errors
from engine.flags import head_of, refuse_given
from engine.processes import gathered, same_buffers
from engine.teachers import OWN_HEAD
from ka_losses.customize import select_teacher
from models.streams import StreamNet

from .classes import size_of


class Attributes:
    """Teachers of some attributes each; students have the wanted ones.

    A network has two logits per attribute, no and yes. Teachers and references read labels (scratch), of
    faces the first images; students without labels see others.
    """

    name, data, networks = (
        'attributes',
        dataset.ATTRIBUTE_DATA,
        'attributes: as above; afk: resnetN of one depth',
    )
    data_help = 'attributes: faces (embedded; faces:N for N training images) or celeba'
    key, also_reads = 'balanced', ('size', 'epochs_ft')

    @staticmethod
    def add_flags(parser) -> None:
        # fmt: off
        flag = parser.add_argument_group('attributes').add_argument
        flag('--attributes', nargs='+', default=[], metavar='NAME',
             help="faces, celeba: the student's attributes; default: all that any teacher has")
        flag('--t_attributes', nargs='+', default=[], metavar='LIST',
             help="faces, celeba: each teacher's attributes; e.g. Bangs,Smiling Eyeglasses; teachers "
                  'are cut to what is wanted')
        # fmt: on

    def __init__(self, args, wanted: dict, device, log) -> None:
        self.args, self.amp = args, autocast(device, args.amp)
        self.streams = any(method.own.student for method in wanted.values())
        if not self.streams:
            refuse_given(args, {'epochs_ft': 5}, f'{" ".join(args.ka_mode)} would not read it')
        references = all(method.needs.labels for method in wanted.values())
        with user_errors():
            train, self.val, test = dataset.load_attributes(
                args.data_name, args.img_root, device, args.size, labelled=references
            )
        train.pad = args.pad
        if args.val_split:
            train, self.val = train.split(args.val_split, args.seed)
        theirs = [names_in(text) for text in args.t_attributes]
        names = args.t_name * len(theirs) if len(args.t_name) == 1 else args.t_name
        alike = len(names) == len(theirs) == len(args.t_model) and bool(args.t_name) == bool(theirs)
        if not alike or not (theirs or references):
            raise UserError(
                f'--t_name, --t_model and --t_attributes: needs as many of each, got {len(args.t_name)}, '
                f'{len(args.t_model)} and {len(theirs)}'
            )
        known = list(dict.fromkeys(name for each in theirs for name in each))
        self.attributes = args.attributes or known or test.names
        with user_errors():
            self.nets, figures = [], []
            for i, (name, path, mine) in enumerate(zip(names, args.t_model, theirs), 1):
                net, row = self._teacher(i, name, path, test.take(mine), log)
                self.nets.append(net)
                figures.append({'name': name, 'attributes': mine, 'parameters': size_of(net), **row})
            self.train, self.test = train.take(self.attributes), test.take(self.attributes)
            self.val = self.val and self.val.take(self.attributes)
        engine.data.share(self.train, self.val, self.test)
        self._who_knows_what(theirs, wanted)
        for half, data in (('test', self.test), ('validation', self.val)):
            if data and set(majority(data.targets, self.attributes).values()) == {100}:
                raise UserError(
                    f'--attributes {" ".join(self.attributes)}: all {half} images are alike in these'
                )
        usual = majority(self.test.targets, self.attributes)
        if alike := [name for name, share in usual.items() if share == 100]:
            log(f'no balanced accuracy of {", ".join(alike)}: all test images are alike')
        self.tasks, self.student_name = (), args.s_name or (names or ['resnet20'])[0]
        made = [name for name, method in wanted.items() if method.own.student]
        for flag, given in (('--s_name', args.s_name not in (None, *names)), ('--s_init', args.s_init)):
            if given and made and len(made) == len(wanted):
                raise UserError(f'{flag}: {", ".join(made)} makes the student of the teachers')
        self.initial = self._initial(args, log)
        self.shown = ('accuracy', 'balanced')
        self.facts = {'teacher': '+'.join(names) or None, 'attributes': list(self.attributes),
                      't_attributes': theirs, 'teachers': figures, 'majority': usual,
                      'labelled': references}  # fmt: skip
        self.recipe = {'attributes': list(self.attributes), 't_attributes': theirs, 'labelled': references}

    def _who_knows_what(self, theirs: list[list[str]], wanted: dict) -> None:
        """Of each teacher the logits in use (columns), and where they are in the student's (blocks)."""
        common = [[name for name in self.attributes if name in mine] for mine in theirs]
        for i, (names, mine) in enumerate(zip(common, theirs), 1):
            if not names:
                raise UserError(
                    f'teacher {i} knows none of {", ".join(self.attributes)}, but {", ".join(mine)}'
                )
        # on the device, or every step would send the lists there and wait
        device = self.train.device
        self.columns = [_pairs(map(mine.index, names), device) for mine, names in zip(theirs, common)]
        self.blocks = [_pairs(map(self.attributes.index, names), device) for names in common]
        self.alike = len(common) > 1 and all(names == self.attributes for names in common)
        unknown = set(self.attributes) - set().union(*common)
        for name, method in wanted.items():
            if method.needs.labels:
                continue
            if unknown:
                raise UserError(f'no teacher knows {", ".join(sorted(unknown))}')
            if method.needs.shared_classes and not self.alike:
                raise UserError(f'--ka_mode {name}: wants teachers that all know all of --attributes')
            if method.needs.shared_classes and len(self.attributes) > 1:  # who is surest is asked per answer
                raise UserError(f'--ka_mode {name}: makes a component for one attribute, got '
                                f'{len(self.attributes)}; customize_target joins components')  # fmt: skip

    def _teacher(self, i: int, name: str, path: str, test, log) -> tuple[nn.Module, dict]:
        """A frozen teacher that is good for its attributes, and how good."""
        try:
            net = models.build_for(path, name, test.num_classes)
            said = models.load_weights(net, path, class_names=test.class_names, head=OWN_HEAD)
        except ValueError as error:
            raise UserError(f'teacher {i} ({name} for {", ".join(test.names)}): {error}') from None
        net.requires_grad_(False).eval().to(test.device, memory_format=torch.channels_last)
        out, target = self._outputs(net, test)
        if not math.isfinite(float(out.abs().max())):
            raise UserError(f'{path}: the teacher is not finite')
        row = attribute_figures(out, target, test.names)
        log(f'teacher {i}, {name}: {said}; {", ".join(test.names)}: accuracy {row["accuracy"]:.2f}')
        return net, row

    def phases(self) -> list[int]:
        """The training, and the fine-tuning of a student that is made of its teachers."""
        first, second = self.args.epochs, self.args.epochs_ft
        return [first, first + second] if second and self.streams else [first]

    def student(self, method) -> nn.Module:
        if not method.own.student:
            return copy.deepcopy(self.initial)
        torch.manual_seed(self.args.seed)
        with user_errors():
            return method.own.student(self.nets, [columns.tolist() for columns in self.columns])

    def _initial(self, args, log) -> nn.Module:
        """What all students start from, but for those that are made of their teachers."""
        torch.manual_seed(args.seed)
        with user_errors():
            net = models.build(self.student_name, self.train.num_classes)
            if args.s_init:
                said = models.load_weights(net, args.s_init, new_head=args.new_head, head=head_of('--s_init'))
                log(f'initial student: {said}')
        return net

    def forward(self, net: nn.Module, batch):
        return net(batch.img) if isinstance(net, StreamNet) else net(batch.img, True)

    @torch.no_grad()
    def teachers_on(self, img: Tensor) -> list:
        """Feats of every teacher, the logits cut to the attributes that are wanted."""
        with self.amp():
            all_t = [net(img, True) for net in self.nets]
        return [t._replace(out=t.out[:, columns]) for t, columns in zip(map(as_float, all_t), self.columns)]

    def sample(self):
        """Images without labels on which branch points are chosen: 400 of the training set, as they are."""
        few = self.train.subset(torch.arange(min(400, len(self.train)), device=self.train.device))
        for img, *_ in few.test_batches(100):
            yield (img,)

    def supervised(self, s, target: Tensor) -> Tensor:
        """Cross-entropy, the mean over the attributes."""
        return F.cross_entropy(s.out.unflatten(1, (-1, 2)).flatten(0, 1), target.flatten())

    def measure(self, net: nn.Module) -> dict[str, float]:
        row = {}
        for half, data in (('val', self.val), ('test', self.test)):
            if data:
                read = attribute_figures(*self._outputs(net, data), self.attributes)
                row |= {f'{half}_{key}': value for key, value in read.items()}
        return row

    def details(self, net: nn.Module) -> dict:
        """Sizes, and where the streams leave the trunk."""
        if isinstance(net, StreamNet):
            return {'parameters': net.parameters_in_use(), 'branch_points': net.points.tolist()}
        return {'parameters': size_of(net)}

    def how_to_load(self, net: nn.Module, path: Path) -> str:
        if not isinstance(net, StreamNet):
            return models.how_to_load(path, self.student_name, None, self.train.num_classes, self.train)
        nets = (f"models.build('{t['name']}', {2 * len(t['attributes'])})" for t in self.facts['teachers'])
        made = f'StreamNet([{", ".join(nets)}], {net.columns})'
        return models.how_to_fill(path, made, 'from models.streams import StreamNet')

    def ensembles(self) -> dict[str, dict]:
        """Sources of the same attributes: each by itself, and for every answer the surest of them with the
        share of the answers that it is; others: side by side.
        """
        outs = [self._outputs(net, self.test) for net in self.nets]
        target = outs[0][1]
        outs = [out[:, columns] for (out, _), columns in zip(outs, self.columns)]
        if self.alike:
            pairs = torch.stack(outs).unflatten(2, (-1, 2))  # of each source, image and attribute: no, yes
            which = select_teacher(list(pairs.flatten(1, 2))).view(pairs.shape[1:3])
            surest = pairs.gather(0, which[None, ..., None].expand(1, -1, -1, 2))[0].flatten(1)
            rows = {f'source {i}': self._read(out, target) for i, out in enumerate(outs, 1)}
            for i, row in enumerate(rows.values()):
                row['surest_of'] = 100 * float(exact(which == i).mean())
            return rows | {'the surest source': self._read(surest, target)}
        known = torch.cat(self.blocks).unique()
        if len(known) < 2 * len(self.attributes):
            return {}
        return {'side by side': self._read(self._joined(outs), target)}

    def _read(self, out: Tensor, target: Tensor) -> dict[str, float]:
        return attribute_figures(out, target, self.attributes)

    def _joined(self, outs: list[Tensor]) -> Tensor:
        """Logits of streams or teachers in the student's order; the mean where several have an attribute."""
        joined = outs[0].new_zeros(len(outs[0]), 2 * len(self.attributes))
        times = joined.new_zeros(joined.shape[1])
        for out, block in zip(outs, self.blocks):
            joined[:, block] += out
            times[block] += 1
        return joined / times.clamp(min=1)

    @torch.no_grad()
    def _outputs(self, net: nn.Module, data) -> tuple[Tensor, Tensor]:
        """(N, 2 A) and the labels, of all test images."""
        net.eval()
        same_buffers(net)
        outs, targets = [], []
        for img, target, _ in data.test_batches(200):
            with self.amp():
                out = net(img)
            out = self._joined(out) if isinstance(out, list) else out
            outs.append(out.float().cpu())
            targets.append(target.cpu())
        shares = gathered((torch.cat(outs), torch.cat(targets)))
        return tuple(torch.cat(part).to(data.device) for part in zip(*shares))


def names_in(text: str) -> list[str]:
    """'Bangs, Smiling' -> ['Bangs', 'Smiling']."""
    return [name.strip() for name in text.split(',')]


def _pairs(numbers, device) -> Tensor:
    """Attributes to their logits: 0, 2 -> 0, 1, 4, 5."""
    return torch.tensor([2 * k + yes for k in numbers for yes in (0, 1)], device=device)
