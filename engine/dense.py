"""What train_dense.py is made of besides its loop: the two tasks, the pictures of a step, and students."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dataset.average_precision import average_precision
from dataset.dense import DenseMetrics
from engine.meter import Meter
from engine.processes import gathered, processes, rank, same_buffers
from engine.record import Record, on_cpu, save_checkpoint, tested, write_json
from methods.dense import Dense
from models.dense import Detected, enlarged, segment

SHOWN = (1, 5, 14, 17)  # pictures of the test set that the figure shows
SURE = 0.5  # boxes that it shows
TEST_BATCH = 16


@dataclass
class Given:
    """A batch as networks take it."""

    x: Any  # (N, 3, H, W), or torchvision's ImageList
    target: Any  # (N, H, W); a list of boxes and labels, in pixels of x; None: not known


@dataclass
class Probe:
    """What a loss may be built from: what student and teacher say of a few images, and sizes."""

    s: Any
    t: Any
    num_classes: int
    pictures: int  # of the training set


class Segmentation:
    """A class for every pixel. The figure is mIoU: the mean over classes of intersection over union."""

    key, shown, clip = 'miou', ('miou', 'accuracy'), None

    def __init__(self, world: 'World', net: nn.Module) -> None:
        self.world = world

    def given(self, images: list[Tensor], targets: list[Tensor] | None) -> Given:
        x, y = (
            None if part is None else torch.stack(part).to(self.world.device) for part in (images, targets)
        )
        return Given(x.contiguous(memory_format=torch.channels_last), y)

    def look(self, net: nn.Module, given: Given):
        with self.world.amp():
            return segment(net, given.x)

    def loss(self, seen, given: Given) -> Tensor:
        return seen.loss(given.target)

    @torch.no_grad()
    def measure(self, net: nn.Module) -> dict[str, float]:
        world = self.world
        metrics = DenseMetrics(('seg',), world.num_classes, world.device)
        for images, targets in batches(world.test, share(len(world.test))):
            given = self.given(images, targets)
            out = self.look(net, given).out
            metrics.add([enlarged(out, given.target.shape[1:])], {'seg': given.target})
        metrics.merge(gathered(metrics.state()))
        read = metrics.read()
        return {key: read[key] for key in self.shown}

    @torch.no_grad()
    def example(self, net: nn.Module, i: int) -> np.ndarray:
        image, target = self.world.test[i]
        out = self.look(net, self.given([image], None)).out
        return enlarged(out, target.shape)[0].argmax(dim=0).cpu().numpy().astype(np.int16)

    @staticmethod
    def truth(target: Tensor) -> np.ndarray:
        return target.numpy().astype(np.int16)


class Detection:
    """Boxes around objects. The figure is AP, COCO's average precision."""

    key, shown, clip = 'ap', ('ap', 'ap50', 'ap75'), 10.0

    def __init__(self, world: 'World', net: nn.Module) -> None:
        self.world, self.transform = world, net.transform  # all networks of a training have the same

    def given(self, images: list[Tensor], targets: list[dict] | None) -> Given:
        to, keys = self.world.device, ('boxes', 'labels')
        images = [image.to(to) for image in images]
        targets = targets and [{key: target[key].to(to) for key in keys} for target in targets]
        x, targets = self.transform(images, targets)
        x.tensors = x.tensors.contiguous(memory_format=torch.channels_last)
        return Given(x, targets)

    def look(self, net: nn.Module, given: Given) -> Detected:
        return Detected(net, given.x, given.target, self.world.amp)

    def loss(self, seen: Detected, given: Given) -> Tensor:
        return seen.loss()

    @torch.no_grad()
    def measure(self, net: nn.Module) -> dict[str, float]:
        test, pairs = self.world.test, []
        for images, targets in batches(test, share(len(test)), one_size=False):
            pairs += zip(targets, on_cpu(self.found(net, images)))
        shares = gathered(pairs)
        pairs = [shares[i % len(shares)][i // len(shares)] for i in range(len(test))]
        return average_precision([truth for truth, _ in pairs], [found for _, found in pairs])

    def found(self, net: nn.Module, images: list[Tensor]) -> list[dict[str, Tensor]]:
        with self.world.amp():
            return net([image.to(self.world.device) for image in images])

    @torch.no_grad()
    def example(self, net: nn.Module, i: int) -> np.ndarray:
        (found,) = self.found(net, [self.world.test[i][0]])
        sure = found['scores'] > SURE
        return rows(found['boxes'][sure], found['labels'][sure])

    @staticmethod
    def truth(target: dict) -> np.ndarray:
        return rows(target['boxes'], target['labels'])


TASKS = {'segmentation': Segmentation, 'detection': Detection}


def rows(boxes: Tensor, labels: Tensor, most: int = 20) -> np.ndarray:
    """Boxes and their labels as an array of `most` rows, label 0 where there are no more."""
    made = np.zeros((most, 5), np.float32)
    found = torch.cat([boxes.float(), labels[:, None].float()], dim=1)[:most].cpu().numpy()
    made[: len(found)] = found
    return made


def share(n: int) -> range:
    """Which of n test pictures this process looks at."""
    return range(rank(), n, processes())


def batches(data, chosen, one_size: bool = True):
    """(images, targets), lists, in order; one_size: pictures of one size go together."""
    images, targets = [], []
    for i in chosen:
        image, target = data[i]
        full = len(images) == TEST_BATCH or (one_size and images and image.shape != images[-1].shape)
        if full:
            yield images, targets
            images, targets = [], []
        images.append(image)
        targets.append(target)
    if images:
        yield images, targets


# ------------------------------------------------------------------------------------ what all students share


@dataclass
class World:
    """Pictures, teacher, and what a training is."""

    test: Any
    num_classes: int
    device: torch.device
    amp: Callable
    seed: int
    steps: int
    batches: Any  # number of a step -> its pictures, see dataset/annotated.py
    pictures: int  # that have labels
    task: Any = None
    net_t: nn.Module | None = None
    facts: dict | None = None  # figures of the teacher


class Look:
    """The pictures of one step, the same for every student; what the teacher says of them, once."""

    def __init__(self, world: World, step: int, parts: dict | None = None) -> None:
        self.world, self.step = world, step
        self.parts = world.batches[step] if parts is None else parts
        self.generator = torch.Generator(world.device)
        self._given, self._teacher = {}, {}

    def part(self, method: Dense) -> str:
        """Which pictures a loss is fed: those without labels where there are some and it can do with them."""
        return 'labelled' if method.labels or 'unlabelled' not in self.parts else 'unlabelled'

    @property
    def number(self) -> int:
        process = 7 + 7919 * rank()  # samplers and dropout draw other numbers in each
        return ((self.world.seed * 1_000_003 + process) * 1_000_003 + self.step) % 2**63

    def seed(self) -> None:
        """For all that draws in a student's step, torchvision's samplers, say: a function of the step."""
        torch.manual_seed(self.number)
        self.generator.manual_seed(self.number)

    def given(self, part: str) -> Given:
        if part not in self._given:
            with torch.random.fork_rng(devices=[]):  # once for all students: it must not move what they draw
                torch.manual_seed(self.number)
                self._given[part] = self.world.task.given(*self.parts[part])
        return self._given[part]

    def teacher(self, part: str):
        if part not in self._teacher:
            given = self.given(part)
            with torch.no_grad():
                self._teacher[part] = self.world.task.look(self.world.net_t, given)
        return self._teacher[part]

    def heard(self) -> list[Tensor]:
        """What the teacher has said in this step: logits, or the maps of a detector."""
        said = self._teacher.values()
        return [x for t in said for x in (t.fms if isinstance(t, Detected) else [t.out])]


class Batch:
    """What a feed may ask for besides the two networks' maps."""

    def __init__(self, seen: Look, part: str) -> None:
        self.given, self.generator = seen.given(part), seen.generator

    @property
    def target(self) -> Tensor:
        """Classes of pixels (N, H, W), -1 where there is none."""
        return self.given.target

    @property
    def boxes(self) -> list[Tensor]:
        """Per picture (M, 4), in pixels of the padded batch."""
        return [target['boxes'] for target in self.given.target]

    @property
    def image_size(self) -> tuple[int, int]:
        """Of the padded batch."""
        return tuple(self.given.x.tensors.shape[2:])


# ------------------------------------------------------------------------------------------------ one student


@dataclass
class Term:
    """A method of a student."""

    name: str
    method: Dense
    kd: nn.Module
    weight: float


@dataclass
class Run:
    """One student in training: everything that belongs to it and to no other."""

    name: str
    terms: list[Term]
    net: nn.Module
    opt: torch.optim.Optimizer
    meter: Meter
    world: World
    record: Record = None

    @cached_property
    def parameters(self) -> list[nn.Parameter]:
        return [p for group in self.opt.param_groups for p in group['params']]

    def train(self, mode: bool) -> None:
        """At its end, also for the checkpoint, all processes have the batch norm statistics of the first."""
        for module in (self.net, *(term.kd for term in self.terms)):
            module.train(mode)
            if not mode:
                same_buffers(module)


class StepRecord(Record):
    """A record whose rows are evaluations after a number of steps."""

    def finish(self, weights: str, facts: dict) -> str:
        save_checkpoint(self.folder / weights, self._weights())
        figures = [tested(row) | {'step': row['step']} for row in (self.history[-1], self.best)]
        for row in figures:
            del row['epoch']
        write_json(self.folder / 'results.json', facts | {
            'last': figures[0],
            'best': figures[1] | {'selected_on': 'test data'},
            'curve': [round(row[self.key], 4) for row in self.history],
            'seconds': round(sum(row['seconds'] for row in self.history), 1),
            'recipe': self.math_args,
            **self.origin,
        })  # fmt: skip
        return ', '.join(f'{key} {value:.2f}' for key, value in figures[0].items() if key != 'step')
