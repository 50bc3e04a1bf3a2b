"""The embedded data set: ten shapes, rendered here, nothing to download.

Each 32x32 colour image shows one large shape under random pose, colours, surface patterns and light, among
small distractors of any shape, partly hidden by a bar, with noise. Colours and patterns are drawn
independently of the class, and all shapes have the same area, so only the outline tells the class. How much
clutter there is differs from image to image: the plain ones let a network begin to learn within an epoch,
the cluttered ones leave a gap between small and larger networks, so there is something to distil. Shapes that
are easily taken for each other stand in the same half of the list: teachers of one half each tell what they
know from what they do not.
"""

import contextlib
import math
import os
import zipfile
import zlib
from pathlib import Path

import numpy as np

from .named import Data
from .resident import Resident, from_arrays

CLASSES = ('disc', 'ring', 'triangle', 'square', 'hourglass', 'star', 'cross', 'crescent', 'ell', 'tee')
MEAN_STD = (0.50, 0.50, 0.50), (0.24, 0.24, 0.24)
SIZE = 32
_VERSION = 2  # part of the cache's name: raise it whenever the pictures change
_CHUNK = 50


def shapes(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Render n images, the classes in turn and then shuffled.

    Returns:
        images (n, 32, 32, 3) uint8 and labels (n,) int64; the same for the same n and seed.
    """
    rng = np.random.default_rng([seed, n])
    labels = rng.permutation(np.arange(n) % len(CLASSES)).astype(np.int64)
    images = [_render(labels[i : i + _CHUNK], rng) for i in range(0, n, _CHUNK)]
    return np.ascontiguousarray(np.concatenate(images)), labels


def test_size(n: int) -> int:
    """Test images that belong to n training images."""
    return max(n // 4, 10)


def cached_shapes(root: str | Path, n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """`shapes`, kept as a file under root. A missing or damaged file is rendered again."""
    path = Path(root) / f'shapes-v{_VERSION}-n{n}-seed{seed}.npz'
    try:
        with np.load(path, allow_pickle=False) as file:
            return file['images'], file['labels']
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
        pass
    images, labels = shapes(n, seed)
    temporary = path.with_name(f'{path.name}.{os.getpid()}.tmp')
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, 'wb') as file:
            np.savez(file, images=images, labels=labels)
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        # a read-only or full disk costs a few seconds at the next start, nothing else
    return images, labels


def _render(labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    n, fine = len(labels), 2 * SIZE  # two samples per pixel and axis against jagged edges
    axis = ((np.arange(fine) + 0.5) / SIZE - 1).astype(np.float32)
    x, y = axis[None, None, :], axis[None, :, None]

    def uniform(low, high, *shape):
        return rng.uniform(low, high, (n, *(shape or (1, 1)))).astype(np.float32)

    hard = uniform(0, 1)  # 0: a plain picture, 1: everything that hides the outline
    image = _surface(rng, n, x, y, hard)  # (n, 3, fine, fine)
    for _ in range(3):  # distractors: small, of any shape
        kind = rng.integers(len(CLASSES), size=n)
        pose = uniform(-1, 1), uniform(-1, 1), uniform(0.1, 0.22), uniform(0, 2 * math.pi), uniform(0.7, 1.4)
        distractor = _inside(kind, *_local(x, y, *pose))[:, None]
        image = np.where(distractor & (uniform(0, 1) < hard)[:, None], uniform(0, 1, 3, 1, 1), image)

    centre, size, angle = (
        (uniform(-0.3, 0.3), uniform(-0.3, 0.3)),
        uniform(0.5, 0.7),
        uniform(-math.pi / 4, math.pi / 4),
    )
    body = _inside(labels, *_local(x, y, *centre, size, angle, uniform(0.85, 1.18)))[:, None]
    image = np.where(body, _apart(_surface(rng, n, x, y, hard), image, body, uniform(0.25, 0.45, 1)), image)

    angle, offset, width = uniform(0, math.pi), uniform(-0.6, 0.6), uniform(0, 0.09) * hard  # a bar in front
    bar = np.abs(x * np.cos(angle) + y * np.sin(angle) - offset) < width
    image = np.where(bar[:, None], uniform(0, 1, 3, 1, 1), image)

    angle = uniform(0, 2 * math.pi)
    light = uniform(0.75, 1.15) * (1 + uniform(0, 0.35) * (x * np.cos(angle) + y * np.sin(angle)))
    image *= light[:, None]
    image = (image[:, :, ::2] + image[:, :, 1::2]) / 4
    image = image[..., ::2] + image[..., 1::2]
    image += rng.standard_normal(image.shape, dtype=np.float32) * (0.05 * hard)[:, None]
    return np.rint(image.clip(0, 1) * 255).astype(np.uint8).transpose(0, 2, 3, 1)


def _surface(rng: np.random.Generator, n: int, x: np.ndarray, y: np.ndarray, hard: np.ndarray) -> np.ndarray:
    """(n, 3, fine, fine): two random colours in a random pattern: plain, stripes, checks or clouds."""

    def uniform(low, high, *shape):
        return rng.uniform(low, high, (n, *shape)).astype(np.float32)

    a = uniform(0.1, 0.9, 3, 1, 1)
    b = (a + hard[:, None] * uniform(-0.15, 0.15, 3, 1, 1)).clip(0, 1)
    angle, frequency = uniform(0, math.pi, 1, 1), uniform(4, 14, 1, 1)
    u = np.sin(frequency * (x * np.cos(angle) + y * np.sin(angle)) + uniform(0, 2 * math.pi, 1, 1))
    v = np.sin(frequency * (y * np.cos(angle) - x * np.sin(angle)) + uniform(0, 2 * math.pi, 1, 1))
    kind = rng.integers(4, size=(n, 1, 1))
    mix = np.select(
        [kind == 0, kind == 1, kind == 2], [np.zeros_like(u), u > 0, u * v > 0], (u + v) / 4 + 0.5
    )
    return a + (b - a) * mix.astype(np.float32)[:, None]


def _apart(front: np.ndarray, back: np.ndarray, body: np.ndarray, least: np.ndarray) -> np.ndarray:
    """Shift the front's brightness away from the back's until the two differ by `least` on average."""
    area = body.sum(axis=(1, 2, 3))[:, None] + 1e-6
    step = ((front - back).mean(axis=1) * body[:, 0]).sum(axis=(1, 2))[:, None] / area  # (n, 1)
    lack = (least - np.abs(step)).clip(0) * np.where(step >= 0, 1, -1)
    return front + lack.astype(np.float32)[:, :, None, None]


def _local(x, y, cx, cy, size, angle, stretch) -> tuple[np.ndarray, np.ndarray]:
    """Picture coordinates to those of a shape at (cx, cy), turned, stretched along one axis, area kept."""
    dx, dy = (x - cx) / size, (y - cy) / size
    root = np.sqrt(stretch)
    return (dx * np.cos(angle) + dy * np.sin(angle)) * root, (dy * np.cos(angle) - dx * np.sin(angle)) / root


def _inside(kind: np.ndarray, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Which points lie in the shape of each image's kind; all have the area of a disc of radius 1."""
    mask = np.zeros(u.shape, bool)
    for k, (outline, area) in enumerate(_OUTLINES):
        rows = np.flatnonzero(kind == k)
        scale = math.sqrt(area / math.pi)
        mask[rows] = outline(u[rows] * scale, v[rows] * scale)
    return mask


def _polygon(u, v, corners: int, depth: float):
    """Regular polygon (depth = cos(pi / corners)) or star (smaller depth = radius of the inner corners)."""
    radius, half = np.hypot(u, v), math.pi / corners
    angle = np.abs((np.arctan2(v, u) + half) % (2 * half) - half)  # 0 at a corner, half between two
    # the edge runs from (1, 0) to depth * (cos half, sin half)
    ex, ey = depth * math.cos(half) - 1, depth * math.sin(half)
    return (radius * np.cos(angle) - 1) * ey - radius * np.sin(angle) * ex < 0


def _cross(u, v):
    return (np.minimum(np.abs(u), np.abs(v)) < 0.32) & (np.maximum(np.abs(u), np.abs(v)) < 1)


def _crescent(u, v):
    return (np.hypot(u, v) < 1) & (np.hypot(u - 0.55, v) > 0.85)


def _ell(u, v):
    return (np.abs(u) < 0.8) & (np.abs(v) < 1) & ((u < -0.2) | (v < -0.4))


def _tee(u, v):
    return (np.abs(u) < 0.9) & (np.abs(v) < 1) & ((np.abs(u) < 0.3) | (v < -0.4))


# outline in its own units and the area it covers there, in the order of CLASSES
_OUTLINES = [
    (lambda u, v: np.hypot(u, v) < 1, math.pi),
    (lambda u, v: np.abs(np.hypot(u, v) - 0.76) < 0.24, 2.292),
    (lambda u, v: _polygon(u, v, 3, 0.5), 1.299),
    (lambda u, v: _polygon(u, v, 4, math.sqrt(0.5)), 2.0),
    (lambda u, v: (np.abs(u) < 0.12 + 0.75 * np.abs(v)) & (np.abs(v) < 1), 1.98),
    (lambda u, v: _polygon(u, v, 5, 0.45), 1.323),
    (_cross, 2.150),
    (_crescent, 1.478),
    (_ell, 1.8),
    (_tee, 1.92),
]


def _load(root, device, size, _) -> tuple[Resident, Resident]:
    train = from_arrays(cached_shapes(root, size or 8000, seed=0), CLASSES, MEAN_STD, device)
    return train, _load_test(root, device, size, _)


def _load_test(root, device, size, _) -> Resident:
    return from_arrays(cached_shapes(root, test_size(size or 8000), seed=1), CLASSES, MEAN_STD, device)


SHAPES = Data(_load, _load_test, MEAN_STD, sized=True)
