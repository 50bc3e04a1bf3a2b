"""The strong view of a whole batch, on the batch's device: RandAugment, then a grey square.

`views.distort` does this image by image: hundreds of small operations for every one, and a GPU has to wait.
Here every image carries the number of its operation, and one chain of tensor operations serves them all: what
is not an image's own operation gets settings that leave the image as it is. Nothing is read back and no shape
depends on data, so a CUDA graph can hold it.
"""

import math

import torch
import torchvision.transforms.v2.functional as functional
from torch import Tensor
from torch.nn.functional import pad

GREY = (125, 123, 114)  # fills a cut-out, as in MLKD's code
# torchvision's RandAugment, in its order: the first six take pixels from elsewhere
OPERATIONS = (
    'Identity', 'ShearX', 'ShearY', 'TranslateX', 'TranslateY', 'Rotate', 'Brightness', 'Color', 'Contrast',
    'Sharpness', 'Posterize', 'Solarize', 'AutoContrast', 'Equalize',
)  # fmt: skip
MOVES = OPERATIONS[:6]
LEVELS = 31  # of strength; an operation, level and sign are one of 14 * 31 * 2 = 868 variants, counted so


class Strong:
    """Two of RandAugment's operations and a grey square, for batches of images of one size.

    Args:
        height, width: of the images, at least 3.
        device: of the batches.
    """

    def __init__(self, height: int, width: int, device) -> None:
        self.height, self.width = height, width
        largest = {
            'ShearX': 0.3, 'ShearY': 0.3, 'TranslateX': 150 / 331 * width, 'TranslateY': 150 / 331 * height,
            'Rotate': 30.0, 'Brightness': 0.9, 'Color': 0.9, 'Contrast': 0.9, 'Sharpness': 0.9,
        }  # fmt: skip
        # torchvision itself moves an image of pixel numbers; it fills with 0, so the numbers start at 1
        numbers = torch.arange(1.0, height * width + 1).reshape(1, height, width)
        sources, settings = [], []
        for operation in OPERATIONS:
            for level, strength in enumerate(torch.linspace(0, largest.get(operation, 0), LEVELS).tolist()):
                for signed in (strength, -strength):
                    settings.append(_settings(operation, level, signed))
                    if operation in MOVES:
                        sources.append(_moved(numbers, operation, signed))
        # (372, H W): which pixel each pixel of a moved image is, counted from 1; 0 is black
        self._sources = torch.stack(sources).flatten(1).long().to(device)
        self._settings = torch.tensor(settings, device=device)  # (868, 4)
        special = ('Color', 'Sharpness', 'AutoContrast', 'Equalize')
        is_special = torch.tensor([[operation == name for name in special] for operation in OPERATIONS])
        self._is_special = is_special.repeat_interleave(LEVELS * 2, 0).to(device)  # (868, 4) bool
        self._grey = torch.tensor(GREY, dtype=torch.uint8, device=device)[:, None, None]
        self._down, self._across = (torch.arange(size, device=device) for size in (height, width))

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """What happens to each of `count` images, drawn on the CPU.

        Returns:
            (count, 2) int64: the variants of an image's two operations; operations and signs are independent,
            the strength is common. (count, 3) int64: top, left and side of its square, up to half the image.
        """
        operation = torch.randint(len(OPERATIONS), (count, 2), generator=generator)
        level = torch.randint(LEVELS, (count, 1), generator=generator)
        negative = torch.randint(2, (count, 2), generator=generator)
        size, top, left = torch.rand((3, count), generator=generator)
        side = (size * min(self.height, self.width) / 2).long()
        top, left = (top * (self.height - side + 1)).long(), (left * (self.width - side + 1)).long()
        return (operation * LEVELS + level) * 2 + negative, torch.stack((top, left, side), 1)

    def __call__(self, images: Tensor, variants: Tensor, squares: Tensor) -> Tensor:
        """The strong images, (B, 3, H, W) uint8.

        Args:
            images: (B, 3, H, W) uint8.
            variants, squares: (B, 2) and (B, 3), what `draw` returned for these images.
        """
        for numbers in variants.unbind(1):
            images = self.augment(images, numbers)
        top, left, side = squares[:, :, None].unbind(1)
        down = (self._down >= top) & (self._down < top + side)  # (B, H)
        across = (self._across >= left) & (self._across < left + side)  # (B, W)
        return torch.where(down[:, None, :, None] & across[:, None, None, :], self._grey, images)

    def augment(self, images: Tensor, numbers: Tensor) -> Tensor:
        """One operation on each image, (B, 3, H, W) uint8: byte for byte torchvision's.

        Args:
            images: (B, 3, H, W) uint8.
            numbers: (B,) each image's variant.
        """
        # shears, shifts and turns; everything else is moved by variant 0, the identity
        sources = self._sources[numbers * (numbers < len(self._sources))]  # (B, H W)
        images = pad(images.flatten(2), (1, 0)).gather(2, sources[:, None].expand(-1, 3, -1)).view_as(images)

        settings, is_special = (
            x[numbers][:, :, None, None, None] for x in (self._settings, self._is_special)
        )
        gain, share, keep, threshold = settings.unbind(1)  # (B, 1, 1, 1) each
        is_color, is_sharpness, is_autocontrast, is_equalize = is_special.unbind(1)
        pixels = images.float()

        # brightness, color, contrast and sharpness add something else to a multiple of the image
        grey = functional.rgb_to_grayscale(pixels).floor()  # (B, 1, H, W)
        other = torch.where(is_color, grey, grey.mean((2, 3), keepdim=True))
        other = torch.where(is_sharpness, _blurring(pixels), other)
        result = torch.addcmul(pixels * gain, other, share)

        # autocontrast stretches each colour to 0..255
        low, high = pixels.amin((2, 3), keepdim=True), pixels.amax((2, 3), keepdim=True)  # (B, 3, 1, 1)
        stretched = is_autocontrast & (low < high)
        scale = ((high - low) * (1 / 255)).masked_fill(~stretched, 1)
        result = (result - low * stretched) / scale

        # posterize, solarize and equalize are about bytes
        result = result.clamp(0, 255).to(torch.uint8) & keep.to(torch.uint8)
        result = torch.where(result >= threshold, ~result, result)
        return torch.where(is_equalize, functional.equalize(result), result)


def _moved(image: Tensor, operation: str, strength: float) -> Tensor:
    """(C, H, W) sheared, shifted or turned."""
    if operation == 'Rotate':
        return functional.rotate(image, strength)
    shift, shear, centre = [0, 0], [0.0, 0.0], None
    axis = 'XY'.find(operation[-1])
    if operation.startswith('Shear'):
        shear[axis], centre = math.degrees(math.atan(strength)), [0, 0]
    elif operation.startswith('Translate'):
        shift[axis] = int(strength)
    return functional.affine(image, 0.0, shift, 1.0, shear, center=centre)


def _settings(operation: str, level: int, strength: float) -> tuple[float, float, int, float]:
    """A variant's gain of the pixels, share of another image, bits to keep, and first byte to invert."""
    gain = 1 + strength if operation in ('Brightness', 'Color', 'Contrast') else 1.0
    share = -strength if operation in ('Color', 'Contrast', 'Sharpness') else 0.0
    keep = 256 - 2 ** round(level / 7.5) if operation == 'Posterize' else 255
    threshold = 255 * torch.linspace(1, 0, LEVELS)[level].item() if operation == 'Solarize' else 256.0
    return gain, share, keep, threshold


def _blurring(pixels: Tensor) -> Tensor:
    """What a 3 x 3 blur, 5/13 in the middle and 1/13 around, adds to (B, 3, H, W): 0 at the border."""
    rows = pixels[:, :, :-2] + pixels[:, :, 1:-1] + pixels[:, :, 2:]
    middle = pixels[:, :, 1:-1, 1:-1]
    total = (rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:]).add(middle, alpha=4)
    return pad((total / 13).round() - middle, (1, 1, 1, 1))  # whole numbers / 13 are never halfway
