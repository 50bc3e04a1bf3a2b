"""Large data: a folder of images per class, decoded by worker processes (torchvision ImageFolder)."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torchvision.transforms.v2 as transforms
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision.datasets import ImageFolder

from .views import count_steps, distort, shares, view_seed

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Folder:
    """One half of an ImageNet-like data set, folder/<class>/<image>.

    Training: random resized crop and flip. Test: short side to size * 256 / 224, centre crop. The batches are
    those of Resident: (img, target, index) on the device, img channels_last.

    Args:
        folder: the half's folder.
        device: where batches appear.
        image_size: side of the crops, 224.
        workers: decoding processes; 0 decodes in the training process.
        convert_rgb: accept grey, CMYK and palette images (ImageNet has some) by converting them.

    Raises:
        ValueError: the folder is missing or holds no images; later, when reached, an image that cannot be
            read, is empty, or is not RGB. The message names the file.
    """

    def __init__(
        self, folder: Path, device, image_size: int = 224, workers: int = 4, convert_rgb: bool = False
    ):
        try:
            self._files = ImageFolder(folder)
        except FileNotFoundError as error:
            raise ValueError(f'{folder}: no image folder, expected <class>/<image> in it ({error})') from None
        self.num_classes, self.mean, self.std = len(self._files.classes), MEAN, STD
        self.device, self.workers = torch.device(device), workers
        self._options = image_size, convert_rgb
        self._subset = range(len(self._files))
        self.shard = (0, 1)  # this process, number of processes
        self.targets = torch.tensor(self._files.targets, device=self.device)

    def __len__(self) -> int:
        return len(self._subset)

    def train_batches(
        self, batch_size: int, seed: int, epoch: int, views: Sequence[str] = ()
    ) -> Iterator[tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]]:
        """As Resident's. Every image and view has a seed of its own, whatever the number of workers."""
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        images = self._images(
            transforms.RandomResizedCrop(self._options[0]), transforms.RandomHorizontalFlip()
        )
        several = _Views(images, self.targets.cpu(), views, seed, epoch)
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
        order = torch.arange(rank, len(self), processes)
        yield from self._batches(images, [part.tolist() for part in order.split(batch_size)])

    def split(self, fraction: float, seed: int) -> tuple['Folder', 'Folder']:
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed)).tolist()
        held = max(int(len(self) * fraction), 1)
        return self._part(order[held:]), self._part(order[:held])

    def _part(self, chosen: list[int]) -> 'Folder':
        part = object.__new__(Folder)
        part.__dict__ |= self.__dict__
        part._subset = [self._subset[i] for i in chosen]
        part.targets = self.targets[torch.tensor(chosen, device=self.device)]
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
        return Subset(_Images(self._files.samples, to_tensor, self._options[1]), self._subset)

    def _batches(self, images: Dataset, batches: list[list[int]]):
        loader = DataLoader(
            _Numbered(images), batch_sampler=batches, num_workers=self.workers,
            pin_memory=self.device.type == 'cuda',
        )  # fmt: skip
        try:
            for *images, target, index in loader:
                images = [
                    img.to(self.device, memory_format=torch.channels_last, non_blocking=True)
                    for img in images
                ]
                target, index = (x.to(self.device, non_blocking=True) for x in (target, index))
                yield *images, target, index
        except BadImage as error:  # a worker's exception arrives with its traceback as text in front
            message = str(error).strip().splitlines()[-1].split('BadImage: ')[-1]
            error.__traceback__ = None  # its frames hold the loader, whose processes should end now
        else:
            return
        raise BadImage(message)


class BadImage(ValueError):
    """An image of the data set that cannot be used; one line that names the file."""


class _Images(Dataset):
    def __init__(self, samples: list[tuple[str, int]], transform, convert_rgb: bool) -> None:
        self.samples, self.transform, self.convert_rgb = samples, transform, convert_rgb

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        path, target = self.samples[i]
        try:
            with Image.open(path) as image:
                image.load()
        except (OSError, SyntaxError, ValueError) as error:  # what PIL raises for broken files
            raise BadImage(f'{path}: cannot be read as an image ({type(error).__name__})') from None
        if image.mode != 'RGB' and not self.convert_rgb:
            raise BadImage(
                f'{path}: is a {image.mode} image, expected RGB; --convert_rgb converts such images'
            )
        return self.transform(image.convert('RGB')), target


class _Views(Dataset):
    """(image, its further views ..., label), each drawn from a seed of its own."""

    def __init__(self, images: Dataset, targets: Tensor, views: Sequence[str], seed: int, epoch: int) -> None:
        self.images, self.targets, self.views, self.seed, self.epoch = images, targets, views, seed, epoch

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(view_seed('first', self.seed, self.epoch, i))
            image, target = self.images[i]
            return image, *(self._view(view, i) for view in self.views), target

    def _view(self, view: str, i: int) -> Tensor:
        seed = view_seed(view, self.seed, self.epoch, i)
        torch.manual_seed(seed)
        if view == 'pair':
            same = (self.targets == self.targets[i]).nonzero()[:, 0]
            i = int(same[torch.randint(len(same), ())])
        image = self.images[i][0]
        if view == 'strong':
            mean, std = (torch.tensor(x)[:, None, None] for x in (MEAN, STD))
            pixels = ((image * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)
            image = (distort(pixels, seed).float() / 255 - mean) / std
        return image


class _Numbered(Dataset):
    """Adds each sample's position."""

    def __init__(self, images: Dataset) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[Tensor, int, int]:
        return *self.images[i], i
