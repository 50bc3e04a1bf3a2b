"""Parts of a data set by class, for teachers that each know some of the classes."""

import math
import random
import re

import torch
from torch import Tensor


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
    classes, wrong = [], f'classes must be distinct and lie in 0..{num_classes - 1}, got {text!r}'
    for word in text.split(','):
        found = re.fullmatch(r'(\d+)(?:-(\d+))?', word.strip())
        if not found:
            raise ValueError(f'classes are written like 0-2,7, got {text!r}')
        first, last = int(found[1]), int(found[2] or found[1])
        if not first <= last < num_classes:  # before a list is made of it: it may be very long
            raise ValueError(wrong)
        classes += range(first, last + 1)
    if len(set(classes)) < len(classes):
        raise ValueError(wrong)
    return classes


def spelled(classes: list[int]) -> str:
    """[0, 1, 2, 7] -> '0-2,7', which read_classes reads."""
    runs = []
    for c in classes:
        if runs and c == runs[-1][-1] + 1:
            runs[-1].append(c)
        else:
            runs.append([c])
    return ','.join(f'{run[0]}-{run[-1]}' if len(run) > 1 else str(run[0]) for run in runs)


def take_classes(data, classes: list[int]):
    """The images of these classes; label = position in the list. Those without a label are left out.

    Raises:
        ValueError: none of the images is of these classes.
    """
    position = torch.full((data.num_classes,), -1, dtype=torch.int64, device=data.device)
    position[classes] = torch.arange(len(classes), device=data.device)
    known = data.targets >= 0  # not NO_LABEL
    label = torch.where(known, position[data.targets.clamp(min=0)], -1)
    index = (label >= 0).nonzero()[:, 0]
    names = data.class_names and [data.class_names[c] for c in classes]
    if not len(index):
        raise ValueError(f'there are no images of the classes {names or classes}')
    return data.subset(index, label, len(classes), names)


def unseen(data, classes: list[int] | None) -> str:
    """A line for the log on classes without an image in a test set; '' if every class has some.

    data: cut to these classes, None for all.
    """
    counts = torch.bincount(data.targets[data.targets >= 0], minlength=data.num_classes)
    absent = (counts == 0).nonzero()[:, 0].tolist()
    if not absent:
        return ''
    names = [classes[k] if classes else k for k in absent]
    names = [f'{c} ({data.class_names[k]})' if data.class_names else str(c) for c, k in zip(names, absent)]
    more = f' and {len(names) - 8} more' if len(names) > 8 else ''
    return (
        f'no test images of the classes [{", ".join(names[:8])}{more}]: accuracies are those of the others, '
        f'nan where there are none'
    )


class ClassParts:
    """Who knows which classes: the teachers' parts, and the student's classes in order.

    Args:
        parts: per teacher its classes, in the order of its logits.
        wanted: the student's classes, None for all that any teacher knows. Teachers are cut to those they
            have of them.

    The student's classes are in the teachers' order, since losses join the teachers' logits; in the order of
    wanted where teachers share some of them.

    Attributes: classes, of the student; columns, per teacher the logits that are used; blocks, per teacher
    where they lie in the student's logits.

    Raises:
        ValueError: parts overlap although everything is wanted; a teacher knows none of the wanted classes; a
            wanted class that no teacher knows.
    """

    def __init__(self, parts: list[list[int]], wanted: list[int] | None = None) -> None:
        everything = [c for part in parts for c in part]
        shared = sorted({c for c in everything if everything.count(c) > 1})
        if shared and wanted is None:
            raise ValueError(
                f'the teachers share the classes {shared}: parts must not overlap, or say --wanted'
            )
        self.classes = wanted or everything
        if unknown := sorted(set(self.classes) - set(everything)):
            raise ValueError(f'no teacher knows the classes {unknown}')
        if not set(shared) & set(self.classes):
            self.classes = [c for c in everything if c in self.classes]
        self.parts = parts
        self.columns = [[part.index(c) for c in self.classes if c in part] for part in parts]
        self.blocks = [[k for k, c in enumerate(self.classes) if c in part] for part in parts]
        for i, block in enumerate(self.blocks):
            if not block:
                raise ValueError(f'teacher {i + 1} knows none of the classes {self.classes}')

    @property
    def overlap(self) -> bool:
        """Whether teachers share classes of the student."""
        return sum(map(len, self.blocks)) > len(self.classes)

    def metrics(self, out: Tensor, target: Tensor) -> dict[str, float]:
        """Percent on a test set: out (N, K), target (N,) among the student's classes.

        top1, top5: argmax over all classes. part1, part2, ...: images of this part, argmax among its classes
        (the task is known); part1_joint, ...: the same images, argmax over all.
        """
        ranked = out.topk(min(5, out.shape[1]), dim=1).indices == target[:, None]
        result = {'top1': _percent(ranked[:, 0]), 'top5': _percent(ranked.any(dim=1))}
        for number, block in enumerate(self.distinct(), 1):
            mine = torch.isin(target, torch.tensor(block, device=target.device))
            within = out[mine][:, block].argmax(dim=1)
            chosen = torch.tensor(block, device=target.device)[within]
            result[f'part{number}'] = _percent(chosen == target[mine])
            result[f'part{number}_joint'] = _percent(ranked[mine, 0])
        return result

    def routing(self, out: Tensor, target: Tensor) -> list[list[float]]:
        """[i][j]: percent of the images of part i whose argmax falls into block j."""
        blocks = [torch.tensor(block, device=target.device) for block in self.distinct()]
        choice = out.argmax(dim=1)
        return [[_percent(torch.isin(choice[torch.isin(target, a)], b)) for b in blocks] for a in blocks]

    def distinct(self) -> list[list[int]]:
        """The blocks, those of several teachers once."""
        return [list(block) for block in dict.fromkeys(map(tuple, self.blocks))]


def _percent(hits: Tensor) -> float:
    return 100 * (int(hits.sum()) / len(hits)) if len(hits) else math.nan


def few_per_class(data, per_class: int, seed: int):
    """per_class images of every class (all that a class has, if fewer), chosen by the seed.

    The choice of fewer images is part of the choice of more.
    """
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed)).to(data.device)
    labels = data.targets[order]
    return data.subset(torch.cat([order[labels == c][:per_class] for c in range(data.num_classes)]))
