"""The data sets by name: `train, test = load('cifar10', './data', device)`.

Both halves yield `(img, target, index)` batches on the device: `train.train_batches(batch_size, seed, epoch)`
augmented and shuffled, with a fourth part, further views; `test.test_batches(batch_size)` plain and in order.
"""

from pathlib import Path

import torch

from .arrays import ARRAYS
from .attributes import ATTRIBUTE_DATA, Attributes, load_attributes
from .cifar import CIFAR
from .dense import Dense
from .folder import FOLDER, BadImage, Folder
from .labels import NO_LABEL, forget_labels, only_labelled
from .nyu import read_nyu
from .parts import ClassParts, few_per_class, read_classes, spelled, split_classes, take_classes, unseen
from .patterns import PATTERNS
from .resident import Resident
from .scenes import load_scenes
from .shapes import SHAPES

__all__ = [
    'ATTRIBUTE_DATA',
    'DATA',
    'NO_LABEL',
    'Attributes',
    'BadImage',
    'ClassParts',
    'Folder',
    'Resident',
    'few_per_class',
    'forget_labels',
    'load',
    'load_attributes',
    'load_dense',
    'load_test',
    'mean_std',
    'only_labelled',
    'owned',
    'pictures',
    'read_classes',
    'spelled',
    'split_classes',
    'take_classes',
    'unseen',
]

DATA = {'shapes': SHAPES, 'patterns': PATTERNS, **CIFAR, 'folder': FOLDER, 'arrays': ARRAYS}  # see named.py


def load(name: str, root: str | Path = './data', device: str | torch.device = 'cpu', **folder_options):
    """Training and test set of the data called `name`.

    Args:
        name: 'shapes' or 'shapes:N' (embedded, N training images, default 8000), 'patterns' or 'patterns:N'
            (embedded, 16x16 pixels, default 2000), 'cifar10', 'cifar100' (':N' for their first N training
            images), 'folder' (root/train/<class>/*.jpg and root/val/<class>/*.jpg, the same classes), or
            'arrays' (root/train.npz and root/test.npz, see arrays.py).
        root: where data lies, or is rendered to.
        device: where the images live (cifar, shapes) or are sent to, batch by batch (folder).
        folder_options: see Folder.

    Both sets have `class_names`, one list in the order of the labels.

    Raises:
        ValueError: unknown name, missing or damaged files, classes of val/ that are not those of train/; one
            line that says what to do.
    """
    kind, size = _named(name)
    return DATA[kind].load(root, torch.device(device), size, folder_options)


def load_test(name: str, root: str | Path = './data', device: str | torch.device = 'cpu', **folder_options):
    """The test half of the data called `name`, read without its training half, which need not be there.

    The classes of a folder are those of val/ then. Arguments and errors are those of load.
    """
    kind, size = _named(name)
    return DATA[kind].load_test(root, torch.device(device), size, folder_options)


def owned(name: str) -> bool:
    """Whether the data called `name` are the user's own files, so that the name does not say which."""
    kind = name.partition(':')[0]
    return kind in DATA and DATA[kind].owned


def pictures(name: str, root: str | Path, size: int) -> torch.Tensor:
    """The training images of the data called `name` alone: (N, size, size, 3) bytes.

    Args:
        name: as for load, without 'folder', or 'scenes', 'scenes:N' (embedded rooms).

    Raises:
        ValueError: as load; images of another size.
    """
    kind, _, number = name.partition(':')
    if kind == 'scenes':
        images = load_dense(name, root, 'cpu', size, labelled=False)[0].images
        return (images.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).contiguous()
    if kind == 'folder':
        raise ValueError('folder: not for this; there are shapes, cifar10, cifar100, scenes')
    images = load(name, root)[0].images
    if images.shape[1] != size:
        raise ValueError(f'{name}: its images have {images.shape[1]} pixels a side, wanted {size}')
    return images


def _named(name: str) -> tuple[str, int | None]:
    kind, _, size = name.partition(':')
    sized = [known for known, data in DATA.items() if data.sized]
    if kind not in DATA or (size and (kind not in sized or not size.isdigit() or int(size) < 10)):
        raise ValueError(
            f'no data set is called {name!r}; there are {", ".join(DATA)}; {", ".join(sized)} also with :N, '
            f'N >= 10'
        )
    return kind, int(size) if size else None


def load_dense(name: str, root: str | Path, device, size: int, labelled: bool) -> tuple[Dense, Dense]:
    """Training and test set with a label per pixel.

    Args:
        name: 'scenes' or 'scenes:N' (embedded rooms, N training images, default 2000), or 'nyuv2'.
        root: where nyu_depth_v2_labeled.mat lies.
        device: where everything lives.
        size: side of the images; a multiple of 16.
        labelled: scenes: the images that teachers have labels for, or others; nyuv2 has one set.

    Raises:
        ValueError: size is no multiple of 16; a file that is missing or not of its format.
    """
    kind, _, number = name.partition(':')
    if size % 16 or (number and (kind != 'scenes' or not number.isdigit() or int(number) < 10)):
        raise ValueError(f'{name}: sizes are multiples of 16, got {size}; scenes:N has N >= 10 images')
    if kind == 'nyuv2':
        return read_nyu(root, device, size)
    return load_scenes(int(number or 2000), size, torch.device(device), labelled)


def mean_std(name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(mean, std) per channel with which the images of the data called `name` are normalised.

    Raises:
        ValueError: unknown name; arrays, whose files say it.
    """
    kind, _ = _named(name)
    if not DATA[kind].mean_std:
        raise ValueError(f'{kind}: how images are normalised stands in their files, not in the name')
    return DATA[kind].mean_std
