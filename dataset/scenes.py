"""Rooms, ray-cast here: images with segmentation, depth and surface normals, nothing to download.

A camera looks down into a box-shaped room with boxes, spheres and cylinders on the floor. Colours are random
for every surface, so the class is told by shape and place. Everything is exact: depth is the ray parameter,
normals are the surfaces' own, in camera coordinates.
"""

import math
from collections.abc import Callable

import numpy as np
import torch

from .dense import Dense

CLASSES = ('floor', 'wall', 'ceiling', 'box', 'sphere', 'cylinder')
FLOOR, WALL, CEILING, BOX, SPHERE, CYLINDER = range(6)
UNLABELLED, TEST = 10_000, 20_000  # scenes from 0 on have labels for the teachers


def load_scenes(n: int, size: int, device, labelled: bool) -> tuple[Dense, Dense]:
    """n training scenes (those for teachers, or those whose labels nobody reads) and n / 5 test scenes."""
    refuse_too_many(n)
    first = 0 if labelled else UNLABELLED
    ranges = range(first, first + n), range(TEST, TEST + max(n // 5, 10))
    return tuple(Dense(*_stacked([scene(i, size=size) for i in r]), len(CLASSES), device) for r in ranges)


def refuse_too_many(n: int) -> None:
    """Rooms for students begin where those for teachers end, and those of the test after them."""
    if n > UNLABELLED:
        raise ValueError(
            f'scenes:{n}: at most {UNLABELLED}, further rooms are for other networks and the test'
        )


def scene(index: int, seed: int = 0, size: int = 48) -> tuple[np.ndarray, ...]:
    """One room.

    Returns:
        image (3, S, S) float32 in 0..1, seg (S, S) uint8 after CLASSES, depth (1, S, S) float32 in metres
        along the optical axis, normal (3, S, S) float32 unit vectors in camera coordinates.
    """
    return _cast(index, seed, size)[:4]


def objects(index: int, seed: int = 0, size: int = 48) -> tuple[np.ndarray, np.ndarray]:
    """What an object detector should find: kinds (M,), 0 box, 1 sphere, 2 cylinder, and boxes (M, 4) as
    centre x, centre y, width, height in 0..1 of what is visible."""
    return annotated(index, seed, size)[2:]


def annotated(index: int, seed: int = 0, size: int = 48) -> tuple[np.ndarray, ...]:
    """image and seg as of scene, kinds and boxes as of objects, from one look at the room."""
    image, seg, _, _, owner, kinds = _cast(index, seed, size)
    found, boxes = [], []
    for number, kind in enumerate(kinds):
        rows, columns = np.nonzero(owner == number + 1)
        if len(rows) < 4:  # hidden
            continue
        low, high = np.array([columns.min(), rows.min()]), np.array([columns.max(), rows.max()]) + 1
        found.append(kind)
        boxes.append(np.concatenate([(low + high) / 2, high - low]) / size)
    return image, seg, np.array(found, dtype=np.int64), np.array(boxes, dtype=np.float32).reshape(-1, 4)


def _stacked(scenes: list[tuple]) -> list[torch.Tensor]:
    return [torch.from_numpy(np.stack(part)) for part in zip(*scenes)]


def _cast(index: int, seed: int, size: int) -> tuple:
    g = np.random.default_rng([seed, index])
    u = g.uniform  # every draw below is in a fixed order: pictures are the same everywhere
    fov, pitch = np.radians(u(60, 75)), np.radians(u(10, 25))
    h0 = u(1.3, 1.7)
    half_width, depth_of_room, height = u(1.6, 2.6), u(4, 6), u(2.4, 3)
    tile_1, tile_2 = u(0.2, 0.9, 3), u(0.2, 0.9, 3)
    ceiling, wall = u(0.5, 0.95, 3), u(0.2, 0.9, 3)

    focal = 0.5 * size / math.tan(fov / 2)
    offset = np.arange(size) + 0.5 - size / 2
    d = np.stack(np.broadcast_arrays(offset / focal, -offset[:, None] / focal, 1.0), axis=-1)
    c, s = math.cos(pitch), math.sin(pitch)
    turn = np.array([[1, 0, 0], [0, c, -s], [0, s, c]])
    view = _View(np.array([0, h0, 0.0]), d @ turn.T)

    x, y, z = view.w[..., 0], view.w[..., 1], view.w[..., 2]
    p = view.hit(y < 0, -h0, y, (0, 1, 0), FLOOR)
    odd = (np.floor(p[..., 0] / 0.5) + np.floor(p[..., 2] / 0.5)) % 2 == 1
    view.paint(np.where(odd[..., None], tile_1, tile_2))
    for where, distance, along, normal, kind, colour in (
        (y > 0, height - h0, y, (0, -1, 0), CEILING, ceiling),
        (z > 0, depth_of_room, z, (0, 0, -1), WALL, wall),
        (x > 0, half_width, x, (-1, 0, 0), WALL, wall),
        (x < 0, -half_width, x, (1, 0, 0), WALL, wall),
    ):
        view.hit(where, distance, along, normal, kind)
        view.paint(colour)

    kinds = []
    for number in range(1, g.integers(2, 5) + 1):
        kind = int(g.integers(0, 3))
        z = u(2, depth_of_room - 0.6)
        x = u(-1, 1) * min(half_width - 0.5, 0.55 * z)
        colour = u(0.15, 1, 3)
        _OBJECTS[kind](view, u, x, z, colour, number)
        kinds.append(kind)

    light = np.array([u(-1, 1), 1, u(-1, 0.2)])
    light = light / np.linalg.norm(light)
    ambient, diffuse = u(0.45, 0.6), u(0.45, 0.6)
    shade = ambient + diffuse * np.maximum(view.normal @ light, 0)
    shade = shade * (1 - 0.04 * view.t)
    noise = g.normal(0, 0.02, (size, size, 3))
    image = np.clip(view.colour * shade[..., None] + noise, 0, 1)
    channels_first = [a.transpose(2, 0, 1) for a in (image, view.t[..., None], view.normal @ turn)]
    image, depth, normal = (np.ascontiguousarray(a, dtype=np.float32) for a in channels_first)
    return image, view.kind.astype(np.uint8), depth, normal, view.owner, kinds


class _View:
    """For every pixel the nearest surface found so far."""

    def __init__(self, o: np.ndarray, w: np.ndarray) -> None:
        self.o, self.w = o, w  # rays o + t w; t is the depth, because w has length 1 along the optical axis
        shape = w.shape[:2]
        self.t, self.kind, self.owner = np.full(shape, np.inf), np.zeros(shape, int), np.zeros(shape, int)
        self.normal, self.colour = np.zeros((*shape, 3)), np.zeros((*shape, 3))
        self.new = np.zeros(shape, bool)

    def hit(self, where, distance, along, normal, kind: int) -> np.ndarray:
        """A plane at `distance` along an axis; returns the points reached."""
        t = np.divide(distance, along, out=np.full(self.t.shape, np.inf), where=where)
        return self.nearest(where, t, np.broadcast_to(np.array(normal, float), self.w.shape), kind)

    def nearest(self, where, t, normal, kind: int, owner: int = 0) -> np.ndarray:
        """Take a surface where it is in front of all before; returns the points reached."""
        self.new = where & (t > 1e-3) & (t < self.t)
        self.t = np.where(self.new, t, self.t)
        self.kind = np.where(self.new, kind, self.kind)
        self.owner = np.where(self.new, owner, self.owner)
        self.normal = np.where(self.new[..., None], normal, self.normal)
        return self.at(t)

    def at(self, t) -> np.ndarray:
        return self.o + np.where(np.isfinite(t), t, 0.0)[..., None] * self.w

    def paint(self, colour) -> None:
        self.colour = np.where(self.new[..., None], colour, self.colour)


def _round(view: _View, centre: np.ndarray, r: float, axes: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Where rays meet a sphere (all axes) or an endless upright cylinder (x and z)."""
    w, offset = view.w[..., axes], (view.o - centre)[axes]
    a, b = (w * w).sum(axis=-1), w @ offset
    disc = b * b - a * (offset @ offset - r * r)
    met = disc > 0
    return met, (-b - np.sqrt(np.where(met, disc, 0.0))) / a


def _box(view: _View, u: Callable, x, z, colour, number) -> None:
    half_x, half_z = u(0.2, 0.5, 2)
    h, yaw = u(0.3, 1.2), u(0, math.pi / 2)
    c, s = math.cos(yaw), math.sin(yaw)
    turn = np.array([[c, 0, -s], [0, 1, 0], [s, 0, c]])
    o, w = turn @ (view.o - np.array([x, h / 2, z])), view.w @ turn.T
    half = np.array([half_x, h / 2, half_z])
    with np.errstate(divide='ignore', invalid='ignore'):
        one, two = (-half - o) / w, (half - o) / w
    near, far = np.minimum(one, two), np.maximum(one, two)
    axis = near.argmax(axis=-1)
    t = near.max(axis=-1)
    normal = np.zeros_like(w)
    side = -np.sign(np.take_along_axis(w, axis[..., None], axis=-1))
    np.put_along_axis(normal, axis[..., None], side, axis=-1)
    view.nearest((t < far.min(axis=-1)) & (t > 0), t, normal @ turn, BOX, number)
    view.paint(colour)


def _sphere(view: _View, u: Callable, x, z, colour, number) -> None:
    r = u(0.2, 0.55)
    centre = np.array([x, r, z])
    met, t = _round(view, centre, r, [0, 1, 2])
    view.nearest(met, t, (view.at(t) - centre) / r, SPHERE, number)
    view.paint(colour)


def _cylinder(view: _View, u: Callable, x, z, colour, number) -> None:
    r, h = u(0.15, 0.4), u(0.4, 1.3)
    foot = np.array([x, 0, z])
    met, t = _round(view, foot, r, [0, 2])
    p = view.at(t)
    normal = (p - foot) / r * np.array([1, 0, 1])
    view.nearest(met & (p[..., 1] > 0) & (p[..., 1] < h), t, normal, CYLINDER, number)
    view.paint(colour)
    down = view.w[..., 1]
    t = np.divide(h - view.o[1], down, out=np.full(down.shape, np.inf), where=down != 0)
    p = view.at(t)
    inside = ((p - foot)[..., [0, 2]] ** 2).sum(axis=-1) < r * r
    view.nearest(inside, t, np.broadcast_to(np.array([0.0, 1, 0]), p.shape), CYLINDER, number)
    view.paint(colour)


_OBJECTS = (_box, _sphere, _cylinder)
