"""Average precision of a detector, as COCO defines it: the mean over classes and ten overlaps.

By pycocotools where it is installed, else by the same computation in numpy below, which is slow for thousands
of pictures; a test compares the two.

    of every class, over all pictures: detections by falling score (at most 100 of a class in a picture); each
    takes the free box of highest overlap if that is at least the threshold; precision, made monotone from the
    right, at the recalls 0, 0.01, .., 1; the mean over them, over classes that have a box, over thresholds
    0.50, 0.55, .., 0.95

Crowds and VOC's difficult objects count neither as found nor as missed, and a detection of one is left out:
of a crowd any that lies on it, the overlap being divided by the detection's own area; of a difficult object
the one that takes it by the usual overlap, when no other box is left for it.
"""

import contextlib
import io

import numpy as np
from torch import Tensor

THRESHOLDS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0, 1, 101)
MOST = 100


def library() -> str:
    """Who computes: 'pycocotools VERSION', or 'numpy'."""
    try:
        import importlib.metadata

        import pycocotools.cocoeval  # noqa: F401

        return f'pycocotools {importlib.metadata.version("pycocotools")}'
    except ImportError:
        return 'numpy'


def average_precision(truth: list[dict[str, Tensor]], found: list[dict[str, Tensor]]) -> dict[str, float]:
    """{'ap', 'ap50', 'ap75'} in percent; 0 if the test set has no box.

    truth: per picture boxes, labels and, where there are any, crowd and difficult; found: boxes, scores,
    labels.
    """
    truth = [{key: value.cpu().numpy() for key, value in one.items()} for one in truth]
    found = [{key: value.cpu().float().numpy() for key, value in one.items()} for one in found]
    table = by_numpy(truth, found) if library() == 'numpy' else by_pycocotools(truth, found)
    named = {'ap': table, 'ap50': table[:1], 'ap75': table[5:6]}
    return {name: 100 * float(rows.mean()) if rows.size else 0.0 for name, rows in named.items()}


def by_pycocotools(truth: list[dict], found: list[dict]) -> np.ndarray:
    """(thresholds, classes that have a box)"""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    boxes, detections = [], []
    for i, (one, seen) in enumerate(zip(truth, found)):
        for box, label, crowd, difficult in zip(
            _sizes(one['boxes']), one['labels'], _flags(one, 'crowd'), _flags(one, 'difficult')
        ):
            area = 2e10 if difficult else float(box[2] * box[3])  # beyond all areas it is ignored
            boxes.append({'id': len(boxes) + 1, 'image_id': i, 'category_id': int(label),
                          'bbox': box.tolist(), 'area': area, 'iscrowd': int(crowd)})  # fmt: skip
        for box, label, score in zip(_sizes(seen['boxes']), seen['labels'], seen['scores']):
            detections.append({'image_id': i, 'category_id': int(label), 'bbox': box.tolist(),
                               'score': float(score)})  # fmt: skip
    kinds = sorted({box['category_id'] for box in boxes})
    detections = [one for one in detections if one['category_id'] in kinds]
    if not detections:
        return np.zeros((len(THRESHOLDS), len(kinds)))
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = {'images': [{'id': i} for i in range(len(truth))], 'annotations': boxes,
                        'categories': [{'id': k} for k in kinds]}  # fmt: skip
        coco.createIndex()
        judged = COCOeval(coco, coco.loadRes(detections), 'bbox')
        judged.evaluate()
        judged.accumulate()
    precision = judged.eval['precision'][:, :, :, 0, -1].mean(axis=1)  # all areas, 100 detections
    return precision[:, precision[0] > -1]  # a class may have nothing that counts


def by_numpy(truth: list[dict], found: list[dict]) -> np.ndarray:
    """(thresholds, classes that have a box)"""
    kinds = sorted({int(label) for one in truth for label in one['labels'][~_ignored(one)]})
    curves = [_precision(k, truth, found) for k in kinds]
    return np.stack(curves, axis=1) if curves else np.zeros((len(THRESHOLDS), 0))


def _precision(kind: int, truth: list[dict], found: list[dict]) -> np.ndarray:
    """Mean precision of a class at each threshold."""
    scores, hits, counted, boxes = [], [], [], 0
    for one, seen in zip(truth, found):
        mine, its = one['labels'] == kind, seen['labels'] == kind
        crowd, ignored = _flags(one, 'crowd')[mine], _ignored(one)[mine]
        order = np.argsort(ignored, kind='stable')  # what does not count last
        box, crowd, ignored = _sizes(one['boxes'])[mine][order], crowd[order], ignored[order]
        best = np.argsort(-seen['scores'][its], kind='stable')[:MOST]
        hit, left_out = _matched(_sizes(seen['boxes'])[its][best], box, crowd, ignored)
        scores.append(seen['scores'][its][best])
        hits.append(hit)
        counted.append(~left_out)
        boxes += int((~ignored).sum())
    order = np.argsort(-np.concatenate(scores), kind='stable')
    hits, counted = (np.concatenate(x, axis=1)[:, order] for x in (hits, counted))
    result = np.zeros(len(THRESHOLDS))
    for k in range(len(THRESHOLDS)):
        right = np.cumsum(hits[k] & counted[k])
        wrong = np.cumsum(~hits[k] & counted[k])
        precision = right / np.maximum(right + wrong, np.spacing(1))
        precision = np.maximum.accumulate(precision[::-1])[::-1]
        place = np.searchsorted(right / boxes, RECALLS, side='left')
        result[k] = np.append(precision, 0)[np.minimum(place, len(precision))].mean()
    return result


def _matched(found: np.ndarray, box: np.ndarray, crowd: np.ndarray, ignored: np.ndarray) -> tuple:
    """Per threshold and detection: whether it has found a box, and whether that does not count."""
    hit, left_out = (np.zeros((len(THRESHOLDS), len(found)), bool) for _ in range(2))
    overlap = _overlaps(found, box, crowd)
    for k, threshold in enumerate(THRESHOLDS):
        free = np.ones(len(box), bool)
        for d in range(len(found)):
            best, taken = min(threshold, 1 - 1e-10), -1
            for b in np.flatnonzero(free | crowd):
                if taken >= 0 and not ignored[taken] and ignored[b]:
                    break  # a box that counts goes before one that does not
                if overlap[d, b] >= best:  # of equals the later
                    best, taken = overlap[d, b], b
            if taken >= 0:
                free[taken] = False
                hit[k, d], left_out[k, d] = True, ignored[taken]
    return hit, left_out


def _overlaps(found: np.ndarray, box: np.ndarray, crowd: np.ndarray) -> np.ndarray:
    """Intersection over union; with a crowd over the detection's own area."""
    a, b = found[:, None], box[None]
    low = np.maximum(a[..., :2], b[..., :2])
    high = np.minimum(a[..., :2] + a[..., 2:], b[..., :2] + b[..., 2:])
    both = (high - low).clip(0).prod(axis=-1)
    area = a[..., 2:].prod(axis=-1)
    return both / np.where(crowd[None], area, area + b[..., 2:].prod(axis=-1) - both)


def _sizes(boxes: np.ndarray) -> np.ndarray:
    """Corners -> corner and size, as COCO writes boxes."""
    boxes = boxes.astype(np.float64).reshape(-1, 4)
    return np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)


def _flags(one: dict, name: str) -> np.ndarray:
    return one.get(name, np.zeros(len(one['labels']), bool))


def _ignored(one: dict) -> np.ndarray:
    return _flags(one, 'crowd') | _flags(one, 'difficult')
