"""The embedded rooms as a data set of objects with boxes, for small detectors."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from .scenes import TEST, UNLABELLED, objects, refuse_too_many, scene
from .views import count_steps

KINDS = ('box', 'sphere', 'cylinder')


class Boxes:
    """Rooms in memory with the kinds and boxes of what stands in them.

    Args:
        images: (N, 3, S, S) float32 in 0..1.
        kinds: per image (M,) int64, positions in KINDS.
        boxes: per image (M, 4) float32: centre x, centre y, width, height in 0..1.

    Batches are (img, kinds, boxes): img minus 0.5. Training batches are mirrored left to right or not, as a
    whole; order and mirroring are a function of (seed, epoch).
    """

    def __init__(self, images: Tensor, kinds: list[Tensor], boxes: list[Tensor]) -> None:
        self.images, self.kinds, self.boxes = images, kinds, boxes

    def __len__(self) -> int:
        return len(self.images)

    def of(self, wanted: list[int]) -> 'Boxes':
        """The same images, with labels of these kinds only: a kind's number is its position in the list."""
        masks = [torch.isin(kind, torch.tensor(wanted)) for kind in self.kinds]
        number = torch.full((len(KINDS),), -1)
        number[wanted] = torch.arange(len(wanted))
        kinds = [number[kind[mask]] for kind, mask in zip(self.kinds, masks)]
        return Boxes(self.images, kinds, [box[mask] for box, mask in zip(self.boxes, masks)])

    def steps(self, batch_size: int) -> int:
        return count_steps(len(self), batch_size, (0, 1))

    def train_batches(self, batch_size: int, seed: int, epoch: int) -> Iterator[tuple[Tensor, list, list]]:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        order = torch.randperm(len(self), generator=generator)
        for index in order.split(batch_size):
            mirrored = bool(torch.randint(2, (), generator=generator))
            if len(index) > 1:  # batch norm needs two
                yield self._batch(index, mirrored)

    def test_batches(self, batch_size: int) -> Iterator[tuple[Tensor, list, list]]:
        for index in torch.arange(len(self)).split(batch_size):
            yield self._batch(index, False)

    def _batch(self, index: Tensor, mirrored: bool) -> tuple[Tensor, list, list]:
        img = self.images[index] - 0.5
        kinds, boxes = ([rows[i] for i in index.tolist()] for rows in (self.kinds, self.boxes))
        if mirrored:
            img = img.flip(3)
            boxes = [torch.cat([1 - box[:, :1], box[:, 1:]], dim=1) for box in boxes]
        return img, kinds, boxes


def load_boxes(n: int, size: int) -> tuple[Boxes, Boxes, Boxes]:
    """n rooms with labels for teachers, n others for students, and n / 10 (at least 10) for measuring."""
    refuse_too_many(n)
    counts = (0, n), (UNLABELLED, n), (TEST, max(n // 10, 10))
    return tuple(_rooms(range(first, first + count), size) for first, count in counts)


def _rooms(numbers: range, size: int) -> Boxes:
    images = torch.from_numpy(np.stack([scene(i, size=size)[0] for i in numbers]))
    kinds, boxes = zip(*(map(torch.from_numpy, objects(i, size=size)) for i in numbers))
    return Boxes(images, list(kinds), list(boxes))
