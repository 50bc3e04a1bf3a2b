"""A data set that lives as bytes in device memory, and its augmentation in one gather per batch."""

from collections.abc import Iterator

import torch
from torch import Tensor

PAD = 4  # reflected pixels on each side before the random crop


class Resident:
    """Images and labels on one device.

    Args:
        images: (N, H, W, 3) uint8.
        targets: (N,) int64.
        num_classes, mean, std: of the data set; mean and std per channel for pixels in 0..1.
        device: where everything is kept, and where batches appear.

    Batches are (img, target, index): img (B, 3, H, W) float32, normalised, channels_last; target (B,) int64;
    index (B,) int64, the images' positions in this set.
    """

    def __init__(self, images: Tensor, targets: Tensor, num_classes: int, mean, std, device) -> None:
        self.images, self.targets = images.to(device).contiguous(), targets.to(device)
        self.num_classes, self.mean, self.std, self.device = num_classes, mean, std, torch.device(device)
        # one multiply-add takes a byte to its normalised value
        self._scale = 1 / (255 * torch.tensor(std, device=device))
        self._shift = -torch.tensor(mean, device=device) / torch.tensor(std, device=device)

    def __len__(self) -> int:
        return len(self.images)

    def train_batches(
        self, batch_size: int, seed: int, epoch: int
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """One shuffled epoch: reflect-pad by 4, random crop, random flip. The last batch may be smaller, but
        a batch of one is left out: batch norm and relations need two.

        All randomness is a function of (seed, epoch), drawn on the CPU: the same on every device, and a
        resumed run needs no generator state.
        """
        n = len(self)
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        order = torch.randperm(n, generator=generator).to(self.device)
        shift = torch.randint(2 * PAD + 1, (n, 2), generator=generator).to(self.device)
        flip = torch.randint(2, (n,), generator=generator).to(self.device)
        for start in range(0, n if n % batch_size != 1 else n - 1, batch_size):
            index = order[start : start + batch_size]
            yield self.crops(index, shift[index], flip[index]), self.targets[index], index

    def test_batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Every image once, in order, as it is."""
        for index in torch.arange(len(self), device=self.device).split(batch_size):
            centre = torch.full((len(index), 2), PAD, device=self.device)
            yield self.crops(index, centre, torch.zeros_like(index)), self.targets[index], index

    def crops(self, index: Tensor, shift: Tensor, flip: Tensor) -> Tensor:
        """Padded, cropped, flipped, normalised images.

        Args:
            index: (B,) which images.
            shift: (B, 2) top and left corner of the crop in the padded image, 0..8; 4 is the centre.
            flip: (B,) 1 mirrors left and right.
        """
        height, width = self.images.shape[1:3]
        row = self._reflect(height)[shift[:, :1] + torch.arange(height, device=self.device)]  # (B, H)
        across = torch.arange(width, device=self.device)
        across = torch.where(flip[:, None] == 1, width - 1 - across, across)
        column = self._reflect(width)[shift[:, 1:] + across]  # (B, W)
        # every wanted pixel by its number in the whole set: one gather does pad, crop and flip
        pixel = (index[:, None] * height + row)[:, :, None] * width + column[:, None, :]
        rgb = self.images.reshape(-1, 3)[pixel]  # (B, H, W, 3)
        return torch.addcmul(self._shift, rgb.float(), self._scale).permute(0, 3, 1, 2)

    def _reflect(self, size: int) -> Tensor:
        """Padded position -> source position: 4 3 2 1 | 0 1 2 ... | size-2 size-3 ..."""
        position = torch.arange(-PAD, size + PAD, device=self.device).abs()
        return torch.where(position >= size, 2 * size - 2 - position, position)

    def split(self, fraction: float, seed: int) -> tuple['Resident', 'Resident']:
        """Two disjoint sets: all but a random fraction, and that fraction."""
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed)).to(self.device)
        held = max(int(len(self) * fraction), 1)
        return tuple(
            Resident(self.images[i], self.targets[i], self.num_classes, self.mean, self.std, self.device)
            for i in (order[held:], order[:held])
        )
