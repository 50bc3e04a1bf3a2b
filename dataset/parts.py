"""Parts of a data set by class, for teachers that each know a part of the world."""

import random
import re

import torch


def split_classes(
    num_classes: int, num_parts: int, how: str = 'contiguous', seed: int = 0
) -> list[list[int]]:
    """The classes 0..num_classes-1 in num_parts lists of as equal length as possible.

    Args:
        how: 'contiguous' (0 1 2 | 3 4), 'interleaved' (0 2 4 | 1 3), or 'random' after seed.

    Raises:
        ValueError: unknown `how`, or fewer classes than parts.
    """
    if not 1 <= num_parts <= num_classes:
        raise ValueError(f'num_parts must be 1 to {num_classes}, the number of classes, got {num_parts}')
    classes = list(range(num_classes))
    if how == 'interleaved':
        return [classes[part::num_parts] for part in range(num_parts)]
    if how == 'random':
        random.Random(seed).shuffle(classes)
    elif how != 'contiguous':
        raise ValueError(f'split must be contiguous, interleaved or random, got {how!r}')
    ends = [round(part * num_classes / num_parts) for part in range(num_parts + 1)]
    return [classes[a:b] for a, b in zip(ends, ends[1:])]


def read_classes(text: str, num_classes: int) -> list[int]:
    """'0-2,7' -> [0, 1, 2, 7].

    Raises:
        ValueError: not of this form, a class twice, or one that the data does not have.
    """
    classes = []
    for word in text.split(','):
        found = re.fullmatch(r'(\d+)(?:-(\d+))?', word.strip())
        if not found:
            raise ValueError(f'classes are written like 0-2,7, got {text!r}')
        first, last = int(found[1]), int(found[2] or found[1])
        classes += range(first, last + 1)
    if not classes or len(set(classes)) < len(classes) or max(classes) >= num_classes:
        raise ValueError(f'classes must be distinct and lie in 0..{num_classes - 1}, got {text!r}')
    return classes


def take_classes(data, classes: list[int]):
    """The images of these classes; label = position in the list.

    Raises:
        ValueError: the data is not held in memory (a folder of images).
    """
    if not hasattr(data, 'targets'):
        raise ValueError('classes can be taken of cifar10, cifar100 and shapes, not of a folder of images')
    position = torch.full((data.num_classes,), -1, dtype=torch.int64, device=data.device)
    position[classes] = torch.arange(len(classes), device=data.device)
    label = position[data.targets]
    return data.subset((label >= 0).nonzero()[:, 0], label, len(classes))
