"""Teachers of different tasks and widths into one backbone, judged by linear probes of its embedding.

A task is to tell some classes (--t_classes) or some attributes (--t_attributes) apart. The student is given
no label and no task: it learns the teachers' embeddings and maps, through heads that are thrown away. A probe
is a linear classifier on the embedding of a frozen network, fitted with labels of up to PROBE images.
"""

import copy
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dataset
import engine.data
import models
from dataset.labels import labelled_cross_entropy
from engine.batch import as_float
from engine.device import autocast, exact
from engine.errors import UserError, user_errors
from engine.flags import head_of, refuse_given
from engine.processes import gathered, same_buffers
from engine.teachers import OWN_HEAD

from .attributes import names_in
from .classes import limited, size_of

PROBE = 5000
# flags that one kind of data reads, and their defaults
OF_CLASSES = {'num_parts': None, 'split': 'contiguous', 't_classes': None}
OF_ATTRIBUTES = {'t_attributes': [], 'size': 48}


@dataclass
class Task:
    """What a teacher was trained for: heads that choose one of `choices` each."""

    name: str
    columns: list[int]  # classes, or the numbers of the attributes
    binary: bool  # a head per attribute, instead of one for the classes
    class_names: list[str] | None  # of the teacher's logits

    @property
    def heads(self) -> int:
        return len(self.columns) if self.binary else 1

    @property
    def choices(self) -> int:
        return 2 if self.binary else len(self.columns)

    def labels(self, target: Tensor) -> Tensor:
        """(N, heads); -1 for images that are not of the task."""
        if target.dim() == 2:
            return target[:, self.columns]
        own = torch.tensor(self.columns, device=target.device)
        hit = target[:, None] == own
        return torch.where(hit.any(dim=1), hit.long().argmax(dim=1), -1)[:, None]


class Backbones:
    """Several teachers of different tasks and widths; students are backbones for all of them."""

    name, data, data_help = 'backbones', (*dataset.DATA, *dataset.ATTRIBUTE_DATA), ''
    networks, key = 'backbones: as above', 'mean'
    also_reads = ('num_parts', 'split', 't_classes', 'limit_train', 'limit_test', 't_attributes', 'size')
    blocks, tasks = (), ()

    @staticmethod
    def add_flags(parser) -> None:
        """None of its own."""

    def __init__(self, args, wanted: dict, device, log) -> None:
        faces = args.data_name.partition(':')[0] in dataset.ATTRIBUTE_DATA
        refuse_given(args, OF_CLASSES if faces else OF_ATTRIBUTES, f'not for --data_name {args.data_name}')
        self.args, self.amp = args, autocast(device, args.amp)
        names = args.t_name * len(args.t_model) if len(args.t_name) == 1 else args.t_name
        if len(names) != len(args.t_model) or not names:
            raise UserError(
                f'--t_name and --t_model: needs as many of each, got {len(args.t_name)}, {len(args.t_model)}'
            )
        (self._attributes if faces else self._classes)(args, len(names), device, log)
        self.train, self.test = limited(self.train, args.limit_train), limited(self.test, args.limit_test)
        self.few = limited(self.train, PROBE)  # drawn: a folder's images come class by class
        if len(self.of) != len(names):
            flags = '--t_attributes' if faces else '--num_parts or --t_classes'
            raise UserError(
                f'{len(self.of)} tasks for {len(names)} teachers: say {flags}, one list per teacher'
            )
        self.nets, figures = [], []
        for i, (name, path, task) in enumerate(zip(names, args.t_model, self.of), 1):
            net, right = self._teacher(i, name, path, task, log)
            self.nets.append(net)
            figures.append({'name': name, 'task': task.name, 'accuracy': right, 'parameters': size_of(net)})
        self.student_name = args.s_name or names[0]
        self.initial = self._initial(args, log)
        self.shown = ('mean', *(f'task{i}' for i in range(1, len(names) + 1)))
        self.facts = {'teacher': '+'.join(names), 'probes': [task.name for task in self.of],
                      'teachers': figures, 'probe_images': len(self.few)}  # fmt: skip
        self.recipe = {'probes': [task.name for task in self.of], 'probe_images': PROBE}

    def _classes(self, args, teachers: int, device, log) -> None:
        self.train, self.val, self.test = engine.data.load_data(args, device, log)
        with user_errors():
            if args.t_classes:
                parts = [dataset.read_classes(text, self.train.num_classes) for text in args.t_classes]
            else:
                parts = dataset.split_classes(
                    self.train.num_classes, args.num_parts or teachers, args.split, args.seed
                )
        names = self.train.class_names
        self.of = [
            Task(', '.join(str(names[c] if names else c) for c in part), part, False,
                 [names[c] for c in part] if names else None)
            for part in parts
        ]  # fmt: skip

    def _attributes(self, args, teachers: int, device, log) -> None:
        with user_errors():
            self.train, self.val, self.test = dataset.load_attributes(
                args.data_name, args.img_root, device, args.size, labelled=False
            )
            self.train.pad = args.pad
            if args.val_split:
                self.train, self.val = self.train.split(args.val_split, args.seed)
            parts = [self.test.take(names_in(text)) for text in args.t_attributes]
        engine.data.share(self.train, self.val, self.test)
        where = self.test.names.index
        self.of = [Task(', '.join(p.names), [where(n) for n in p.names], True, p.class_names) for p in parts]

    def _teacher(self, i: int, name: str, path: str, task: Task, log) -> tuple[nn.Module, float]:
        """A frozen teacher, and its accuracy in its own task."""
        try:
            net = models.build_for(path, name, task.heads * task.choices)
            said = models.load_weights(net, path, class_names=task.class_names, head=OWN_HEAD)
        except ValueError as error:
            raise UserError(f'teacher {i} ({name} for {task.name}): {error}') from None
        net.requires_grad_(False).eval().to(self.test.device, memory_format=torch.channels_last)
        out, target = self._read(net, self.test, lambda f: f.out)
        if not math.isfinite(float(out.abs().max())):
            raise UserError(f'{path}: the teacher is not finite')
        right = accuracy(out.unflatten(1, (task.heads, task.choices)), task.labels(target))
        log(f'teacher {i}, {name}: {said}; {task.name}: accuracy {right:.2f}')
        return net, right

    def phases(self) -> list[int]:
        return [self.args.epochs]

    def student(self, method) -> nn.Module:
        return copy.deepcopy(self.initial)

    def _initial(self, args, log) -> nn.Module:
        """What all students start from; its classifier is trained by the reference alone."""
        torch.manual_seed(args.seed)
        with user_errors():
            net = models.build(self.student_name, self.train.num_classes)
            if args.s_init:
                said = models.load_weights(net, args.s_init, new_head=args.new_head, head=head_of('--s_init'))
                log(f'initial student: {said}')
        return net

    def forward(self, net: nn.Module, batch):
        return net(batch.img, True)

    @torch.no_grad()
    def teachers_on(self, img: Tensor) -> list:
        with self.amp():
            all_t = [net(img, True) for net in self.nets]
        return [as_float(t) for t in all_t]

    def sample(self):
        """Some 1300 images, not augmented, for the scale of the teachers' maps."""
        for _, (img, *_) in zip(range(10), self.few.test_batches(128)):
            yield (img,)

    def supervised(self, s, target: Tensor) -> Tensor:
        if target.dim() == 2:
            return F.cross_entropy(s.out.unflatten(1, (-1, 2)).flatten(0, 1), target.flatten())
        return labelled_cross_entropy(s.out, target)

    def measure(self, net: nn.Module) -> dict[str, float]:
        row, known = {}, self._read(net, self.few, lambda f: f.feat)
        for half, data in (('val', self.val), ('test', self.test)):
            if data:
                row |= {f'{half}_{key}': value for key, value in self._probes(net, known, data).items()}
        return row

    def details(self, net: nn.Module) -> dict:
        return {'parameters': size_of(net)}

    def how_to_load(self, net: nn.Module, path: Path) -> str:
        return models.how_to_load(path, self.student_name, None, self.train.num_classes, self.train)

    def ensembles(self) -> dict[str, dict]:
        """Probes of every teacher's embedding for all tasks, and of the student's before its training."""
        nets = {f'teacher {i}': net for i, net in enumerate(self.nets, 1)}
        nets['untrained student'] = copy.deepcopy(self.initial).to(self.test.device)
        return {
            name: self._probes(net, self._read(net, self.few, lambda f: f.feat), self.test)
            for name, net in nets.items()
        }

    def _probes(self, net: nn.Module, known: tuple, data) -> dict[str, float]:
        """Accuracies of a probe per task, fitted on the known (embeddings, labels), and their mean."""
        feat, target = self._read(net, data, lambda f: f.feat)
        row = {}
        for i, task in enumerate(self.of, 1):
            fitted = fit_probe(known[0], task.labels(known[1]), task.choices)
            row[f'task{i}'] = accuracy(fitted(feat), task.labels(target))
        return {'mean': sum(row.values()) / len(row), **row}

    @torch.no_grad()
    def _read(self, net: nn.Module, data, what) -> tuple[Tensor, Tensor]:
        """What a network hands out of all images, and the labels."""
        net.eval()
        same_buffers(net)
        values, targets = [], []
        for img, target, _ in data.test_batches(200):
            with self.amp():
                values.append(what(net(img, True)).float().cpu())
            targets.append(target.cpu())
        shares = gathered((torch.cat(values), torch.cat(targets)))
        return tuple(torch.cat(part).to(data.device) for part in zip(*shares))


def fit_probe(feat: Tensor, labels: Tensor, choices: int, decay: float = 1e-4):
    """Logistic regression: (N, D) embeddings, (N, heads) labels -> a function from embeddings to logits.

    Embeddings are standardised, rows labelled -1 are left out, decay is on the weights. Full batches,
    float64, L-BFGS from zero: nothing is drawn.
    """
    own = (labels >= 0).any(dim=1)
    feat = exact(feat[own])
    labels = labels[own].to(feat.device)
    mean, deviation = feat.mean(dim=0), feat.std(dim=0).clamp(min=1e-6)
    x, heads = (feat - mean) / deviation, labels.shape[1]
    weight = torch.zeros(feat.shape[1], heads * choices, dtype=x.dtype, device=x.device, requires_grad=True)
    bias = torch.zeros(heads * choices, dtype=x.dtype, device=x.device, requires_grad=True)
    opt = torch.optim.LBFGS([weight, bias], max_iter=100, line_search_fn='strong_wolfe')

    def loss() -> Tensor:
        opt.zero_grad()
        out = (x @ weight + bias).unflatten(1, (heads, choices)).flatten(0, 1)
        value = F.cross_entropy(out, labels.flatten(), ignore_index=-1) + decay * weight.square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        opt.step(loss)
    weight, bias = weight.detach(), bias.detach()
    return lambda feat: (((exact(feat) - mean) / deviation) @ weight + bias).unflatten(1, (heads, choices))


def accuracy(out: Tensor, labels: Tensor) -> float:
    """Percent: out (N, heads, choices), labels (N, heads); -1 does not count."""
    labels = labels.to(out.device)
    return 100 * float((out.argmax(dim=2) == labels)[labels >= 0].cpu().double().mean())
