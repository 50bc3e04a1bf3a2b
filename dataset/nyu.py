"""NYUv2: the labelled frames of the Kinect data set, from its MATLAB file.

N. Silberman, D. Hoiem, P. Kohli, R. Fergus, "Indoor Segmentation and Support Inference from RGBD Images",
ECCV 2012. The file nyu_depth_v2_labeled.mat (2.8 GB, MATLAB 7.3, that is HDF5) holds 1449 frames: images,
depths in metres, labels 0 (unknown) to 894. It is read through h5py.

Beside it may lie splits.mat (trainNdxs, testNdxs: 795 and 654 frames, counted from 1), else the first 795
frames are for training; and classes.txt, a line per label 0 to 894 with its class (-1: unknown), else the 12
most frequent labels are a class each and all others the 13th. Normals are those of the depth map: the cross
product of its differences across and down, in camera coordinates.
"""

from pathlib import Path

import numpy as np
import torch

from .dense import Dense

FILE = 'nyu_depth_v2_labeled.mat'
TRAIN = 795
# the depth map's camera for 640 x 480 pixels: focal lengths and centre
CAMERA = (518.86, 519.47, 325.58, 253.74)


def read_nyu(root: str | Path, device, size: int) -> tuple[Dense, Dense]:
    """Training and test frames, made size x size.

    Raises:
        ValueError: the file is missing or not of this format, or h5py is not installed.
    """
    path = Path(root) / FILE
    if not path.is_file():
        raise ValueError(f'{path}: not there; it is on the site of the NYU Depth V2 data set')
    try:
        import h5py
    except ImportError:
        raise ValueError('nyuv2: h5py is not installed (pip install h5py)') from None
    try:
        with h5py.File(path) as file:  # MATLAB's axes are reversed: (frame, channel, column, row)
            frames = [_frame(file, i, size) for i in range(len(file['images']))]
    except (OSError, KeyError, IndexError, ValueError) as error:
        raise ValueError(f'{path}: not the labelled data set ({error})') from None
    images, labels, depths, normals = (np.stack(part) for part in zip(*frames))
    train, test = _split(Path(root), len(images))
    classes, count = _classes(Path(root), labels[train])
    if labels.min() < 0 or labels.max() >= len(classes):
        raise ValueError(
            f'{path}: labels must be 0..{len(classes) - 1}, got {labels.min()} to {labels.max()}; '
            f'classes.txt has a line for each'
        )
    arrays = images, classes[labels], depths, normals
    return tuple(
        Dense(*(torch.from_numpy(np.ascontiguousarray(a[half])) for a in arrays), count, device)
        for half in (train, test)
    )


def _frame(file, i: int, size: int) -> tuple[np.ndarray, ...]:
    image = file['images'][i].transpose(0, 2, 1)  # (3, H, W)
    depth = file['depths'][i].T.astype(np.float32)
    label = file['labels'][i].T.astype(np.int64)
    if image.shape[1:] != depth.shape or label.shape != depth.shape:
        raise ValueError(f'frame {i}: image, depth and label differ in size')
    height, width = depth.shape
    rows = ((np.arange(size) + 0.5) * height / size).astype(int)
    columns = ((np.arange(size) + 0.5) * width / size).astype(int)
    small = torch.nn.functional.interpolate(  # the image is averaged, labels are picked
        torch.from_numpy(image)[None].float() / 255, (size, size), mode='area'
    )[0].numpy()
    grid = np.ix_(rows, columns)
    depth = depth[grid]
    return small, label[grid], depth[None], _normals(depth, rows, columns, width / 640, height / 480)


def _normals(depth: np.ndarray, rows, columns, scale_x: float, scale_y: float) -> np.ndarray:
    """(3, S, S) unit vectors towards the camera; 0 where the depth is unknown."""
    fx, fy, cx, cy = CAMERA
    x = (columns + 0.5 - cx * scale_x) / (fx * scale_x) * depth
    y = -(rows + 0.5 - cy * scale_y)[:, None] / (fy * scale_y) * depth
    points = np.stack([x, y, depth], axis=-1)
    across, down = np.gradient(points, axis=1), np.gradient(points, axis=0)
    normal = np.cross(across, down)
    length = np.linalg.norm(normal, axis=-1, keepdims=True)
    normal = np.divide(normal, length, out=np.zeros_like(normal), where=length > 0)
    normal = normal * np.where((normal * points).sum(axis=-1, keepdims=True) > 0, -1, 1)
    normal[depth <= 0] = 0
    return np.ascontiguousarray(normal.transpose(2, 0, 1), dtype=np.float32)


def _split(root: Path, frames: int) -> tuple[np.ndarray, np.ndarray]:
    path = root / 'splits.mat'
    if path.is_file():
        import scipy.io

        try:
            content = scipy.io.loadmat(path)
            halves = tuple(content[name].ravel().astype(int) - 1 for name in ('trainNdxs', 'testNdxs'))
        except Exception as error:  # scipy's own kinds
            raise ValueError(
                f'{path}: must be a MATLAB file with trainNdxs and testNdxs ({type(error).__name__})'
            ) from None
        for half in halves:
            if not len(half) or half.min() < 0 or half.max() >= frames:
                raise ValueError(f'{path}: frames must be 1..{frames}, and some of each half')
        return halves
    order = np.arange(frames)
    return order[: min(TRAIN, frames - 1)], order[min(TRAIN, frames - 1) :]


def _classes(root: Path, labels: np.ndarray) -> tuple[np.ndarray, int]:
    """A table from label to class, and how many classes there are."""
    path = root / 'classes.txt'
    if path.is_file():
        try:
            table = np.array([int(line) for line in path.read_text().split()])
        except ValueError as error:
            raise ValueError(f'{path}: must have the number of a class per line ({error})') from None
        if not len(table) or table.min() < -1 or table.max() < 0:
            raise ValueError(f'{path}: classes must be 0, 1, ..., or -1 where unknown')
        return table, int(table.max()) + 1
    counts = np.bincount(labels.ravel(), minlength=895)
    counts[0] = 0
    frequent = counts.argsort(kind='stable')[::-1][:12]
    table = np.full(max(len(counts), 895), 12)
    table[frequent] = np.arange(12)
    table[0] = -1
    return table, 13
