"""Batches: each process's share of an epoch, and further views, their seeds, the strong augmentation."""

import zlib
from collections.abc import Iterator

import torch
import torchvision.transforms.v2 as transforms
from torch import Tensor

GREY = (125, 123, 114)  # fills a cut-out, as in MLKD's code


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
