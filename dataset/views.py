"""Batches: each process's share of an epoch; further views of the images, and their seeds.

A new view is a function of an image, as `distort` is, and an entry of VIEWS; a row asks for it by name.
"""

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torchvision.transforms.v2 as transforms
from torch import Tensor

from .pictures import BadImage
from .strong import GREY, Strong


def view_seed(view: str, seed: int, epoch: int, image: int = 0) -> int:
    """A seed of its own for every view, epoch and image: no view's numbers depend on another's."""
    return zlib.crc32(f'{view} {seed} {epoch} {image}'.encode())


def distort(image: Tensor, seed: int) -> Tensor:
    """RandAugment (two operations of random strength), then a grey square of up to half the side.

    For one image, as Folder's workers need it; `strong.Strong` does whole batches.

    Args:
        image: (3, H, W) uint8.
        seed: decides everything; the global generator is left seeded, so fork it around a call.
    """
    torch.manual_seed(seed)
    strength, size, top, left = torch.rand(4).tolist()
    image = transforms.RandAugment(num_ops=2, magnitude=int(strength * 31))(image).clone()
    height, width = image.shape[1:]
    side = int(size * min(height, width) / 2)
    top, left = int(top * (height - side + 1)), int(left * (width - side + 1))
    image[:, top : top + side, left : left + side] = torch.tensor(GREY, dtype=image.dtype)[:, None, None]
    return image


@dataclass(frozen=True)
class View:
    """A further image for every image of a batch, cropped and flipped by random numbers of its own.

    says: what a reader is told, see `--kd_mode list`.
    partner: of an image of the same class, drawn at random: it may be the same one.
    change: (image (3, H, W) uint8, seed) -> as much, done to the crop; None: nothing.
    batched: makes the same of whole batches, on their device, see strong.Strong; None: one by one.
    """

    says: str
    partner: bool = False
    change: Callable[[Tensor, int], Tensor] | None = None
    batched: type | None = None


VIEWS = {
    'second': View('a second crop'),
    'strong': View('a strongly augmented view', change=distort, batched=Strong),
    'pair': View('an image of the class, drawn', partner=True),
    'each': View('a view per network'),  # they are called 'view 1', 'view 2', ...
}


def changed_by(view: View, name: str, image: Tensor, seed: int) -> Tensor:
    """What a view makes of one image.

    Raises:
        BadImage: it is no image like the first; floats from 0 to 1 would be a black one.
    """
    new = view.change(image, seed)
    if not isinstance(new, Tensor) or new.shape != image.shape or new.dtype != torch.uint8:
        tensor = isinstance(new, Tensor)
        got = f'{tuple(new.shape)} {new.dtype}' if tensor else f'a {type(new).__name__}'
        raise BadImage(f'view {name}: change must return {tuple(image.shape)} torch.uint8, got {got}')
    return new


def view_called(name: str) -> View:
    kind = 'each' if name.startswith('view ') else name
    if kind not in VIEWS:
        raise ValueError(f'no view is called {name!r}; there are {", ".join(VIEWS)}')
    return VIEWS[kind]


def count_steps(images: int, batch_size: int, shard: tuple[int, int] = (0, 1)) -> int:
    """Batches of an epoch; a last one that would give a process fewer than two images is left out."""
    _, processes = shard
    whole = batch_size * processes
    return images // whole + (images % whole >= 2 * processes)


def shares(order: Tensor, batch_size: int, shard: tuple[int, int] = (0, 1)) -> Iterator[Tensor]:
    """This process's part of every batch, batch_size each; shard: (this process, number of processes).

    All processes get equally many: up to processes - 1 images of the last batch are left out.
    """
    rank, processes = shard
    whole = batch_size * processes
    for batch in order[: whole * count_steps(len(order), batch_size, shard)].split(whole):
        size = len(batch) // processes
        yield batch[rank * size : (rank + 1) * size]
