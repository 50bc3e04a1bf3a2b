"""Pictures with a label for every pixel, or with boxes around objects: embedded rooms, VOC and COCO.

A data set is indexed: data[i] gives (image, target).
image: (3, H, W) float32 in 0..1.
target: for segmentation (H, W) int64, -1 where there is no label; for detection {'boxes': (M, 4) float32 as
x1, y1, x2, y2 in pixels, 'labels': (M,) int64 from 1 on (0 is the background), 'crowd': (M,) bool, many
objects in one box, 'difficult': (M,) bool, of VOC; neither is learnt nor counted}.
"""

import json
import os
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from xml.etree.ElementTree import ParseError, parse

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from . import scenes
from .folder import decoded
from .pictures import BadImage, read_picture, to_rgb

TASKS = ('segmentation', 'detection')
SMALLEST = 4  # pixels: smaller objects of the rooms are left out, nobody finds them
VOC = (
    'aeroplane', 'bicycle', 'bird', 'boat', 'bottle', 'bus', 'car', 'cat', 'chair', 'cow', 'diningtable',
    'dog', 'horse', 'motorbike', 'person', 'pottedplant', 'sheep', 'sofa', 'train', 'tvmonitor',
)  # fmt: skip


def load(task: str, name: str, root: str | Path, size: int) -> tuple:
    """(training set, the same kind of pictures without labels or None, test set)

    Args:
        task: 'segmentation' or 'detection'.
        name: 'scenes', 'scenes:N' (N training pictures, rendered here), 'voc' (2012), 'coco' (detection).
        root: where VOCdevkit/ or coco/ lies, and where rooms are kept.
        size: scenes: side of the pictures.

    Raises:
        ValueError: an unknown name or task; a file that is missing or not of its format; one line.
    """
    kind, _, number = name.partition(':')
    if task not in TASKS or kind not in ('scenes', 'voc', 'coco') or (number and kind != 'scenes'):
        raise ValueError(f'no data for {task} is called {name!r}; there are scenes, scenes:N, voc, coco')
    if kind == 'scenes':
        if number and (not number.isdigit() or int(number) < 6):
            raise ValueError(f'{name}: scenes:N has N >= 6 pictures')
        n = int(number or 1200)
        scenes.refuse_too_many(n)
        firsts = ((0, n), (scenes.UNLABELLED, n), (scenes.TEST, max(n // 6, 4)))
        return tuple(Rooms(task, first, count, size, root) for first, count in firsts)
    if kind == 'voc':
        train, test = (Voc(task, root, split) for split in ('train', 'val'))
        return train, None, test
    if task == 'segmentation':
        raise ValueError('coco: its masks are not read here; --task segmentation takes scenes or voc')
    train, test = (Coco(root, split) for split in ('train2017', 'val2017'))
    if train.class_names != test.class_names:
        raise ValueError(f'{root}: train2017 and val2017 have different categories')
    return train, None, test


class Rooms:
    """Embedded rooms (scenes.py), rendered once and kept as a file under root."""

    def __init__(self, task: str, first: int, n: int, size: int, root: str | Path) -> None:
        self.task, self.files = task, []
        self.class_names = scenes.CLASSES if task == 'segmentation' else ('background', *scenes.CLASSES[3:])
        path = Path(root) / f'rooms-v1-{first}-n{n}-{size}.npz'
        try:
            with np.load(path, allow_pickle=False) as file:
                made = {key: file[key] for key in ('image', 'seg', 'count', 'kind', 'box')}
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
            made = _rendered(range(first, first + n), size)
            _keep(path, made)
        self.images = torch.from_numpy(made['image']).permute(0, 3, 1, 2)
        self.seg = torch.from_numpy(made['seg'])
        counts = made['count'].tolist()
        self.kinds = torch.from_numpy(made['kind']).split(counts)
        self.boxes = torch.from_numpy(made['box']).split(counts)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple:
        image = self.images[i].float() / 255
        if self.task == 'segmentation':
            return image, self.seg[i].long()
        big = (self.boxes[i][:, 2:] - self.boxes[i][:, :2]).amin(dim=1) >= SMALLEST
        return image, _boxes(self.boxes[i][big], self.kinds[i][big] + 1)


def _rendered(indices: range, size: int) -> dict[str, np.ndarray]:
    rooms = [scenes.annotated(i, size=size) for i in indices]
    images, segs, kinds, boxes = zip(*rooms)
    box = np.concatenate(boxes) * size
    corners = np.concatenate([box[:, :2] - box[:, 2:] / 2, box[:, :2] + box[:, 2:] / 2], axis=1)
    return {
        'image': np.stack([(image.transpose(1, 2, 0) * 255).round().astype(np.uint8) for image in images]),
        'seg': np.stack(segs),
        'count': np.array([len(kind) for kind in kinds]),
        'kind': np.concatenate(kinds),
        'box': corners.round().astype(np.float32),  # whole pixels by their making
    }


def _keep(path: Path, made: dict) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f'{path.name}.{os.getpid()}.tmp')
        with open(temporary, 'wb') as file:
            np.savez(file, **made)
        os.replace(temporary, path)
    except OSError:
        pass  # a read-only or full disk costs half a minute at the next start, nothing else


class Voc:
    """Pascal VOC 2012 through torchvision's readers: root/VOCdevkit/VOC2012."""

    def __init__(self, task: str, root: str | Path, split: str) -> None:
        from torchvision.datasets import VOCDetection, VOCSegmentation

        self.task, self.class_names = task, ('background', *VOC)
        reader = VOCSegmentation if task == 'segmentation' else VOCDetection
        try:
            self.data = reader(str(root), year='2012', image_set=split, download=False)
        except (RuntimeError, OSError) as error:
            raise ValueError(
                f'{root}: VOCdevkit/VOC2012 is not there or not whole ({error}); it is at '
                'http://host.robots.ox.ac.uk/pascal/VOC/voc2012'
            ) from None

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, i: int) -> tuple:
        image = _picture(self.data.images[i])
        if self.task == 'segmentation':
            return image, self._classes(self.data.masks[i], image)
        path = self.data.annotations[i]
        try:
            return image, self._target(self.data.parse_voc_xml(parse(path).getroot())['annotation'])
        except (OSError, KeyError, ValueError, ParseError) as error:
            raise BadImage(f'{path}: cannot be read ({error})') from None

    def _classes(self, path: str, image: Tensor) -> Tensor:
        """Palette numbers; 255: no label."""
        seg = torch.from_numpy(np.array(read_picture(path))).long()
        if seg.shape != image.shape[1:]:
            raise BadImage(f'{path}: is of {tuple(seg.shape)}, wanted a number per pixel of its picture')
        wrong = seg[(seg >= len(self.class_names)) & (seg != 255)]
        if len(wrong):
            last = len(self.class_names) - 1
            raise BadImage(f'{path}: label {int(wrong[0])} is none of 0..{last}, or 255')
        return torch.where(seg == 255, -1, seg)

    def _target(self, annotation: dict) -> dict:
        boxes, labels, difficult = [], [], []
        for thing in annotation.get('object', []):
            corner = [float(thing['bndbox'][key]) for key in ('xmin', 'ymin', 'xmax', 'ymax')]
            boxes.append([corner[0] - 1, corner[1] - 1, *corner[2:]])  # numbers from 1, both ends included
            if thing['name'] not in VOC:
                raise ValueError(
                    f"{thing['name']!r} is none of VOC's 20 classes; own classes: write COCO's format, "
                    '--data_name coco'
                )
            labels.append(self.class_names.index(thing['name']))
            difficult.append(thing.get('difficult', '0') == '1')
        return _boxes(boxes, labels, difficult=difficult)


class Coco:
    """COCO's instances: root/coco/SPLIT/*.jpg and root/coco/annotations/instances_SPLIT.json."""

    def __init__(self, root: str | Path, split: str) -> None:
        self.folder = Path(root) / 'coco' / split
        path = self.folder.parent / 'annotations' / f'instances_{split}.json'
        try:
            content = json.loads(path.read_text())
            kinds = sorted(content['categories'], key=lambda kind: kind['id'])
            self.class_names = ('background', *(kind['name'] for kind in kinds))
            place = {kind['id']: k for k, kind in enumerate(kinds, 1)}  # sparse ids, 1 to 90
            self.pictures = sorted(content['images'], key=lambda picture: picture['id'])
            found = {picture['id']: ([], [], []) for picture in self.pictures}
            if not found:
                raise ValueError('has no images')
            for thing in content['annotations']:
                refuse_annotation(thing, found, place)
                boxes, labels, crowd = found[thing['image_id']]
                x, y, w, h = thing['bbox']
                if w > 0 and h > 0:
                    boxes.append([x, y, x + w, y + h])
                    labels.append(place[thing['category_id']])
                    crowd.append(bool(thing.get('iscrowd', 0)))
        except OSError as error:
            raise ValueError(
                f'{path}: cannot be read ({error.strerror}); COCO is at https://cocodataset.org'
            ) from None
        except (ValueError, KeyError, TypeError) as error:
            reason = f'has no {error}' if isinstance(error, KeyError) else error
            raise ValueError(f'{path}: is not of the format of COCO instances ({reason})') from None
        self.targets = [found[picture['id']] for picture in self.pictures]

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, i: int) -> tuple:
        return _picture(self.folder / self.pictures[i]['file_name']), _boxes(*self.targets[i])


def refuse_annotation(thing: dict, images: dict, categories: dict) -> None:
    """One wrong entry among many is named."""
    who = f'annotation {thing.get("id")}' if isinstance(thing, dict) else f'annotation {thing!r}'
    for key, known, of in (
        ('image_id', images, 'is of no image'),
        ('category_id', categories, 'is in no category'),
    ):
        if thing[key] not in known:
            raise ValueError(f'{who}: {key} {thing[key]!r} {of}')
    box = thing['bbox']
    if len(box) != 4 or not all(isinstance(x, (int, float)) for x in box):
        raise ValueError(f'{who}: bbox must be [x, y, width, height], got {box!r}')


def _picture(path: str | Path) -> Tensor:
    image = to_rgb(read_picture(path), str(path))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def _boxes(boxes, labels, crowd=None, difficult=None) -> dict[str, Tensor]:
    boxes = torch.as_tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    labels = torch.as_tensor(labels, dtype=torch.int64)
    crowd, difficult = (
        torch.as_tensor([False] * len(boxes) if flags is None else flags, dtype=torch.bool)
        for flags in (crowd, difficult)
    )
    return {'boxes': boxes, 'labels': labels, 'crowd': crowd, 'difficult': difficult}


# ---------------------------------------------------------------------------------- the batches of a training


class Steps(torch.utils.data.Dataset):
    """The pictures of each step, a function of seed and number of the step alone: a resume needs no state.

    steps[k] gives {'labelled': (images, targets)} and, if there are any, {'unlabelled': (images, None)},
    lists. In each step every picture has the same chance, and none comes twice. Mirrored by chance; with
    crop, at half to twice its size a square of that side is cut out, black and without labels beside it. With
    view, of dense_views.py, image and segmentation are seen through it in the end.
    shard: (this process, number of processes); together they see what one would with that many times the
    batch, batch_size each, or equally fewer where there are not enough.
    """

    def __init__(
        self, labelled, unlabelled, batch_size: int, seed: int, crop: int | None = None, view=None,
        shard: tuple[int, int] = (0, 1),
    ) -> None:  # fmt: skip
        self.parts = {'labelled': labelled} | ({'unlabelled': unlabelled} if unlabelled else {})
        self.batch_size, self.seed, self.crop, self.view = batch_size, seed, crop, view
        self.shard = shard

    def __getitem__(self, step: int) -> dict:
        made = {}
        rank, processes = self.shard
        for k, (name, data) in enumerate(self.parts.items()):
            g = torch.Generator().manual_seed(((self.seed * 1_000_003 + k) * 1_000_003 + step) % 2**63)
            n = min(self.batch_size, len(data) // processes)
            chosen = torch.randperm(len(data), generator=g)[rank * n : (rank + 1) * n].tolist()
            for _ in range(rank * n):
                passed_over(g, self.crop, self.view)
            images, targets = zip(*(augmented(*data[i], g, self.crop, self.view) for i in chosen))
            made[name] = list(images), list(targets) if name == 'labelled' else None
        return made


def in_order(steps: Steps, numbers: range, workers: int) -> Iterator[dict]:
    """The pictures of these steps, prepared by so many processes."""
    return decoded(steps, workers, batch_size=None, sampler=numbers)


def augmented(image: Tensor, target, g: torch.Generator, crop: int | None, view=None) -> tuple:
    """Mirrored by chance, for segmentation cut out at a random size; without crowds and difficult objects."""
    mirror = torch.rand((), generator=g) < 0.5
    if isinstance(target, dict):
        left = ~(target['crowd'] | target['difficult'])
        boxes, labels = (target[key][left] for key in ('boxes', 'labels'))
        if mirror:
            width = image.shape[2]
            image = image.flip(2)
            boxes = torch.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], dim=1)
        return image, {'boxes': boxes, 'labels': labels}
    if mirror:
        image, target = image.flip(2), target.flip(1)
    image, target = _cut(image, target, g, crop) if crop else (image, target)
    if view:
        from .dense_views import seen_through

        seed = int(torch.randint(2**31, (), generator=g))
        image, labels = seen_through(view, [seed], image[None], seg=target[None])
        image, target = image[0], labels['seg'][0]
    return image, target


def passed_over(g: torch.Generator, crop: int | None, view=None) -> None:
    """Draw what `augmented` draws, for a picture that another process takes."""
    torch.rand((), generator=g)
    if crop:
        torch.rand((), generator=g)
        for _ in range(2):
            torch.randint(2, (), generator=g)  # one number of the generator whatever the bound is
    if view:
        torch.randint(2**31, (), generator=g)


def _cut(image: Tensor, target: Tensor, g: torch.Generator, side: int) -> tuple[Tensor, Tensor]:
    scale = 0.5 + 1.5 * torch.rand((), generator=g).item()
    size = [max(round(length * scale), 1) for length in image.shape[1:]]
    image = F.interpolate(image[None], size, mode='bilinear', align_corners=False, antialias=True)[0]
    target = F.interpolate(target[None, None].float(), size, mode='nearest-exact')[0, 0].long()
    missing = [max(side - length, 0) for length in size]
    image = F.pad(image, (0, missing[1], 0, missing[0]))
    target = F.pad(target, (0, missing[1], 0, missing[0]), value=-1)
    top, left = (int(torch.randint(length - side + 1, (), generator=g)) for length in target.shape)
    return tuple(x[..., top : top + side, left : left + side] for x in (image, target))
