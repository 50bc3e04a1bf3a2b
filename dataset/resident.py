"""A data set that lives as bytes in device memory, and its augmentation in one gather per batch."""

import hashlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from .labels import NO_LABEL
from .views import changed_by, count_steps, shares, view_called, view_seed

PAD = 4  # pixels on each side before the random crop


class Resident:
    """Images and labels on one device.

    Args:
        images: (N, H, W, 3) uint8.
        targets: (N,) integers, 0 ... num_classes - 1; -100: none.
        num_classes, mean, std: of the data set; mean and std per channel for pixels in 0..1.
        device: where everything is kept, and where batches appear.
        class_names: in the order of the labels; None: they have none.

    Batches are (img, target, index): img (B, 3, H, W) float32, normalised, channels_last; target (B,) int64;
    index (B,) int64, the images' positions in this set. Training batches have a fourth part, {view: images}.

    Raises:
        ValueError: images or targets that are something else.

    `pad` says what lies around an image: 'reflect', the image itself, mirrored; 'zero', black pixels.
    """

    def __init__(
        self,
        images: Tensor,
        targets: Tensor,
        num_classes: int,
        mean,
        std,
        device,
        class_names: Sequence[str] | None = None,
    ) -> None:
        _check(images, targets, num_classes)
        self.class_names = None if class_names is None else list(class_names)
        self.images, self.targets = images.to(device).contiguous(), targets.to(device).long()
        self.shard = (0, 1)  # this process, number of processes
        self._batched = {}  # view: what makes it of whole batches, made when it is first asked for
        self.pad = 'reflect'
        self.num_classes, self.mean, self.std, self.device = num_classes, mean, std, torch.device(device)
        # one multiply-add takes a byte to its normalised value
        self._scale = 1 / (255 * torch.tensor(std, device=device))
        self._shift = -torch.tensor(mean, device=device) / torch.tensor(std, device=device)
        # What a batch only looks up: each of the 9 crops' source rows, as numbers of their first pixels,
        # (9, H), and the source columns, as they are and mirrored, (2, 9, W).
        height, width = images.shape[1:3]
        self._rows = (_reflected(height) * width).to(device)
        columns = _reflected(width)
        self._columns = torch.stack((columns, columns.flip(1))).to(device)
        # and which of them lie in the image, for black padding
        self._rows_inside = _inside(height).to(device)
        columns = _inside(width)
        self._columns_inside = torch.stack((columns, columns.flip(1))).to(device)

    def __len__(self) -> int:
        return len(self.images)

    def digest(self) -> str:
        """A short name for these images and labels."""
        digest = hashlib.sha1()
        for x in (self.images, self.targets):
            digest.update(x.cpu().numpy())
        return digest.hexdigest()[:12]

    def train_batches(
        self,
        batch_size: int,
        seed: int,
        epoch: int,
        views: Sequence[str] = (),
        views_epoch: int | None = None,
    ) -> Iterator[tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]]:
        """One shuffled epoch: pad by 4, random crop, random flip. The last batch may be smaller, but
        a batch of one is left out: batch norm and relations need two.

        All randomness is a function of (seed, epoch), drawn on the CPU: the same on every device, and a
        resumed run needs no generator state. Each view has random numbers of its own, so asking for one
        changes nothing else.

        Args:
            views: further images of every batch, by their names in views.VIEWS.
            views_epoch: whose views they are; None: this one's.

        Raises:
            ValueError: no view has such a name.
        """
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        order = torch.randperm(len(self), generator=generator).to(self.device)
        shift, flip = self._draw(generator)
        of = epoch if views_epoch is None else views_epoch
        others = {view: self._view(view, seed, of) for view in views}
        for index in shares(order, batch_size, self.shard):
            more = {view: images(index) for view, images in others.items()}
            yield self.crops(index, shift[index], flip[index]), self.targets[index], index, more

    def steps(self, batch_size: int) -> int:
        """Batches of an epoch."""
        return count_steps(len(self), batch_size, self.shard)

    def _draw(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """A crop and a flip for every image."""
        shift = torch.randint(2 * PAD + 1, (len(self), 2), generator=generator).to(self.device)
        return shift, torch.randint(2, (len(self),), generator=generator).to(self.device)

    def _view(self, name: str, seed: int, epoch: int) -> Callable[[Tensor], Tensor]:
        """From indices to the images of a further view in this epoch."""
        view = view_called(name)
        generator = torch.Generator().manual_seed(view_seed(name, seed, epoch))
        shift, flip = self._draw(generator)
        shown = self._partners(generator) if view.partner else torch.arange(len(self), device=self.device)
        if not view.change:
            return lambda index: self.crops(shown[index], shift[index], flip[index])
        if view.batched:
            if name not in self._batched:
                self._batched[name] = view.batched(*self.images.shape[1:3], self.device)
            drawn = [x.to(self.device) for x in self._batched[name].draw(len(self), generator)]

        def changed(index: Tensor) -> Tensor:
            pixels = self._pixels(shown[index], shift[index], flip[index]).permute(0, 3, 1, 2)
            if view.batched:
                pixels = self._batched[name](pixels, *(x[index] for x in drawn))
            else:
                with torch.random.fork_rng(devices=[]):
                    seeds = [view_seed(name, seed, epoch, i) for i in index.tolist()]
                    made = [changed_by(view, name, *one) for one in zip(pixels.cpu(), seeds)]
                    pixels = torch.stack(made)
            return self._normalise(pixels.to(self.device).permute(0, 2, 3, 1).contiguous())

        return changed

    def _partners(self, generator: torch.Generator) -> Tensor:
        """For every image one of the same class, drawn at random; it may be the image itself."""
        by_class = self.targets.argsort(stable=True)
        count = torch.bincount(self.targets, minlength=self.num_classes)
        share = torch.rand(len(self), generator=generator, dtype=torch.float64)
        rank = (share * count[self.targets].cpu()).long().to(self.device)
        return by_class[(count.cumsum(0) - count)[self.targets] + rank]

    def test_batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Every image once, in order, as it is; under torchrun every process its share."""
        rank, processes = self.shard
        for index in torch.arange(rank, len(self), processes, device=self.device).split(batch_size):
            centre = torch.full((len(index), 2), PAD, device=self.device)
            yield self.crops(index, centre, torch.zeros_like(index)), self.targets[index], index

    def crops(self, index: Tensor, shift: Tensor, flip: Tensor) -> Tensor:
        """Padded, cropped, flipped, normalised images.

        Args:
            index: (B,) which images.
            shift: (B, 2) top and left corner of the crop in the padded image, 0..8; 4 is the centre.
            flip: (B,) 1 mirrors left and right.
        """
        return self._normalise(self._pixels(index, shift, flip))

    def _pixels(self, index: Tensor, shift: Tensor, flip: Tensor) -> Tensor:
        """(B, H, W, 3) bytes."""
        height, width = self.images.shape[1:3]
        row, column = self._rows[shift[:, 0]], self._columns[flip, shift[:, 1]]  # (B, H), (B, W)
        # every wanted pixel by its number in the whole set: one gather does pad, crop and flip
        pixel = (index[:, None] * (height * width) + row)[:, :, None] + column[:, None, :]
        rgb = self.images.reshape(-1, 3)[pixel]
        if self.pad == 'zero':
            row, column = self._rows_inside[shift[:, 0]], self._columns_inside[flip, shift[:, 1]]
            rgb = rgb * (row[:, :, None] & column[:, None, :])[..., None]
        return rgb

    def _normalise(self, rgb: Tensor) -> Tensor:
        """(B, H, W, 3) bytes -> (B, 3, H, W) float32."""
        return torch.addcmul(self._shift, rgb.float(), self._scale).permute(0, 3, 1, 2)

    def split(self, fraction: float, seed: int) -> tuple['Resident', 'Resident']:
        """Two disjoint sets: all but a random fraction, and that fraction."""
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed)).to(self.device)
        held = max(int(len(self) * fraction), 1)
        return tuple(self.subset(index) for index in (order[held:], order[:held]))

    def subset(
        self,
        index: Tensor,
        targets: Tensor | None = None,
        num_classes: int | None = None,
        class_names: list[str] | None = None,
    ) -> 'Resident':
        """These images, with other labels (for all images of this set) and other classes if wanted."""
        targets = (self.targets if targets is None else targets)[index]
        if num_classes is None:
            num_classes, class_names = self.num_classes, self.class_names
        return self._like_this(self.images[index], targets, num_classes, class_names)

    def pictures(self, other: 'Resident') -> 'Resident':
        """Another set's images, read as this one's: no labels (-1), this one's classes, mean and std.

        Raises:
            ValueError: the other set is not held in memory (a folder of images), or has another size.
        """
        if not isinstance(other, Resident):
            raise ValueError('images of a set in memory cannot be replaced by those of a folder')
        theirs, own = (tuple(x.images.shape[1:3]) for x in (other, self))
        if theirs != own:
            raise ValueError(f'images of {theirs} pixels cannot stand for those of {own}')
        targets = torch.full_like(other.targets, -1)
        return self._like_this(other.images, targets, self.num_classes, self.class_names)

    def _like_this(self, images: Tensor, targets: Tensor, num_classes: int, class_names) -> 'Resident':
        other = Resident(images, targets, num_classes, self.mean, self.std, self.device, class_names)
        other.shard, other.pad = self.shard, self.pad
        return other


def from_arrays(half: tuple[np.ndarray, np.ndarray], class_names, mean_std, device) -> Resident:
    """A set of (images (N, H, W, 3) uint8, labels (N,) int64)."""
    images, labels = map(torch.from_numpy, half)
    return Resident(images, labels, len(class_names), *mean_std, device, class_names=class_names)


def _check(images: Tensor, targets: Tensor, num_classes: int) -> None:
    """-1 is legal besides: what `pictures` gives, of which nobody asks a label."""
    if images.dim() != 4 or images.shape[3] != 3 or images.dtype != torch.uint8:
        raise ValueError(
            f'images must be (N, H, W, 3) uint8, bytes from 0 to 255 with the colours last, got '
            f'{tuple(images.shape)} {images.dtype}'
        )
    if targets.is_floating_point() or targets.shape[:1] != images.shape[:1]:
        raise ValueError(
            f'targets must be integers, one per image, got {tuple(targets.shape)} {targets.dtype} for '
            f'{len(images)} images'
        )
    targets = targets.long()  # -1 would be 255 in eight bits
    wrong = targets[((targets < -1) | (targets >= num_classes)) & (targets != NO_LABEL)]
    if len(wrong):
        raise ValueError(
            f'targets must be 0 to {num_classes - 1}, or -100 for none, got {int(wrong.flatten()[0])}'
        )


def _reflected(size: int) -> Tensor:
    """(9, size): where each crop of the padded line 4 3 2 1 | 0 1 2 ... | size-2 size-3 ... comes from."""
    position = torch.arange(-PAD, size + PAD).abs()
    return torch.where(position >= size, 2 * size - 2 - position, position).unfold(0, size, 1)


def _inside(size: int) -> Tensor:
    """(9, size): whether each pixel of each crop of the padded line lies in the image."""
    position = torch.arange(-PAD, size + PAD)
    return ((position >= 0) & (position < size)).unfold(0, size, 1)
