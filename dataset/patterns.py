"""Ten smooth random patterns under noise, made here: the smallest data on which to try data-free methods.

An image of 16x16 pixels is its class's pattern, random numbers at 5x5 points and smooth between them, plus
noise. A network of any size learns them within seconds, and an image source has little to find; on `shapes`
the same takes a GPU.
"""

import numpy as np

from .named import Data
from .resident import Resident, from_arrays
from .shapes import test_size

CLASSES = ('first', 'second', 'third', 'fourth', 'fifth', 'sixth', 'seventh', 'eighth', 'ninth', 'tenth')
MEAN_STD = (0.50, 0.50, 0.50), (0.17, 0.17, 0.17)
SIZE, POINTS = 16, 5
NOISE = 0.35  # deviation, beside 1 of the patterns at their points


def patterns(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """n images (n, 16, 16, 3) uint8 and labels (n,) int64; the patterns are the same for every seed."""
    points = np.random.default_rng(0).standard_normal((len(CLASSES), POINTS, POINTS, 3))
    weight = np.maximum(0, 1 - np.abs(np.linspace(0, POINTS - 1, SIZE)[:, None] - np.arange(POINTS)))
    pattern = np.einsum('ip,jq,kpqc->kijc', weight, weight, points)  # linear between the points
    rng = np.random.default_rng([1, seed, n])
    labels = rng.permutation(np.arange(n) % len(CLASSES)).astype(np.int64)
    images = pattern[labels] + NOISE * rng.standard_normal((n, SIZE, SIZE, 3))
    return np.rint((0.5 + 0.2 * images).clip(0, 1) * 255).astype(np.uint8), labels


def _load(root, device, size, _) -> tuple[Resident, Resident]:
    train = from_arrays(patterns(size or 2000, seed=0), CLASSES, MEAN_STD, device)
    return train, _load_test(root, device, size, _)


def _load_test(root, device, size, _) -> Resident:
    return from_arrays(patterns(test_size(size or 2000), seed=1), CLASSES, MEAN_STD, device)


PATTERNS = Data(_load, _load_test, MEAN_STD, sized=True)
