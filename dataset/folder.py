"""Large data: a folder of images per class, decoded by worker processes."""

import hashlib
import math
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torchvision.transforms.v2 as transforms
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS

from .labels import NO_LABEL
from .named import Data
from .pictures import BadImage, read_picture, to_rgb
from .views import changed_by, count_steps, shares, view_called, view_seed

UNLABELLED = '_unlabelled'
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Folder:
    """One half of an ImageNet-like data set, folder/<class>/<image>.

    Training: random resized crop and flip. Test: short side to size * 256 / 224, centre crop. The batches are
    those of Resident: (img, target, index) on the device, img channels_last. Files and folders whose name
    begins with a dot (.ipynb_checkpoints, ._1.jpg) do not count. Images below train/_unlabelled have no
    label, -100.

    Args:
        folder: the half's folder.
        device: where batches appear.
        image_size: side of the crops, 224.
        workers: decoding processes; 0 decodes in the training process.
        convert_rgb: accept grey (8 or 16 bits), CMYK and palette images (ImageNet has some) by converting
            them.
        class_names: the classes in the order of their labels, those of the training set; None: the folders
            that are there, sorted. With it, a class may have an empty folder.

    Attributes: class_names, targets (N,), num_classes; notes: lines for the log.

    Raises:
        ValueError: the folder is missing, holds no images or a class without images; its classes are not
            class_names; later, when reached, an image that cannot be read, is empty, or is not RGB. The
            message names class or file.
    """

    def __init__(
        self,
        folder: Path,
        device,
        image_size: int = 224,
        workers: int = 4,
        convert_rgb: bool = False,
        class_names: list[str] | None = None,
    ):
        there = classes_in(folder)
        self.class_names = there if class_names is None else list(class_names)
        _compare_classes(folder, there, self.class_names)
        files = [_images_in(Path(folder) / name) for name in self.class_names]
        empty = [name for name, paths in zip(self.class_names, files) if not paths]
        if empty and (class_names is None or len(empty) == len(files)):
            raise ValueError(
                f'{folder}: no images in {_some(empty)} (looked for {", ".join(IMG_EXTENSIONS)})'
            )
        self.notes = [f'{folder}: no images of {_some(empty)}, nothing is measured there'] if empty else []
        self.samples = [(path, label) for label, paths in enumerate(files) for path in paths]
        if class_names is None:
            self.samples += [(path, NO_LABEL) for path in _images_in(Path(folder) / UNLABELLED)]
        self.num_classes, self.mean, self.std = len(self.class_names), MEAN, STD
        self.device, self.workers = torch.device(device), workers
        self._options = image_size, convert_rgb
        self.shard = (0, 1)  # this process, number of processes
        self.targets = torch.tensor([label for _, label in self.samples], device=self.device)

    def __len__(self) -> int:
        return len(self.samples)

    def digest(self) -> str:
        """A short name for these files, by where they lie and their labels; what is in them is not read."""
        named = [f'{os.path.join(*Path(path).parts[-2:])} {label}' for path, label in self.samples]
        return hashlib.sha1('\n'.join(named).encode(errors='surrogateescape')).hexdigest()[:12]

    def train_batches(
        self,
        batch_size: int,
        seed: int,
        epoch: int,
        views: Sequence[str] = (),
        views_epoch: int | None = None,
    ) -> Iterator[tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]]:
        """As Resident's. Every image and view has a seed of its own, whatever the number of workers."""
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        images = self._images(
            transforms.RandomResizedCrop(self._options[0]), transforms.RandomHorizontalFlip()
        )
        of = epoch if views_epoch is None else views_epoch
        several = _Views(images, self.targets.cpu(), views, seed, epoch, of)
        order = torch.randperm(len(self), generator=generator)
        batches = [index.tolist() for index in shares(order, batch_size, self.shard)]
        for img, *more, target, index in self._batches(several, batches):
            yield img, target, index, dict(zip(views, more))

    def steps(self, batch_size: int) -> int:
        return count_steps(len(self), batch_size, self.shard)

    def test_batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        size = self._options[0]
        images = self._images(transforms.Resize(math.ceil(size * 256 / 224)), transforms.CenterCrop(size))
        rank, processes = self.shard
        order = torch.arange(len(self))[rank::processes]  # none, where there are more processes than images
        yield from self._batches(images, [part.tolist() for part in order.split(batch_size) if len(part)])

    def split(self, fraction: float, seed: int) -> tuple['Folder', 'Folder']:
        """Two disjoint sets: all but a random fraction, and that fraction."""
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        held = max(int(len(self) * fraction), 1)
        return self.subset(order[held:]), self.subset(order[:held])

    def subset(
        self,
        index: Tensor,
        targets: Tensor | None = None,
        num_classes: int | None = None,
        class_names: list[str] | None = None,
    ) -> 'Folder':
        """These images, with other labels (for all images of this set) if wanted, as Resident's."""
        labels = (self.targets if targets is None else targets).tolist()
        part = object.__new__(Folder)
        part.__dict__ |= self.__dict__
        part.samples = [(self.samples[i][0], labels[i]) for i in index.tolist()]
        part.targets = torch.tensor([label for _, label in part.samples], device=self.device)
        part.num_classes = num_classes or self.num_classes
        part.class_names = self.class_names if num_classes is None else class_names
        return part

    def pictures(self, other: 'Folder') -> 'Folder':
        """Another folder's images, read as this one's: no labels (-1), this one's classes."""
        if not isinstance(other, Folder):
            raise ValueError('images of a folder cannot be replaced by those of a set in memory')
        part = self.subset(torch.arange(0))
        part.samples = [(path, -1) for path, _ in other.samples]
        part.targets = torch.full((len(other),), -1, device=self.device)
        return part

    def _images(self, *steps) -> Dataset:
        to_tensor = transforms.Compose(
            [
                *steps,
                transforms.ToImage(),
                transforms.ToDtype(torch.float32, scale=True),
                transforms.Normalize(MEAN, STD),
            ]
        )
        return _Images(self.samples, to_tensor, self._options[1])

    def _batches(self, images: Dataset, batches: list[list[int]]):
        loaded = decoded(
            _Numbered(images), self.workers, batch_sampler=batches, pin_memory=self.device.type == 'cuda'
        )
        for *images, target, index in loaded:
            images = [
                img.to(self.device, memory_format=torch.channels_last, non_blocking=True) for img in images
            ]
            target, index = (x.to(self.device, non_blocking=True) for x in (target, index))
            yield *images, target, index


def decoded(data: Dataset, workers: int, **options) -> Iterator:
    """What torch's DataLoader gives with so many processes, or as many as there are cores.

    Raises:
        BadImage: an image that is one, or the end of a process that decodes; one line.
    """
    loader = DataLoader(data, num_workers=min(workers, cores()), worker_init_fn=obey_parent_alone, **options)
    try:
        yield from loader
        return
    except BadImage as error:  # a worker's exception arrives with its traceback as text in front
        message = str(error).strip().splitlines()[-1].split('BadImage: ')[-1]
        error.__traceback__ = None  # its frames hold the loader, whose processes should end now
    except RuntimeError as error:
        message = end_of_worker(error)
        if not message:
            raise
        error.__traceback__ = None
    raise BadImage(message)


def cores() -> int:
    """That this process may use: more processes than these are no faster, and torch warns of them."""
    own = getattr(os, 'sched_getaffinity', None)
    return len(own(0)) if own else os.cpu_count() or 1


def end_of_worker(error: RuntimeError) -> str:
    """One line on the end of a process that decodes; empty if the error says something else."""
    if not str(error).startswith('DataLoader worker (pid'):
        return ''
    said = str(error).strip().splitlines()[0]
    return f'{said}: try --workers 0, or give it more memory or a larger /dev/shm'


def obey_parent_alone(_: int) -> None:
    """Of a decoding process: Ctrl-C, torchrun and job schedulers send their signals to it as well, but the
    training process decides what follows, and may finish its epoch first."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, 'sigwaitinfo'):  # elsewhere one cannot tell who has sent it
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_wait_for_parent, daemon=True).start()


def _wait_for_parent() -> None:
    parent = multiprocessing.parent_process().pid
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


def classes_in(folder: Path) -> list[str]:
    """Names of the folders, sorted."""
    try:
        found = sorted(
            x.name
            for x in os.scandir(folder)
            if x.is_dir() and not x.name.startswith('.') and x.name != UNLABELLED
        )
    except OSError as error:
        raise ValueError(
            f'{folder}: no image folder, expected <class>/<image> in it ({error.strerror})'
        ) from None
    if not found:
        raise ValueError(f'{folder}: no image folder, expected <class>/<image> in it (it has no folders)')
    return found


def _compare_classes(folder: Path, there: list[str], wanted: list[str]) -> None:
    """A class too many or too few would shift the labels of all that follow, or be measured as wrong."""
    known, found = set(wanted), set(there)
    unknown = [name for name in there if name not in known]
    missing = [name for name in wanted if name not in found]
    problems = [f'unknown to the training set: {_some(unknown)}'] if unknown else []
    problems += [f'missing here: {_some(missing)}'] if missing else []
    if problems:
        remedy = '' if unknown else '; an empty folder of that name says that it has no images on purpose'
        raise ValueError(
            f'{folder}: its classes are not those of the training set; {"; ".join(problems)}{remedy}'
        )


def _images_in(folder: Path) -> list[str]:
    """Paths of all images below, in torchvision's order."""
    found = []
    for place, _, files in sorted(os.walk(folder, followlinks=True)):
        hidden = os.path.relpath(place, folder).split(os.sep)
        if not any(part.startswith('.') and part != '.' for part in hidden):
            found += [
                os.path.join(place, name)
                for name in sorted(files)
                if name.lower().endswith(IMG_EXTENSIONS) and not name.startswith('.')
            ]
    return found


def _some(names: list[str]) -> str:
    return ', '.join(names[:5]) + (f' and {len(names) - 5} more' if len(names) > 5 else '')


class _Images(Dataset):
    def __init__(self, samples: list[tuple[str, int]], transform, convert_rgb: bool) -> None:
        self.samples, self.transform, self.convert_rgb = samples, transform, convert_rgb

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        path, target = self.samples[i]
        image = read_picture(path)
        if image.mode != 'RGB' and not self.convert_rgb:
            lost = ', without their alpha: it is not blended' if image.mode[-1] in 'Aa' else ''
            raise BadImage(
                f'{path}: is a {image.mode} image, expected RGB; --convert_rgb converts such images{lost}'
            )
        return self.transform(to_rgb(image, path)), target


class _Views(Dataset):
    """(image, its further views ..., label), each drawn from a seed of its own."""

    def __init__(
        self, images: Dataset, targets: Tensor, views: Sequence[str], seed: int, epoch: int, views_epoch: int
    ) -> None:
        self.images, self.targets, self.views = images, targets, views
        self.seed, self.epoch, self.views_epoch = seed, epoch, views_epoch

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(view_seed('first', self.seed, self.epoch, i))
            image, target = self.images[i]
            return image, *(self._view(view, i) for view in self.views), target

    def _view(self, name: str, i: int) -> Tensor:
        view = view_called(name)
        torch.default_generator.manual_seed(view_seed(name, self.seed, self.views_epoch, i))
        if view.partner:
            same = (self.targets == self.targets[i]).nonzero()[:, 0]
            i = int(same[torch.randint(len(same), ())])
        image = self.images[i][0]
        if view.change:
            mean, std = (torch.tensor(x)[:, None, None] for x in (MEAN, STD))
            pixels = ((image * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)
            # other numbers than the crop's
            seed = view_seed(f'{name}, changed', self.seed, self.views_epoch, i)
            changed = changed_by(view, name, pixels, seed)
            image = (changed.float() / 255 - mean) / std
        return image


class _Numbered(Dataset):
    """Adds each sample's position."""

    def __init__(self, images: Dataset) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[Tensor, int, int]:
        return *self.images[i], i


def _load(root, device, _, options) -> tuple[Folder, Folder]:
    train = Folder(Path(root) / 'train', device, **options)
    return train, Folder(Path(root) / 'val', device, **options, class_names=train.class_names)


def _load_test(root, device, _, options) -> Folder:
    """Its classes are those of val/."""
    val = Path(root) / 'val'
    return Folder(val, device, class_names=classes_in(val), **options)


FOLDER = Data(_load, _load_test, (MEAN, STD), owned=True)
