"""Pictures from files, of whatever kind: every reader of a data set opens them here."""

from pathlib import Path

import numpy as np
from PIL import Image


class BadImage(ValueError):
    """An image of the data set that cannot be used; one line that names the file."""


def read_picture(path: str | Path) -> Image.Image:
    """The whole picture, in the mode that its file has.

    Raises:
        BadImage: it is broken, missing, or too large to be meant.
    """
    try:
        with Image.open(path) as image:
            image.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise BadImage(f'{path}: cannot be read as an image ({type(error).__name__})') from None
    return image


def to_rgb(image: Image.Image, path: str) -> Image.Image:
    """8 bits, three channels. PIL itself cuts 16-bit grey off at 255, which leaves a white picture.

    Args:
        image: of any mode. Grey with 16 bits (I;16 and its kin; I, 32 bits, if its values are those of 16)
            is divided by 257, floating point (F) in 0..1 multiplied by 255.
        path: for the message.

    Raises:
        BadImage: values outside these ranges, or a mode that PIL cannot convert.
    """
    if image.mode[0] in 'IF':
        grey = np.asarray(image).astype(np.float64)
        low, high = float(grey.min()), float(grey.max())
        top = 1 if image.mode == 'F' else 65535
        if not 0 <= low <= high <= top:  # also NaN
            raise BadImage(
                f'{path}: is a {image.mode} image with values {low:g} to {high:g}, expected 0 to {top}; '
                f'save it with 8 bits per channel'
            )
        image = Image.fromarray(np.rint(grey * (255 / top)).astype(np.uint8))
    try:
        return image.convert('RGB')
    except ValueError:
        raise BadImage(f'{path}: is a {image.mode} image, which cannot be converted to RGB') from None
