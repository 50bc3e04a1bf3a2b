"""The frozen teachers."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

import models
from dataset.soft_labels import SoftLabelStore
from engine.batch import Batch, InFloat32
from engine.device import precision
from engine.errors import UserError, user_errors
from engine.evaluate import evaluate, features_of, refuse_misfit
from models import Feats, load_weights
from models.checkpoint import compare_classes


class OnlyLogits(InFloat32):
    """What stored soft labels say: logits, and nothing of the inside of a network."""

    def _read(self, name: str, k: int | None = None):
        if name != 'out':
            raise UserError(f'--soft_labels: there are logits only, and a method asks for {name}')
        return super()._read(name, k)

    @property
    def fms(self):
        return self._read('fms')

    @property
    def pres(self):
        return self._read('pres')


class Teachers:
    """What the teachers give for a batch: once for all students.

    nets: the teachers; img: a few images, on which their faster forms are made; stored: instead of networks,
    a SoftLabelStore.
    """

    def __init__(self, nets: list[nn.Module], amp, views: list[str], img: Tensor, stored=None) -> None:
        self.nets, self.amp, self.views, self.stored = nets, amp, views, stored
        self.net_t = nets[0] if nets else None
        for k, net in enumerate(nets, 1):
            features_of(f'teacher {k}', net, img)
        cast = precision(amp, img.device)
        self.fast = [models.folded(net, img, cast) for net in nets]
        self.in_float32 = self.net_t if cast else next(iter(self.fast), None)
        self.reads = [set() for _ in nets]  # what students look at, of each teacher
        self.resting = False  # no student learns from them at the moment
        self.prepare = set()  # the functions of rows that want more of the main teacher

    def __call__(self, img: Tensor, target: Tensor, index: Tensor, views: dict[str, Tensor]) -> Batch:
        """The batch with everything that all students need of it."""
        if self.resting:
            return Batch(img, target, index, views)
        if self.stored:
            if self.prepare:
                raise UserError('--soft_labels: there are logits only, and a method asks for a network')
            said = OnlyLogits(Feats(self.stored.rows(index), None, None, None))
            return Batch(img, target, index, views, [said], teacher=self.teacher)
        seen = Batch(img, target, index, views, self.teachers_on(img), teacher=self.teacher, exact=self.exact,
                     net_t=self.net_t, nets_t=self.nets)  # fmt: skip
        with torch.no_grad():
            for prepare in sorted(self.prepare, key=lambda f: f.__name__):
                seen.once[prepare] = prepare(self.net_t, seen.all_t[0], seen)
        return seen

    def teacher(self, img: Tensor) -> InFloat32:
        """The main teacher's features; differentiable with respect to img where that requires grad."""
        if self.stored:
            raise UserError('--soft_labels: there are logits only, and a method asks for a network')
        with self.amp():
            return InFloat32(self.fast[0](img, True))

    def exact(self, img: Tensor) -> InFloat32:
        """The same without the precision of --amp."""
        with torch.autocast(img.device.type, enabled=False):
            return InFloat32(self.in_float32(img, True))

    @torch.no_grad()
    def teachers_on(self, img: Tensor) -> list[InFloat32]:
        with self.amp():
            return [InFloat32(net(img, True), reads) for net, reads in zip(self.fast, self.reads)]


OWN_HEAD = 'a teacher needs a classifier for its data'


def load_teacher(
    net: nn.Module,
    path: str,
    data,
    amp: Callable[[], torch.autocast],
    scale: tuple | None = None,
    head: str = OWN_HEAD,
) -> dict[str, float]:
    """Fill, freeze and measure a teacher; one that gives non-finite logits is refused.

    scale: (mean, std) to which the network brings its images; None: they stay as the data's.
    head: as of load_weights.
    """
    with user_errors():
        names, scale = getattr(data, 'class_names', None), scale or scale_of(data)
        said = load_weights(net, path, class_names=names, scale=scale, head=head)
    net.requires_grad_(False).to(data.device, memory_format=torch.channels_last)
    refuse_misfit(path, net, data)
    measured = evaluate(net, data, amp)
    if measured['bad']:
        raise UserError(
            f'{path}: the teacher is not finite, {measured["bad"]} of its logits on the test set are not'
        )
    return measured | {'said': said}


def scale_of(data) -> tuple | None:
    """(mean, std) of a data set; None if its batches are no such images."""
    return (data.mean, data.std) if hasattr(data, 'mean') else None


def load_teachers(
    args, num_classes: int, test, amp, log, mean: list | None = None, std: list | None = None
) -> tuple[list[nn.Module], dict]:
    """The frozen teachers, and what the result files say about them.

    mean, std: of the images that they were trained on, None: as the data's.
    """
    nets, top1 = [], []
    statistics = (mean or test.mean, std or test.std)
    for name, path in zip(args.t_name, args.t_model):
        with user_errors():
            net = models.build_for(path, name, num_classes)
            if mean or std:
                models.trained_on(net, statistics, (test.mean, test.std))
        teacher = load_teacher(net, path, test, amp, statistics)
        log(f'teacher {name}: {teacher["said"]}')
        log(f'teacher {name}: top-1 {teacher["top1"]:.2f}, top-5 {teacher["top5"]:.2f} on the test set')
        nets.append(net)
        top1.append(teacher['top1'])
    facts = {'teacher': '+'.join(args.t_name) or None, 'teacher_top1': top1[0] if top1 else None}
    return nets, facts


def open_store(args, train, log) -> tuple[SoftLabelStore | None, dict]:
    """The store of --soft_labels, and what the result files say about it."""
    if not args.soft_labels:
        return None, {}
    with user_errors():
        stored = SoftLabelStore(args.soft_labels, train.device)
        stored.check(args)
        stored.read(0)
    meta = stored.meta
    if (meta['images'], meta['num_classes']) != (len(train), train.num_classes):
        raise UserError(
            f'--soft_labels {args.soft_labels}: labels of {meta["images"]} images and {meta["num_classes"]} '
            f'classes, the training set has {len(train)} and {train.num_classes}'
        )
    with user_errors():
        names = getattr(train, 'class_names', None)
        compare_classes(args.soft_labels, meta.get('class_names'), names)
    log(f'soft labels of {meta["teacher"]}: {meta["epochs"]} epochs, {meta["kind"]}, from {args.soft_labels}')
    name = f'{meta["teacher"]} ({meta["kind"]} labels)'
    return stored, {'teacher': name, 'teacher_top1': meta['teacher_top1']}
