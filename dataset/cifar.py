"""Read CIFAR-10 and CIFAR-100 from the official files, in the binary or the Python layout, and check them."""

import hashlib
import pickle
from functools import partial
from pathlib import Path

import numpy as np
from torchvision.datasets import CIFAR10, CIFAR100

from .named import Data
from .resident import Resident, from_arrays

# binary layout: folder, label bytes in front of the 3072 pixel bytes, and per file (records, MD5 if known)
BINARY = {
    'cifar10': (
        'cifar-10-batches-bin',
        1,
        {
            'data_batch_1.bin': (10000, '5dd7e06a14cb22eb9f671a540d1b7c25'),
            'data_batch_2.bin': (10000, '5ea93a67294ea407fff1d09f752e9692'),
            'data_batch_3.bin': (10000, '942cd6a4bcdd0dd3c604fbe906cb4421'),
            'data_batch_4.bin': (10000, 'ae636b3ba5c66a11e91e8cb52e771fcb'),
            'data_batch_5.bin': (10000, '53f37980c15c3d472c316c40844f3f0d'),
            'test_batch.bin': (10000, '803d5f7f4d78ea53de84dbe85f74fb6d'),
        },
    ),
    'cifar100': ('cifar-100-binary', 2, {'train.bin': (50000, None), 'test.bin': (10000, None)}),
}
_FINE = (  # the fine labels of CIFAR-100, in order
    'apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus '
    'butterfly camel can castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab '
    'crocodile cup dinosaur dolphin elephant flatfish forest fox girl hamster house kangaroo '
    'keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree motorcycle mountain mouse '
    'mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy '
    'porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper '
    'snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone television '
    'tiger tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm'
)
NAMES = {
    'cifar10': 'airplane automobile bird cat deer dog frog horse ship truck'.split(),
    'cifar100': _FINE.split(),
}
MEAN_STD = {  # Knowledge-Distillation-Zoo's
    'cifar10': ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    'cifar100': ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}
PYTHON = {
    'cifar10': CIFAR10,
    'cifar100': CIFAR100,
}  # torchvision checks the MD5 of every file before it reads one


def read_cifar(name: str, root: str | Path):
    """((train images, train labels), (test images, test labels)) of 'cifar10' or 'cifar100' under root.

    Images are (N, 32, 32, 3) uint8, labels (N,) int64 (for CIFAR-100 the 100 fine ones).

    Raises:
        ValueError: nothing is there, or the first damaged file, with the command that repairs it.
    """
    root = Path(root)
    folder = root / BINARY[name][0]
    damaged = []
    if folder.is_dir():
        damaged = bad_files(name, folder)
        if not damaged:
            return _read_binary(name, folder)
    python = PYTHON[name]
    if (root / python.base_folder).is_dir():
        try:
            return tuple(_from_torchvision(python(root, train=train)) for train in (True, False))
        except RuntimeError:  # torchvision's word for a missing or damaged file
            damaged.append(f'{root / python.base_folder}: a file is missing or damaged')
    repair = f'run: python -m dataset.download {name} --img_root {root}'
    if damaged:
        raise ValueError(f'{damaged[0]}; to repair it, {repair}')
    raise ValueError(f'no {name} under {root} (looked for {folder.name} and {python.base_folder}); {repair}')


def read_cifar_test(name: str, root: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """(test images, test labels) as read_cifar has them, from their own file; no other need be there."""
    root, (binary, label_bytes, files) = Path(root), BINARY[name]
    test = next(file for file in files if 'test' in file)
    if (root / binary / test).is_file():
        problems = bad_files(name, root / binary, {test: files[test]})
        if problems:
            raise ValueError(f'{problems[0]}; run: python -m dataset.download {name} --img_root {root}')
        return _read_records(root / binary, [test], label_bytes)
    python = PYTHON[name]
    path = root / python.base_folder / python.test_list[0][0]
    if not path.is_file():
        raise ValueError(
            f'no {name} test set under {root} (looked for {binary}/{test} and {path.relative_to(root)}); '
            f'run: python -m dataset.download {name} --img_root {root}'
        )
    content = path.read_bytes()
    if hashlib.md5(content).hexdigest() != python.test_list[0][1]:
        raise ValueError(f'{path}: damaged, its MD5 is not {python.test_list[0][1]}')
    half = pickle.loads(content, encoding='latin1')  # the official file, by its MD5
    images = half['data'].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    labels = half['labels'] if 'labels' in half else half['fine_labels']
    return np.ascontiguousarray(images), np.asarray(labels, dtype=np.int64)


def bad_files(name: str, folder: Path, files: dict | None = None) -> list[str]:
    """One sentence for every file of the binary layout that is missing or damaged."""
    _, label_bytes, every = BINARY[name]
    problems = []
    for file, (records, md5) in (files or every).items():
        path, wanted = folder / file, records * (label_bytes + 3072)
        if not path.is_file():
            problems.append(f'{path}: missing')
        elif path.stat().st_size != wanted:
            problems.append(f'{path}: damaged, {path.stat().st_size} bytes instead of {wanted}')
        elif md5 and hashlib.md5(path.read_bytes()).hexdigest() != md5:
            problems.append(f'{path}: damaged, its MD5 is not {md5}')
        elif not md5 and int(_labels(path, label_bytes).max()) > 99:
            problems.append(f'{path}: damaged, it has labels above 99')
    return problems


def _labels(path: Path, label_bytes: int) -> np.ndarray:
    return np.fromfile(path, np.uint8).reshape(-1, label_bytes + 3072)[:, label_bytes - 1]


def _read_binary(name: str, folder: Path):
    _, label_bytes, files = BINARY[name]
    halves = [f for f in files if 'test' not in f], [f for f in files if 'test' in f]
    for half in halves:
        yield _read_records(folder, half, label_bytes)


def _read_records(folder: Path, files: list[str], label_bytes: int) -> tuple[np.ndarray, np.ndarray]:
    records = np.concatenate([np.fromfile(folder / f, np.uint8) for f in files])
    records = records.reshape(-1, label_bytes + 3072)
    images = records[:, label_bytes:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(images), records[:, label_bytes - 1].astype(np.int64)


def _from_torchvision(half: CIFAR10) -> tuple[np.ndarray, np.ndarray]:
    return half.data, np.asarray(half.targets, dtype=np.int64)


def _load(name: str, root, device, size, _) -> tuple[Resident, Resident]:
    (images, labels), test = read_cifar(name, root)
    if size and size > len(images):
        raise ValueError(f'{name}:{size}: there are {len(images)} training images')
    halves = (images[:size], labels[:size]), test
    return tuple(from_arrays(half, NAMES[name], MEAN_STD[name], device) for half in halves)


def _load_test(name: str, root, device, *_) -> Resident:
    return from_arrays(read_cifar_test(name, root), NAMES[name], MEAN_STD[name], device)


CIFAR = {
    name: Data(partial(_load, name), partial(_load_test, name), mean_std, sized=True)
    for name, mean_std in MEAN_STD.items()
}
