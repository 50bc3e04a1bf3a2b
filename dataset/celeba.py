"""CelebA: photographs of faces with forty attributes, in its own files.

Z. Liu, P. Luo, X. Wang, X. Tang, "Deep Learning Face Attributes in the Wild", ICCV 2015, arXiv:1411.7766.
Read are Anno/list_attr_celeba.txt, Eval/list_eval_partition.txt and Img/img_align_celeba/*.jpg (178 x 218
pixels) below a folder, or below its folder celeba, or the same without Anno, Eval and Img, as torchvision
lays them out. Of every image the middle square is made size x size.
"""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from .pictures import read_picture, to_rgb

ATTRIBUTES, PARTITION, IMAGES = (
    'Anno/list_attr_celeba.txt', 'Eval/list_eval_partition.txt', 'Img/img_align_celeba',
)  # fmt: skip


def read_celeba(root: str | Path, size: int, limit: int | None = None) -> tuple[list[str], list[tuple]]:
    """Names of the attributes, and (images, values) of the training, validation and test images.

    Images are (N, size, size, 3) bytes, values (N, 40) zeros and ones. limit: so many training images, the
    first.

    Raises:
        ValueError: a file is missing or not of its format; an image that the lists name cannot be read; no
            images for training or for tests.
    """
    kept = ATTRIBUTES, PARTITION, IMAGES
    layouts = kept, tuple(Path(path).name for path in kept)  # the authors' folders, or none of them
    bases = Path(root) / 'celeba', Path(root)
    places = [[base / path for path in layout] for base in bases for layout in layouts]
    found = next((place for place in places if place[0].is_file()), None)
    if found is None:
        raise ValueError(
            f'{Path(root) / ATTRIBUTES}: not there, nor below celeba, nor without the folders '
            "Anno, Eval and Img; CelebA is on its authors' site"
        )
    attributes, partition, folder = found
    names, values = read_attributes(attributes)
    part_of = read_partition(partition)
    parts = []
    for part, most in ((0, limit), (1, None), (2, None)):
        files = [file for file in values if part_of.get(file) == part][:most]
        with ThreadPoolExecutor() as pool:
            images = list(pool.map(lambda file: _square(folder / file, size), files))
        pixels = np.stack(images) if images else np.zeros((0, size, size, 3), np.uint8)
        parts.append((pixels, np.array([values[file] for file in files], np.uint8).reshape(-1, len(names))))
    if not len(parts[0][0]) or not len(parts[2][0]):
        raise ValueError(f'{partition}: names no image for training (0), or none for tests (2)')
    return names, parts


def read_attributes(file: str | Path) -> tuple[list[str], dict[str, np.ndarray]]:
    """Of list_attr_celeba.txt the names, and {image: (A,) zeros and ones}.

    Line 1 is the number of images, line 2 the names, then a line per image: its file and a -1 or 1 for each
    name, separated by one space or two.
    """
    lines = _lines(file)
    try:
        count, names, rows = int(lines[0]), lines[1].split(), [line.split() for line in lines[2:]]
    except (IndexError, ValueError):
        raise ValueError(f'{file}: wanted a number of images, then a line of names') from None
    if len(rows) != count:
        raise ValueError(f'{file}: {count} images by its first line, {len(rows)} lines of images')
    for number, row in enumerate(rows, 3):
        if len(row) != len(names) + 1 or not set(row[1:]) <= {'-1', '1'}:
            raise ValueError(f'{file}, line {number}: wanted an image and {len(names)} times -1 or 1')
    return names, {row[0]: np.array(row[1:], dtype=np.int8).clip(0).astype(np.uint8) for row in rows}


def read_partition(file: str | Path) -> dict[str, int]:
    """Of list_eval_partition.txt {image: 0 (training), 1 (validation) or 2 (test)}."""
    rows = [line.split() for line in _lines(file)]
    for number, row in enumerate(rows, 1):
        if len(row) != 2 or row[1] not in ('0', '1', '2'):
            raise ValueError(f'{file}, line {number}: wanted an image and 0, 1 or 2')
    return {name: int(part) for name, part in rows}


def _lines(file: str | Path) -> list[str]:
    try:
        return [line for line in Path(file).read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f'{file}: cannot be read ({getattr(error, "strerror", None) or error})') from None


def _square(path: Path, size: int) -> np.ndarray:
    image = to_rgb(read_picture(path), str(path))
    side = min(image.size)
    left, top = ((length - side) // 2 for length in image.size)
    square = image.crop((left, top, left + side, top + side))
    return np.asarray(square.resize((size, size), Image.Resampling.BILINEAR))
