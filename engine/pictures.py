"""What networks say, as pictures: pure functions from arrays to (H, W, 3) uint8, without axes.

What is not known is black: class -1, depth 0, a normal of length zero, and whatever is not finite.
"""

import io

import numpy as np

PALETTE = np.array(
    [[196, 160, 120], [166, 196, 224], [236, 236, 228], [200, 70, 60], [64, 140, 80], [108, 84, 170]],
    np.uint8,
)
VIRIDIS = np.array(
    [[68, 1, 84], [71, 45, 123], [59, 82, 139], [44, 114, 142], [33, 145, 140], [40, 174, 128], [94, 201, 98],
     [173, 220, 48], [253, 231, 37]]
)  # fmt: skip
NAMES = {'seg': 'segmentation', 'depth': 'depth', 'normal': 'normals'}
GAP, TITLE = 6, 22  # pixels between pictures and above a column
SMALLEST = 144  # pictures are magnified to at least this side


def class_colours(count: int) -> np.ndarray:
    """(count, 3) uint8: the fixed six, or the colour map of Pascal VOC for more classes."""
    if count <= len(PALETTE):
        return PALETTE[:count]
    colours, c = np.zeros((count, 3), int), np.arange(count)
    for j in range(8):
        for channel in range(3):
            colours[:, channel] |= (c >> channel & 1) << (7 - j)
        c = c >> 3
    return colours.astype(np.uint8)


def image(x: np.ndarray) -> np.ndarray:
    """(3, H, W) in 0..1."""
    return _bytes(x.transpose(1, 2, 0), np.isfinite(x).all(axis=0))


def segmentation(classes: np.ndarray, count: int) -> np.ndarray:
    """(H, W) of `count` classes."""
    return np.where((classes >= 0)[..., None], class_colours(count)[classes.clip(0)], 0).astype(np.uint8)


def depth(x: np.ndarray, most: float) -> np.ndarray:
    """(H, W), dark: near; yellow: `most` and further."""
    known = np.isfinite(x) & (x > 0)
    return _bytes(heat(np.where(known, x, 0) / max(most, 1e-3)) / 255, known)


def normals(x: np.ndarray) -> np.ndarray:
    """(3, H, W), of any length; red: to the right, green: up, blue: towards the camera."""
    length = np.linalg.norm(x, axis=0)
    known = np.isfinite(length) & (length > 1e-6)
    n = np.where(known, x, 0) / np.where(known, length, 1)
    return _bytes((n.transpose(1, 2, 0) * [1, 1, -1] + 1) / 2, known)


def heat(x: np.ndarray) -> np.ndarray:
    """0..1 in viridis, as floats of 0..255."""
    at, steps = np.clip(x, 0, 1), np.linspace(0, 1, len(VIRIDIS))
    return np.stack([np.interp(at, steps, VIRIDIS[:, k]) for k in range(3)], axis=-1)


def dense(arrays: dict, n: int) -> dict[str, np.ndarray]:
    """{title: picture} of the n-th image: itself, and of each task what each of student, teacher, truth has.

    arrays: image (N, 3, H, W), tasks, classes (how many), TASK_WHO: seg (N, H, W), depth (N, 1, H, W),
    normal (N, 3, H, W). All depths of a row share the range of the truth.
    """
    made = {'image': image(arrays['image'][n].astype(np.float32))}
    for task in map(str, arrays['tasks']):
        for who in ('student', 'teacher', 'truth'):
            if f'{task}_{who}' not in arrays:
                continue
            x = arrays[f'{task}_{who}'][n]
            if task == 'seg':
                made[f'{who}: {NAMES[task]}'] = segmentation(x.astype(int), int(arrays['classes']))
            elif task == 'depth':
                most = float(np.nan_to_num(arrays['depth_truth'][n]).max())
                made[f'{who}: {NAMES[task]}'] = depth(x[0].astype(np.float32), most)
            else:
                made[f'{who}: {NAMES[task]}'] = normals(x.astype(np.float32))
    return made


def matrix(x: np.ndarray) -> np.ndarray:
    """(P, P) percentages, a square with its number each."""
    from PIL import Image, ImageDraw

    cell = max(56, SMALLEST // len(x))
    colours = np.where(np.isfinite(x)[..., None], heat(np.nan_to_num(x) / 100), 0).astype(np.uint8)
    picture = Image.fromarray(colours.repeat(cell, 0).repeat(cell, 1))
    pen = ImageDraw.Draw(picture)
    for i, j in np.ndindex(*x.shape):
        ink = 'black' if x[i, j] > 50 else 'white'
        pen.text(((j + 0.5) * cell, (i + 0.5) * cell), f'{x[i, j]:.1f}', ink, _font(), anchor='mm')
    return np.asarray(picture)


def grid(rows: list[dict[str, np.ndarray]], names: list[str] | None = None) -> np.ndarray:
    """Rows of pictures of one size under the titles of the columns; names: written on the first of a row."""
    from PIL import Image, ImageDraw

    height, width = next(iter(rows[0].values())).shape[:2]
    scale = -(-SMALLEST // min(height, width))
    down, across = height * scale + GAP, width * scale + GAP
    sheet = np.full((TITLE + down * len(rows), across * len(rows[0]), 3), 255, np.uint8)
    for i, row in enumerate(rows):
        for j, picture in enumerate(row.values()):
            top, left = TITLE + i * down, j * across
            sheet[top : top + height * scale, left : left + width * scale] = picture.repeat(scale, 0).repeat(
                scale, 1
            )
    sheet = Image.fromarray(sheet)
    pen = ImageDraw.Draw(sheet)
    for j, title in enumerate(rows[0]):
        pen.text((j * across + width * scale / 2, TITLE / 2), title, 'black', _font(), anchor='mm')
    for i, name in enumerate(names or []):
        place = (3, TITLE + i * down + 2)
        pen.rectangle(pen.textbbox(place, name, _font()), 'white')
        pen.text(place, name, 'black', _font())
    return np.asarray(sheet)


def png(picture: np.ndarray) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(picture).save(file, 'PNG')
    return file.getvalue()


def unknown(arrays: dict) -> int:
    """Numbers that are not finite."""
    floats = [x for x in arrays.values() if np.issubdtype(x.dtype, np.floating)]
    return sum(int((~np.isfinite(x)).sum()) for x in floats)


def _bytes(x: np.ndarray, known: np.ndarray) -> np.ndarray:
    return (np.clip(np.where(known[..., None], x, 0), 0, 1) * 255).round().astype(np.uint8)


def _font():
    from PIL import ImageFont

    return ImageFont.load_default(12)
