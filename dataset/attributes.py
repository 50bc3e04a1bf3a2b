"""Images with yes-or-no attributes: the embedded faces, and CelebA."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from .celeba import read_celeba
from .faces import LABELLED, NAMES, TEST, UNLABELLED, faces
from .folder import MEAN, STD
from .resident import Resident

ATTRIBUTE_DATA = ('faces', 'celeba')
_FACES = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


class Attributes(Resident):
    """A Resident whose labels are (N, A), a zero or one for each attribute.

    A network for it has two logits per attribute, no and yes, so num_classes is 2 A and class_names are
    'not Smiling', 'Smiling', ...: files of weights carry them, and weights for other attributes, or in
    another order, are refused.

    Args:
        images: (N, H, W, 3) uint8.
        targets: (N, A) of zeros and ones.
        names: of the A attributes.
        mean, std, device: as of Resident.
    """

    def __init__(self, images: Tensor, targets: Tensor, names: Sequence[str], mean, std, device) -> None:
        self.names = list(names)
        both = [word for name in names for word in (f'not {name}', name)]
        super().__init__(images, targets.long(), len(both), mean, std, device, both)

    def take(self, names: Sequence[str]) -> 'Attributes':
        """The same images with the labels of these attributes, in this order.

        Raises:
            ValueError: an attribute that the data does not have, or one named twice.
        """
        if unknown := [name for name in names if name not in self.names]:
            raise ValueError(f'no attribute is called {unknown[0]!r}; there are {", ".join(self.names)}')
        if len(set(names)) < len(names) or not names:
            raise ValueError(f'attributes must be named once each, got {", ".join(names) or "none"}')
        columns = [self.names.index(name) for name in names]
        return self._named(self.images, self.targets[:, columns], names)

    def _like_this(self, images: Tensor, targets: Tensor, num_classes: int, class_names) -> 'Attributes':
        return self._named(images, targets, self.names)

    def _named(self, images: Tensor, targets: Tensor, names) -> 'Attributes':
        other = Attributes(images, targets, names, self.mean, self.std, self.device)
        other.shard, other.pad = self.shard, self.pad
        return other


def load_attributes(
    name: str, root: str | Path, device, size: int, labelled: bool
) -> tuple[Attributes, Attributes | None, Attributes]:
    """Training, validation (None: there is none) and test set.

    Args:
        name: 'faces' or 'faces:N' (embedded, N training images, default 2000, and 0.3 N for tests), 'celeba'
            or 'celeba:N' (N training images, default all).
        root: where CelebA's folders Anno, Eval and Img lie, or a folder celeba with them.
        device: where everything lives.
        size: side of the images.
        labelled: faces: the images that teachers have labels for, or others; celeba has one training set.

    Raises:
        ValueError: a name that is not of this form; files that are missing or not of CelebA's format.
    """
    kind, _, number = name.partition(':')
    if kind not in ATTRIBUTE_DATA or (number and not (number.isdigit() and int(number) >= 10)):
        raise ValueError(
            f'no data set is called {name!r}; there are faces, celeba, faces:N, celeba:N (N >= 10)'
        )
    if kind == 'celeba':
        names, parts = read_celeba(root, size, int(number) if number else None)
        return tuple(
            Attributes(torch.from_numpy(images), torch.from_numpy(values), names, MEAN, STD, device)
            if len(images)
            else None
            for images, values in parts
        )
    n = int(number or 2000)
    if n > UNLABELLED:
        raise ValueError(f'{name}: there are {UNLABELLED} faces for teachers and as many for students')
    made = faces(n, LABELLED if labelled else UNLABELLED, size), faces(n * 3 // 10, TEST, size)
    train, test = (
        Attributes(torch.from_numpy(images), torch.from_numpy(values), NAMES, *_FACES, device)
        for images, values in made
    )
    return train, None, test


def attribute_figures(out: Tensor, target: Tensor, names: Sequence[str]) -> dict[str, float]:
    """Percent on a test set: out (N, 2 A), target (N, A).

    accuracy_NAME: right answers; balanced_NAME: mean of the recalls of yes and of no, absent where all images
    are of one kind; accuracy, balanced: their means over the attributes.
    """
    right = (out.unflatten(1, (-1, 2)).argmax(dim=2) == target).cpu().double()
    result = {}
    for name, hits, yes in zip(names, right.unbind(1), (target == 1).cpu().unbind(1)):
        result[f'accuracy_{name}'] = 100 * float(hits.mean())
        if yes.any() and not yes.all():
            result[f'balanced_{name}'] = 50 * float(hits[yes].mean() + hits[~yes].mean())
    for kind in ('accuracy', 'balanced'):
        found = [value for key, value in result.items() if key.startswith(f'{kind}_')]
        if found:
            result[kind] = sum(found) / len(found)
    return result


def majority(target: Tensor, names: Sequence[str]) -> dict[str, float]:
    """The accuracy of who always says what most test images are, in percent."""
    share = target.cpu().double().mean(dim=0)
    return {name: 100 * float(torch.maximum(x, 1 - x)) for name, x in zip(names, share)}
