"""Detectors: the loss with labels, and average precision."""

import torch
from torch import Tensor

from ka_losses.transformer_ka import TaskAmalgamation, detr_ce, giou


class WithLabels:
    """DETR's loss, summed over the decoder's layers: classes, boxes, overlap; each query gets one object.

    num_classes: without background. Called with what Detector returns and the labels of a batch.
    """

    def __init__(self, num_classes: int, eos: float = 0.1, w_bbox: float = 5.0, w_giou: float = 2.0) -> None:
        self.matching = TaskAmalgamation([list(range(num_classes))], num_classes)
        self.eos, self.w_bbox, self.w_giou = eos, w_bbox, w_giou

    def __call__(self, found: list[dict], kinds: list[Tensor], boxes: list[Tensor]) -> tuple[Tensor, dict]:
        targets = [{'labels': kind + 1, 'boxes': box} for kind, box in zip(kinds, boxes)]
        count, total = max(sum(map(len, kinds)), 1), 0.0
        terms = {'ce': 0.0, 'bbox': 0.0, 'giou': 0.0}
        for out in found:
            pairs = self.matching.match(out, targets)
            labels = torch.zeros(out['logits'].shape[:2], dtype=torch.int64, device=out['logits'].device)
            for n, (query, wanted) in enumerate(pairs):
                labels[n, query] = targets[n]['labels'][wanted]
            got = torch.cat([out['boxes'][n, query] for n, (query, _) in enumerate(pairs)])
            want = torch.cat([boxes[n][wanted] for n, (_, wanted) in enumerate(pairs)])
            each = {'ce': detr_ce(out['logits'], labels, self.eos), 'bbox': (got - want).abs().sum() / count,
                    'giou': (1 - giou(got, want)).sum() / count}  # fmt: skip
            total = total + each['ce'] + self.w_bbox * each['bbox'] + self.w_giou * each['giou']
            terms = {key: terms[key] + value for key, value in each.items()}
        return total, terms


@torch.no_grad()
def detections(net, data, batch_size: int = 100) -> tuple[Tensor, Tensor]:
    """What the last decoder layer says of all images: (N, Q, K) probabilities, (N, Q, 4) boxes."""
    net.eval()
    last = [net(img)[0][-1] for img, *_ in data.test_batches(batch_size)]
    p = torch.cat([out['logits'].float().softmax(dim=2)[:, :, 1:] for out in last])
    return p, torch.cat([out['boxes'].float() for out in last])


def average_precision(p: Tensor, boxes: Tensor, truth: list[Tensor], least: float = 0.5) -> float:
    """Area under precision over recall for one kind, in percent; NaN where there is no such object.

    p: (N, Q) probabilities; boxes: (N, Q, 4); truth: per image (M, 4). Detections of all images, the surest
    first: each counts for the object that it overlaps most, if the intersection over union is at least
    `least` and no surer one has taken that object. Precision is made monotone before the area is taken.
    """
    total = sum(map(len, truth))
    if not total:
        return float('nan')
    free = [torch.ones(len(boxes_of), dtype=torch.bool) for boxes_of in truth]
    best = [
        iou(boxes[n][:, None], truth[n][None]).max(dim=1) if len(truth[n]) else None for n in range(len(p))
    ]
    hits = []
    for place in p.flatten().argsort(descending=True, stable=True).tolist():
        n, q = divmod(place, p.shape[1])
        overlap, which = (best[n].values[q], best[n].indices[q]) if best[n] is not None else (0.0, 0)
        hit = bool(overlap >= least and free[n][which])
        if hit:
            free[n][which] = False
        hits.append(hit)
    hits = torch.tensor(hits, dtype=torch.float64)
    found = hits.cumsum(0)
    precision = found / torch.arange(1, len(hits) + 1)
    precision = precision.flip(0).cummax(0).values.flip(0)
    return 100 * float((precision * hits).sum() / total)


def iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of boxes (..., 4) as centre x, centre y, width, height."""
    low = torch.maximum(a[..., :2] - a[..., 2:] / 2, b[..., :2] - b[..., 2:] / 2)
    high = torch.minimum(a[..., :2] + a[..., 2:] / 2, b[..., :2] + b[..., 2:] / 2)
    both = (high - low).clamp(min=0).prod(dim=-1)
    return both / (a[..., 2:].prod(dim=-1) + b[..., 2:].prod(dim=-1) - both).clamp(min=1e-12)


def ap_of_kinds(net, data, names: list[str]) -> dict[str, float]:
    """{'AP50 NAME': ..., 'AP50': their mean}; a network's class k is names[k], as are the data's kinds."""
    p, boxes = detections(net, data)
    each = {}
    for k, name in enumerate(names):
        truth = [box[kind == k] for kind, box in zip(data.kinds, data.boxes)]
        each[f'AP50 {name}'] = average_precision(p[:, :, k], boxes, truth)
    there = [value for value in each.values() if value == value]
    return each | {'AP50': sum(there) / max(len(there), 1)}
