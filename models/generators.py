"""Networks that make images, or judge or decode them, for data-free distillation.

A generator takes noise (N, nz), KegNet's also labels, and gives images (N, 3, size, size). Its attribute
`pixels` says which: True, pixels in 0..1, to be normalised as the teacher's data is; False, images in the
teacher's normalised space already, because the last layer makes zero mean and unit variance.

Sizes and defaults are the authors'; parameter counts of the docstrings are for size 32 and K = 10.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class UpsamplingGenerator(nn.Module):
    """A linear layer to a map of a quarter of the size, then twice nearest upsampling and a convolution.

    Args:
        nz: length of the noise.
        size: of the images, a multiple of 4.
        widths: channels of the map, after the first and after the second convolution.
        end: 'norm': Tanh and a batch norm without weights (DAFL, DFAD); 'affine': a batch norm with weights
            (ZSKT); 'pixels': Sigmoid (DFQ, CMI, FastDFKD, MosaicKD), whose other convolutions have no bias.
        bn_eps: of the batch norms after the first two convolutions. DAFL's authors wrote 0.8.

    Parameters: 8,423,939 (nz 1000, 'norm'), 2,329,091 (256, 'norm'), 2,328,899 (256, 'pixels'),
        4,581,955 (256, 'pixels', widths 256, 128, 64), 2,026,051 (100, the same widths).
    """

    def __init__(
        self,
        nz: int = 256,
        size: int = 32,
        widths: tuple[int, int, int] = (128, 128, 64),
        end: str = 'norm',
        bn_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        if size % 4:
            raise ValueError(f'UpsamplingGenerator: size must be a multiple of 4, got {size}')
        self.nz, self.pixels, bias = nz, end == 'pixels', end != 'pixels'
        self.start = size // 4
        a, b, c = widths
        self.linear = nn.Linear(nz, a * self.start**2)
        last = {'norm': [nn.Tanh(), nn.BatchNorm2d(3, affine=False)], 'affine': [nn.BatchNorm2d(3)],
                'pixels': [nn.Sigmoid()]}  # fmt: skip
        self.body = nn.Sequential(
            nn.BatchNorm2d(a),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(a, b, 3, padding=1, bias=bias),
            nn.BatchNorm2d(b, bn_eps),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(b, c, 3, padding=1, bias=bias),
            nn.BatchNorm2d(c, bn_eps),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(c, 3, 3, padding=1),
            *last[end],
        )

    def forward(self, z: Tensor) -> Tensor:
        return self.body(self.linear(z).unflatten(1, (-1, self.start, self.start)))


class TransposedGenerator(nn.Module):
    """DFAD's for images of 64 pixels and more: a linear layer and four transposed convolutions, as DCGAN.

    Args:
        nz: length of the noise, 256.
        size: of the images, a multiple of 16.
        width: channels before the last layer, 64; eight times as many at the start.
    """

    pixels = False

    def __init__(self, nz: int = 256, size: int = 64, width: int = 64) -> None:
        super().__init__()
        if size % 16:
            raise ValueError(f'TransposedGenerator: size must be a multiple of 16, got {size}')
        self.nz, self.start = nz, size // 16
        self.linear = nn.Linear(nz, 8 * width * self.start**2)
        layers, widths = [nn.BatchNorm2d(8 * width)], [8 * width, 4 * width, 2 * width, width, width]
        for a, b in zip(widths, widths[1:]):
            layers += [nn.ConvTranspose2d(a, b, 4, 2, 1, bias=False), nn.BatchNorm2d(b), nn.LeakyReLU(0.2)]
        layers += [nn.Conv2d(width, 3, 3, padding=1), nn.Tanh(), nn.BatchNorm2d(3, affine=False)]
        self.body = nn.Sequential(*layers)
        for m in self.modules():
            if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
                nn.init.normal_(m.weight, 0.0, 0.02)
            elif isinstance(m, nn.BatchNorm2d) and m.affine:
                nn.init.normal_(m.weight, 1.0, 0.02)

    def forward(self, z: Tensor) -> Tensor:
        return self.body(self.linear(z).unflatten(1, (-1, self.start, self.start)))


class PatchDiscriminator(nn.Module):
    """MosaicKD's: a logit per patch, (N, 1, size / 4, size / 4). 531,328 parameters.

    Args:
        width: channels of the first convolution, 128.
        stride: of the last one, 1.
    """

    def __init__(self, width: int = 128, stride: int = 1) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, width, 4, 2, 1),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(width, 2 * width, 4, 2, 1, bias=False),
            nn.BatchNorm2d(2 * width),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(2 * width, 1, 1, stride, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class LabelGenerator(nn.Module):
    """KegNet's: noise and class to an image, standardised channel by channel. 187,880 parameters.

    Args:
        nz: length of the noise, 10.
        num_classes: K.
        size: 8, 16 or 32 (the authors').

    Shape: z (N, nz), label (N, K) one-hot or probabilities.
    """

    pixels = False

    def __init__(self, nz: int = 10, num_classes: int = 10, size: int = 32) -> None:
        super().__init__()
        if size not in (8, 16, 32):
            raise ValueError(f'LabelGenerator: size must be 8, 16 or 32, got {size}')
        self.nz = nz
        self.linear = nn.Sequential(
            nn.Linear(nz + num_classes, 256), nn.BatchNorm1d(256), nn.ReLU(),
            nn.Linear(256, 128), nn.BatchNorm1d(128), nn.ReLU(),
        )  # fmt: skip
        layers, widths = [], [128, 64, 16, 4][: {8: 2, 16: 3, 32: 4}[size]]
        for k, (a, b) in enumerate(zip(widths, widths[1:])):
            layers += [nn.ConvTranspose2d(a, b, 4, 2, int(k > 0), bias=False), nn.BatchNorm2d(b), nn.ReLU()]
        last = nn.ConvTranspose2d(widths[-1], 3, 4, 2, 1, bias=False)
        self.body = nn.Sequential(*layers, last, nn.Tanh())

    def forward(self, z: Tensor, label: Tensor) -> Tensor:
        x = self.body(self.linear(torch.cat([z, label.to(z)], dim=1))[:, :, None, None])
        std, mean = torch.std_mean(x, dim=(2, 3), keepdim=True)
        return (x - mean) / (std + 1e-8)  # a constant channel has no deviation


class Decoder(nn.Module):
    """KegNet's: an image to the noise it was made of. 414,490 parameters for 3x32x32, nz 10, 3 layers."""

    def __init__(self, nz: int = 10, size: int = 32, layers: int = 3) -> None:
        super().__init__()
        widths = [3 * size * size, *[120] * (layers + 1)]
        body = [m for a, b in zip(widths, widths[1:]) for m in (nn.Linear(a, b), nn.ELU(), nn.BatchNorm1d(b))]
        self.body = nn.Sequential(nn.Flatten(), *body, nn.Linear(120, nz))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


# ------------------------------------------------------------------- views that a gradient passes through


def crop_and_flip(x: Tensor, generator: torch.Generator) -> Tensor:
    """Each image (N, C, H, W) padded with zeros (4 for 32 pixels), cropped at random, mirrored or not."""
    n, channels, height, width = x.shape
    pad = height // 8
    dy, dx = torch.randint(2 * pad + 1, (2, n, 1), generator=generator).to(x.device)
    flip = torch.randint(2, (n, 1), generator=generator).to(x.device).bool()
    rows, columns = (torch.arange(side, device=x.device) for side in (height, width))
    rows, columns = rows + dy, torch.where(flip, columns.flip(0), columns) + dx
    x = F.pad(x, (pad, pad, pad, pad))
    x = x.gather(2, rows[:, None, :, None].expand(-1, channels, -1, x.shape[3]))
    return x.gather(3, columns[:, None, None, :].expand(-1, channels, height, -1))


def resized_crop_and_flip(x: Tensor, generator: torch.Generator, least: float = 0.25) -> Tensor:
    """Of each image a random part of at least this share of its area, at its full size, mirrored or not."""
    n = len(x)
    area, ratio, y0, x0 = torch.rand(4, n, generator=generator)
    area = least + (1 - least) * area
    ratio = ((4 / 3) ** (2 * ratio - 1)).sqrt()  # width to height between 3/4 and 4/3
    tall, wide = ((area.sqrt() * r).clamp(max=1) for r in (1 / ratio, ratio))
    flip = 1 - 2 * torch.randint(2, (n,), generator=generator)
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = wide * flip, tall
    theta[:, 0, 2], theta[:, 1, 2] = (2 * x0 - 1) * (1 - wide), (2 * y0 - 1) * (1 - tall)
    grid = F.affine_grid(theta.to(x), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, padding_mode='border', align_corners=False)
