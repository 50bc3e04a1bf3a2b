"""The data sets by name: `train, test = load('cifar10', './data', device)`.

Both halves yield `(img, target, index)` batches on the device: `train.train_batches(batch_size, seed, epoch)`
augmented and shuffled, with a fourth part, further views; `test.test_batches(batch_size)` plain and in order.
"""

from pathlib import Path

import numpy as np
import torch

from .arrays import read_arrays
from .attributes import ATTRIBUTE_DATA, Attributes, load_attributes
from .cifar import NAMES, read_cifar, read_cifar_test
from .dense import Dense
from .folder import MEAN, STD, BadImage, Folder, classes_in
from .labels import NO_LABEL, forget_labels, only_labelled
from .nyu import read_nyu
from .parts import ClassParts, few_per_class, read_classes, split_classes, take_classes
from .patterns import CLASSES as PATTERNS
from .patterns import patterns
from .resident import Resident
from .scenes import load_scenes
from .shapes import CLASSES, cached_shapes, test_size

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
    'pictures',
    'read_classes',
    'split_classes',
    'take_classes',
]

# (mean, std) per channel of the training images; CIFAR's are Knowledge-Distillation-Zoo's
_CIFAR10 = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
_CIFAR100 = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)
_SHAPES = (0.50, 0.50, 0.50), (0.24, 0.24, 0.24)
_PATTERNS = (0.50, 0.50, 0.50), (0.17, 0.17, 0.17)


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
    return DATA[kind](root, torch.device(device), size, folder_options)


def load_test(name: str, root: str | Path = './data', device: str | torch.device = 'cpu', **folder_options):
    """The test half of the data called `name`, read without its training half, which need not be there.

    The classes of a folder are those of val/ then. Arguments and errors are those of load.
    """
    kind, size = _named(name)
    device = torch.device(device)
    if kind == 'folder':
        val = Path(root) / 'val'
        return Folder(val, device, class_names=classes_in(val), **folder_options)
    if kind == 'arrays':
        return _of_arrays(*read_arrays(Path(root))[1:], device)
    if kind == 'patterns':
        return _resident(*patterns(test_size(size or 2000), seed=1), PATTERNS, _PATTERNS, device)
    if kind == 'shapes':
        return _resident(*cached_shapes(root, test_size(size or 8000), seed=1), CLASSES, _SHAPES, device)
    mean_std = {'cifar10': _CIFAR10, 'cifar100': _CIFAR100}[kind]
    return _resident(*read_cifar_test(kind, root), NAMES[kind], mean_std, device)


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
    if kind not in DATA or (size and (kind not in SIZED or not size.isdigit() or int(size) < 10)):
        raise ValueError(
            f'no data set is called {name!r}; there are {", ".join(DATA)}; {", ".join(SIZED)} also with :N, '
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
    known = {
        'shapes': _SHAPES,
        'patterns': _PATTERNS,
        'cifar10': _CIFAR10,
        'cifar100': _CIFAR100,
        'folder': (MEAN, STD),
    }
    kind = name.partition(':')[0]
    if kind == 'arrays':
        raise ValueError('arrays: how images are normalised stands in their files, not in the name')
    if kind not in known:
        raise ValueError(f'no data set is called {name!r}; there are {", ".join(known)}')
    return known[kind]


def _load_shapes(root, device, size, _):
    n = size or 8000
    halves = cached_shapes(root, n, seed=0), cached_shapes(root, test_size(n), seed=1)
    return tuple(_resident(*half, CLASSES, _SHAPES, device) for half in halves)


def _load_patterns(root, device, size, _):
    n = size or 2000
    halves = patterns(n, seed=0), patterns(test_size(n), seed=1)
    return tuple(_resident(*half, PATTERNS, _PATTERNS, device) for half in halves)


def _load_cifar10(root, device, size, _):
    return _load_cifar('cifar10', root, device, size, _CIFAR10)


def _load_cifar100(root, device, size, _):
    return _load_cifar('cifar100', root, device, size, _CIFAR100)


def _load_cifar(kind: str, root, device, size, mean_std):
    (images, labels), test = read_cifar(kind, root)
    if size and size > len(images):
        raise ValueError(f'{kind}:{size}: there are {len(images)} training images')
    halves = (images[:size], labels[:size]), test
    return tuple(_resident(*half, NAMES[kind], mean_std, device) for half in halves)


def _load_arrays(root, device, *_):
    train, test, facts = read_arrays(Path(root))
    return tuple(_of_arrays(half, facts, device) for half in (train, test))


def _of_arrays(half, facts, device) -> Resident:
    return _resident(*half, facts['class_names'], (facts['mean'], facts['std']), device)


def _load_folder(root, device, _, options):
    train = Folder(Path(root) / 'train', device, **options)
    return train, Folder(Path(root) / 'val', device, **options, class_names=train.class_names)


DATA = {
    'shapes': _load_shapes,
    'patterns': _load_patterns,
    'cifar10': _load_cifar10,
    'cifar100': _load_cifar100,
    'folder': _load_folder,
    'arrays': _load_arrays,
}


SIZED = ('shapes', 'patterns', 'cifar10', 'cifar100')


def _resident(images: np.ndarray, labels: np.ndarray, names, mean_std, device) -> Resident:
    return Resident(
        torch.from_numpy(images), torch.from_numpy(labels), len(names), *mean_std, device, class_names=names
    )
