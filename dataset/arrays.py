"""Images of one's own in memory: ROOT/train.npz and ROOT/test.npz, as tools/select_mixup.py writes them.

images       (N, H, W, 3) uint8
labels       (N,) integers; -100: none
class_names  (K,) strings, in the order of the labels      train.npz; test.npz has the same or none
mean, std    (3,) of pixels in 0..1                        train.npz only; left out: of its images

When you add images, keep mean and std of the first file: networks that it trained know images normalised
with these. Left out, they are worked out anew; dataset.load('arrays', ROOT)[0].mean is what they were.
"""

import zipfile
import zlib
from pathlib import Path

import numpy as np

from .labels import NO_LABEL
from .named import Data
from .resident import Resident, from_arrays


def read_arrays(root: Path):
    """(training images, labels), (test images, labels), {class_names, mean, std}.

    Raises:
        ValueError: a file that is missing or not of this form.
    """
    train, test = (_read(root / f'{half}.npz') for half in ('train', 'test'))
    if 'class_names' not in train:
        raise ValueError(f'{root / "train.npz"}: has no class_names')
    names = [str(name) for name in train['class_names']]
    if 'class_names' in test and [str(name) for name in test['class_names']] != names:
        raise ValueError(
            f'{root / "test.npz"}: its class_names are not those of train.npz, or in another order'
        )
    halves = []
    for half, file in (('train', train), ('test', test)):
        images, labels = file['images'], file['labels']
        if labels.dtype.kind not in 'iu':
            raise ValueError(f'{root / half}.npz: labels must be integers, got {labels.dtype}')
        labels = labels.astype(np.int64)
        legal = (labels >= 0) & (labels < len(names)) | (labels == NO_LABEL) & (half == 'train')
        if (
            images.ndim != 4
            or images.shape[3] != 3
            or images.dtype != np.uint8
            or labels.shape != images.shape[:1]
        ):
            raise ValueError(
                f'{root / half}.npz: images must be (N, H, W, 3) uint8 with N labels, got '
                f'{images.shape} {images.dtype} and {labels.shape}'
            )
        if not len(images):
            raise ValueError(f'{root / half}.npz: has no images')
        if not legal.all():
            raise ValueError(
                f'{root / half}.npz: label {labels[~legal][0]} is none of 0..{len(names) - 1}'
                f'{" or -100" if half == "train" else ""}'
            )
        halves.append((np.ascontiguousarray(images), labels))
    shapes = [images.shape[1:3] for images, _ in halves]
    if shapes[0] != shapes[1]:
        (h, w), (test_h, test_w) = shapes
        raise ValueError(
            f'{root}: images of train.npz are {h} x {w} pixels, of test.npz {test_h} x {test_w}: '
            'make them one size'
        )
    known = [name for name in ('mean', 'std') if name in train]
    if len(known) == 1:
        raise ValueError(f'{root / "train.npz"}: has {known[0]} alone: give both mean and std, or neither')
    mean, std = (train['mean'], train['std']) if known else _mean_and_std(halves[0][0])
    if (
        np.shape(mean) != (3,)
        or np.shape(std) != (3,)
        or np.max(mean) > 1
        or np.min(mean) < 0
        or np.max(std) > 1
    ):
        raise ValueError(
            f'{root}/train.npz: mean and std are three numbers each, of pixels in 0..1, got {mean} {std}'
        )
    if not np.all(np.asarray(std) > 0):
        raise ValueError(f'{root}/train.npz: std {std} has a channel without variation: give mean and std')
    facts = {'class_names': names, 'mean': tuple(map(float, mean)), 'std': tuple(map(float, std))}
    return *halves, facts


def _mean_and_std(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Per channel, of bytes: by counting them, some images at a time, as counting makes integers of bytes."""
    counts = np.zeros((3, 256), dtype=np.int64)
    for part in np.array_split(images, min(len(images), images.nbytes // 2**20 + 1)):
        counts += [np.bincount(part[..., c].ravel(), minlength=256) for c in range(3)]
    share, values = counts / counts.sum(axis=1, keepdims=True), np.arange(256) / 255
    mean = share @ values
    return mean, np.sqrt((share * (values - mean[:, None]) ** 2).sum(axis=1))


def _read(path: Path) -> dict:
    try:
        with np.load(path, allow_pickle=False) as file:
            content = dict(file)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        remedy = '; arrays of Python objects are refused: np.array(names, dtype=str)'
        remedy = remedy if 'allow_pickle' in str(error) else ''  # NumPy's word for these
        raise ValueError(f'{path}: cannot be read as arrays ({type(error).__name__}){remedy}') from None
    missing = [name for name in ('images', 'labels') if name not in content]
    if missing:
        raise ValueError(f'{path}: has no {missing[0]}')
    return content


def _load(root, device, *_) -> tuple[Resident, Resident]:
    *halves, facts = read_arrays(Path(root))
    mean_std = facts['mean'], facts['std']
    return tuple(from_arrays(half, facts['class_names'], mean_std, device) for half in halves)


def _load_test(root, device, *_) -> Resident:
    """Its classes, mean and std stand in the file of the training half, which must be there."""
    _, half, facts = read_arrays(Path(root))
    return from_arrays(half, facts['class_names'], (facts['mean'], facts['std']), device)


ARRAYS = Data(_load, _load_test, mean_std=None, owned=True)
