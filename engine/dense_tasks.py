"""What a training of train_dense.py is, and its two tasks: batch, look, loss, measurement, example."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dataset.average_precision import average_precision
from dataset.dense import DenseMetrics
from engine.processes import gathered, processes, rank
from engine.record import on_cpu
from models.dense import Detected, enlarged, segment

SHOWN = (1, 5, 14, 17)  # pictures of the test set that the figure shows
SURE = 0.5  # boxes that it shows
TEST_BATCH = 16


@dataclass
class Setting:
    """Pictures, teacher, and what a training is."""

    test: Any
    num_classes: int
    device: torch.device
    amp: Callable
    seed: int
    steps: int
    batches: Any  # number of a step -> its pictures, see dataset/annotated.py
    pictures: int  # that have labels
    unlabelled: int = 0  # further ones
    class_names: Sequence[str] = ()
    augmented: dict = field(default_factory=dict)  # what --augment says, and how labels were dealt out
    task: 'Segmentation | Detection | None' = None
    net_t: nn.Module | None = None
    facts: dict | None = None  # figures of the teacher


@dataclass
class Given:
    """A batch as networks take it."""

    x: Any  # (N, 3, H, W), or torchvision's ImageList
    target: Any  # (N, H, W); a list of boxes and labels, in pixels of x; None: not known


class Segmentation:
    """A class for every pixel. The figure is mIoU: the mean over classes of intersection over union."""

    key, shown = 'miou', ('miou', 'accuracy')

    def __init__(self, setting: Setting, net: nn.Module) -> None:
        self.setting = setting

    def given(self, images: list[Tensor], targets: list[Tensor] | None) -> Given:
        x, y = (
            None if part is None else torch.stack(part).to(self.setting.device) for part in (images, targets)
        )
        return Given(x.contiguous(memory_format=torch.channels_last), y)

    def look(self, net: nn.Module, given: Given):
        with self.setting.amp():
            return segment(net, given.x)

    def loss(self, seen, given: Given) -> Tensor:
        return seen.loss(given.target)

    def clipped(self, parameters) -> None:
        """Gradients stay as they are."""

    @torch.no_grad()
    def measure(self, net: nn.Module) -> dict[str, float]:
        setting = self.setting
        metrics = DenseMetrics(('seg',), setting.num_classes, setting.device)
        for images, targets in batches(setting.test, share(len(setting.test))):
            given = self.given(images, targets)
            out = self.look(net, given).out
            metrics.add([enlarged(out, given.target.shape[1:])], {'seg': given.target})
        metrics.merge(gathered(metrics.state()))
        read = metrics.read()
        return {key: read[key] for key in self.shown}

    @torch.no_grad()
    def example(self, net: nn.Module, i: int) -> np.ndarray:
        image, target = self.setting.test[i]
        out = self.look(net, self.given([image], None)).out
        return enlarged(out, target.shape)[0].argmax(dim=0).cpu().numpy().astype(np.int16)

    @staticmethod
    def truth(target: Tensor) -> np.ndarray:
        return target.numpy().astype(np.int16)


class Detection:
    """Boxes around objects. The figure is AP, COCO's average precision."""

    key, shown = 'ap', ('ap', 'ap50', 'ap75')

    def __init__(self, setting: Setting, net: nn.Module) -> None:
        self.setting, self.transform = setting, net.transform  # all networks of a training have the same

    def given(self, images: list[Tensor], targets: list[dict] | None) -> Given:
        to, keys = self.setting.device, ('boxes', 'labels')
        images = [image.to(to) for image in images]
        targets = targets and [{key: target[key].to(to) for key in keys} for target in targets]
        x, targets = self.transform(images, targets)
        x.tensors = x.tensors.contiguous(memory_format=torch.channels_last)
        return Given(x, targets)

    def look(self, net: nn.Module, given: Given) -> Detected:
        return Detected(net, given.x, given.target, self.setting.amp)

    def loss(self, seen: Detected, given: Given) -> Tensor:
        return seen.loss()

    def clipped(self, parameters) -> None:
        """Gradients are no longer than that all together: a first step of untrained heads can be huge."""
        nn.utils.clip_grad_norm_(parameters, 10.0)

    @torch.no_grad()
    def measure(self, net: nn.Module) -> dict[str, float]:
        test, pairs = self.setting.test, []
        for images, targets in batches(test, share(len(test)), one_size=False):
            pairs += zip(targets, on_cpu(self.found(net, images)))
        shares = gathered(pairs)
        pairs = [shares[i % len(shares)][i // len(shares)] for i in range(len(test))]
        return average_precision([truth for truth, _ in pairs], [found for _, found in pairs])

    def found(self, net: nn.Module, images: list[Tensor]) -> list[dict[str, Tensor]]:
        with self.setting.amp():
            return net([image.to(self.setting.device) for image in images])

    @torch.no_grad()
    def example(self, net: nn.Module, i: int) -> np.ndarray:
        (found,) = self.found(net, [self.setting.test[i][0]])
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
