"""The same random view of an image and of its labels for every pixel: segmentation, depth, surface normals.

torchvision.transforms.v2 draws once and turns image and labels alike, where they are tv_tensors. Two things
it cannot know are registered here: a normal is a direction, which turns with the picture, and a picture that
is enlarged shows things nearer. Camera coordinates: x to the right, y up, z forward; unit normals; z-depth in
metres. Unknown pixels are -1 in a segmentation, 0 in depth, zero vectors in normals, and stay so.

    horizontal flip    nx <- -nx                          vertical flip    ny <- -ny
    rotation by t      (nx, ny) <- (cos t nx - sin t ny, sin t nx + cos t ny)       counter-clockwise
    zoom to a crop     sx = W / w, sy = H / h, s = sqrt(sx sy), whatever size it is resized to:
                       depth <- depth / s,   n <- normalise(nx s / sx, ny s / sy, nz s)

The zoom reads the crop as a picture of the same camera: X' = X sx / s, Y' = Y sy / s, Z' = Z / s; a plane
stays a plane with this normal. A rotation leaves depth alone, and so do a resize of the whole map and a crop
that is not resized. For normals with y down (most published ones of NYUv2) turn by -t. Labels are always
sampled nearest: an average over an edge is a depth, a class or a normal that is not there.

    view = dense_views(48, zoom=(0.5, 1), rotate=5, jitter=0.2)
    seen = unwrap(view(wrap({'image': image, 'seg': seg, 'depth': depth, 'normal': normal})))

A transform turns a whole batch by one draw. The training does not: batch norm would see batches of one zoom
and one brightness, which test images do not come in.
"""

import math
from collections.abc import Iterable

import torch
import torchvision.transforms.v2 as transforms
import torchvision.transforms.v2.functional as F
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2.functional import register_kernel


class Seg(tv_tensors.Mask):
    """(..., H, W) classes; -1: unknown."""


class Depth(tv_tensors.Mask):
    """(..., 1, H, W) along the optical axis; 0: unknown."""


class Normals(tv_tensors.Mask):
    """(..., 3, H, W) unit vectors in camera coordinates, y up; zero: unknown."""


TYPES = {'image': tv_tensors.Image, 'seg': Seg, 'depth': Depth, 'normal': Normals}
FILL = {tv_tensors.Image: 0, Seg: -1, Depth: 0, Normals: 0}  # what comes in from outside is unknown
USUAL = {'zoom': 0.5, 'rotate': 5.0, 'jitter': 0.2, 'pad': 0}  # what --augment does unless told otherwise


def wrap(labels: dict[str, Tensor]) -> dict[str, Tensor]:
    """'image', 'seg', 'depth', 'normal' with their types; others, say an index, as they are."""
    return {key: TYPES[key](value) if key in TYPES else value for key, value in labels.items()}


def unwrap(labels: dict[str, Tensor]) -> dict[str, Tensor]:
    """Plain tensors."""
    return {key: value.as_subclass(torch.Tensor) for key, value in labels.items()}


def dense_views(
    size: int | tuple[int, int],
    zoom: tuple[float, float] = (1.0, 1.0),
    rotate: float = 0.0,
    jitter: float = 0.0,
    pad: int = 0,
) -> transforms.Compose:
    """A transform of dicts that wrap has typed.

    Args:
        size: of what comes out, side or (height, width).
        zoom: the share of the picture's area that a square crop takes, from and to; it is resized to size.
        rotate: by up to so many degrees, to either side.
        jitter: of brightness, contrast and saturation of the image, which is (..., 3, H, W) float in 0..1.
        pad: the picture may be moved by up to so many pixels.

    Raises:
        ValueError: a share outside 0..1, from more than to; a negative number.
    """
    if not 0 < zoom[0] <= zoom[1] <= 1:
        raise ValueError(f'zoom: shares of the area from and to, above 0 and up to 1, got {zoom}')
    for name, value, most in (('rotate', rotate, 180), ('jitter', jitter, 1), ('pad', pad, math.inf)):
        if not 0 <= value <= most:
            raise ValueError(
                f'{name} must be {"0 or more" if most == math.inf else f"0 to {most}"}, got {value}'
            )
    size, zoom = (size, size) if isinstance(size, int) else tuple(size), tuple(map(float, zoom))
    steps = [transforms.RandomHorizontalFlip(0.5)]
    if pad:
        steps.append(transforms.RandomCrop(size, padding=pad, fill=FILL))
    if rotate:
        bilinear = transforms.InterpolationMode.BILINEAR
        steps.append(transforms.RandomRotation(rotate, interpolation=bilinear, fill=FILL))
    if zoom != (1.0, 1.0):
        steps.append(transforms.RandomResizedCrop(size, scale=zoom, ratio=(1.0, 1.0), antialias=True))
    if jitter:
        steps.append(transforms.ColorJitter(jitter, jitter, jitter, 0.0))
    return transforms.Compose(steps)


def chosen_views(given: dict, size: int) -> tuple[transforms.Compose, dict]:
    """The transform that --augment asks for, and all of its numbers. given: those that differ from USUAL.

    Raises:
        ValueError: an unknown name, or what dense_views refuses.
    """
    for name, value in given.items():
        if name not in USUAL:
            raise ValueError(f'there is no {name!r}; there are {", ".join(USUAL)}')
        kind = type(USUAL[name])
        if not isinstance(value, int | kind) or isinstance(value, bool):
            raise ValueError(f'{name} must be a {"whole " if kind is int else ""}number, got {value!r}')
    options = USUAL | given
    share = options['zoom'], 1.0
    return dense_views(size, **options | {'zoom': share}), options


def seen_through(view, seeds: Iterable[int], images: Tensor, **labels: Tensor) -> tuple[Tensor, dict]:
    """(images, labels) of a batch, every picture seen as its own seed decides.

    The CPU's global generator is left as it was, and CUDA's is not touched. Another thread must not draw from
    it meanwhile.
    """
    seen = []
    with torch.random.fork_rng(devices=[]):  # torchvision draws on the CPU
        for k, seed in enumerate(seeds):
            torch.default_generator.manual_seed(seed)
            seen.append(unwrap(view(wrap({'image': images[k], **{key: x[k] for key, x in labels.items()}}))))
    whole = {key: torch.stack([one[key] for one in seen]) for key in seen[0]}
    return whole.pop('image'), whole


# ------------------------------------------------------------------------------- what torchvision cannot know


def kernel(functional, *types):
    """Register `change(plain tensor, type, *args)` for types, under torchvision's rules of dispatch."""

    def registered(change):
        for kind in types:

            def call(x, *args, kind=kind, **kwargs):
                plain = x.as_subclass(torch.Tensor)
                full = plain.float() if plain.dtype in (torch.float16, torch.bfloat16) else plain
                return tv_tensors.wrap(change(full, kind, *args, **kwargs).to(plain.dtype), like=x)

            register_kernel(functional, kind)(call)
        return change

    return registered


@kernel(F.horizontal_flip, Normals)
def mirrored(x: Tensor, kind) -> Tensor:
    return F.horizontal_flip_mask(x) * x.new_tensor([-1, 1, 1])[:, None, None]


@kernel(F.vertical_flip, Normals)
def upside_down(x: Tensor, kind) -> Tensor:
    return F.vertical_flip_mask(x) * x.new_tensor([1, -1, 1])[:, None, None]


@kernel(F.rotate, Normals)
def rotated(
    x: Tensor, kind, angle: float, interpolation=None, expand=False, center=None, fill=None
) -> Tensor:
    return turned(F.rotate_mask(x, angle, expand, center, fill), angle)


@kernel(F.resized_crop, Depth, Normals)
def zoomed(x: Tensor, kind, top: int, left: int, height: int, width: int, size, *_, **__) -> Tensor:
    if height < 1 or width < 1:
        raise ValueError(f'a crop of {height} x {width} pixels is empty')
    sx, sy = x.shape[-1] / width, x.shape[-2] / height
    return nearer(F.resized_crop_mask(x, top, left, height, width, size), kind, sx, sy)


@kernel(F.affine, Depth, Normals)
def moved(
    x: Tensor, kind, angle, translate, scale, shear, interpolation=None, fill=None, center=None
) -> Tensor:
    if any(shear):
        raise ValueError(f'depth and normals cannot be sheared, got shear {list(shear)}: no camera sees that')
    x = F.affine_mask(x, angle, translate, scale, shear, fill, center)
    x = turned(x, -angle) if kind is Normals else x  # an affine's angle counts clockwise
    return nearer(x, kind, scale, scale)


@kernel(F.perspective, Depth, Normals)
@kernel(F.elastic, Depth, Normals)
def refused(x: Tensor, kind, *_, **__) -> Tensor:
    raise ValueError(
        'depth and normals cannot be bent (perspective, elastic): use flips, rotations and zooms'
    )


def turned(normal: Tensor, angle: float) -> Tensor:
    """(..., 3, H, W) by so many degrees counter-clockwise."""
    c, s = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    x, y, z = normal.unbind(dim=-3)
    return torch.stack([c * x - s * y, s * x + c * y, z], dim=-3)


def nearer(x: Tensor, kind: type, sx: float, sy: float) -> Tensor:
    """Depth or normals of a picture that is enlarged sx times across and sy times down."""
    s = math.sqrt(sx * sy)
    if kind is Depth:
        return x / s
    x = x * x.new_tensor([s / sx, s / sy, s])[:, None, None]
    return x / x.norm(dim=-3, keepdim=True).clamp(min=1e-12)
