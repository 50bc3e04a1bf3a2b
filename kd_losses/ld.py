"""LD, localization distillation: soft targets for the edges of boxes.

Z. Zheng, R. Ye, P. Wang, D. Ren, W. Zuo, Q. Hou, M.-M. Cheng, "Localization Distillation for Dense Object
Detection", CVPR 2022, arXiv:2102.12252.

    p = softmax(out_t / T), q = softmax(out_s / T), each row the distances of one edge, in bins of the stride
    row = T^2 * mean over the bins of p * (log p - log q)
    loss = sum over the rows of weight * row / avg_factor;  without avg_factor the mean over the rows

Tap: the edge logits of a head that predicts distributions (GFL), as rows (positions * 4, bins), per level,
the levels summed. Rows of `main_region`: weight = the student's largest class probability there, detached,
for all four edges, avg_factor 4, T 10, loss weight 0.25. Rows of `valuable_region`: its weights, avg_factor
16, T 10, 0.25. Class logits of the main region: T 2, avg_factor = positives of the level, 10.

Differences: the authors call the measure of the valuable region DIoU, but their code divides the intersection
by the anchor's area, not by the union; the published numbers were made so, diou=True is the paper's. A
picture without boxes fails in their valuable region, here every weight is 0. Their RetinaNet head takes one
softmax over all four edges, here each edge is a row. Main and valuable region may overlap, as in their GFL
head.

Source: HikariTJU/LD, mmdet/models/losses/kd_loss.py (KnowledgeDistillationKLDivLoss), ld_head.py,
atss_assigner.py.

Use:
    >>> import torch
    >>> from ld import LD
    >>> out_s, out_t = torch.randn(8, 17, requires_grad=True), torch.randn(8, 17)
    >>> LD(T=10.0)(out_s, out_t, weight=torch.rand(8), avg_factor=4.0).backward()
    >>> out_s.grad.norm() > 0
    tensor(True)
"""

import torch
from torch import Tensor, nn


class LD(nn.Module):
    """Weighted soft targets, averaged over the bins; for the edges of boxes and for class logits.

    Args:
        T: temperature, > 0; 10 for edges, 2 for classes.

    Shape:
        out_s, out_t: (M, K), equal, one row per edge and K >= 2 bins; M may be 0. weight: (M,), 1 without;
        avg_factor: a number, or a tensor of one. Returns a scalar, 0 without rows. No gradient reaches out_t
        and weight. Computed in float32, or in float64 as the student.

    Raises:
        ValueError: T is not positive; shapes differ.
    """

    def __init__(self, T: float = 10.0) -> None:
        super().__init__()
        if not T > 0:
            raise ValueError(f'LD: T must be > 0, got {T}')
        self.T = T

    def forward(
        self,
        out_s: Tensor,
        out_t: Tensor,
        weight: Tensor | None = None,
        avg_factor: float | Tensor | None = None,
    ) -> Tensor:
        _expect_rows('LD', 'out_s', out_s, 'M', 'K')
        _expect_rows('LD', 'out_t', out_t, *out_s.shape)
        if weight is not None:
            _expect_rows('LD', 'weight', weight, len(out_s))
        log_q, log_p = ((x / self.T).log_softmax(dim=1) for x in (_full(out_s), _full(out_t.detach(), out_s)))
        rows = _kl(log_p, log_q).mean(dim=1) * self.T**2
        if weight is not None:
            rows = rows * _full(weight.detach(), out_s)
        if isinstance(avg_factor, Tensor):
            avg_factor = avg_factor.to(rows).reshape(())
        return rows.sum() / (max(len(rows), 1) if avg_factor is None or not len(rows) else avg_factor)


def main_region(anchors: Tensor, levels: list[int], boxes: Tensor, topk: int = 9) -> Tensor:
    """Which box each anchor of a picture is positive for, as ATSS assigns them: (A,) int64, 0 none, k box k -
    1.

    anchors: (A, 4) x1 y1 x2 y2 of all levels; levels: how many of each, adding up to A; boxes: (B, 4), B may
    be 0; topk: candidates per level and box, those whose centres are nearest.
    """
    anchors, boxes = _full(anchors.detach()), _full(boxes.detach(), anchors)
    overlap, threshold, candidate = _candidates(anchors, levels, boxes, topk)
    if not len(boxes):
        return torch.zeros(len(anchors), dtype=torch.int64, device=anchors.device)
    x, y = _centres(anchors)[:, None].unbind(dim=2)
    x1, y1, x2, y2 = boxes.unbind(dim=1)
    inside = torch.stack([x - x1, y - y1, x2 - x, y2 - y]).amin(dim=0) > 0.01
    overlap = torch.where(candidate & inside & (overlap >= threshold), overlap, -1.0)
    return torch.where(overlap.amax(dim=1) < 0, 0, overlap.argmax(dim=1) + 1)  # argmax: the first of equals


def valuable_region(
    anchors: Tensor, levels: list[int], boxes: Tensor, topk: int = 9, diou: bool = False
) -> Tensor:
    """Weights (A,) of the anchors of a picture that lie around its boxes, 0 outside; arguments as
    main_region.

    diou: the paper's measure, with the overlap; else the authors' code, with the share of the anchor.
    """
    anchors, boxes = _full(anchors.detach()), _full(boxes.detach(), anchors)
    overlap, threshold, _ = _candidates(anchors, levels, boxes, topk)
    if not len(boxes):
        return torch.zeros(len(anchors), dtype=overlap.dtype, device=anchors.device)
    a = anchors[:, None]
    shared = overlap if diou else _intersection(anchors, boxes) / _area(a).clamp(min=1e-6)
    apart = (_centres(anchors)[:, None] - _centres(boxes)).square().sum(dim=2)
    around = torch.maximum(a[..., 2:], boxes[:, 2:]) - torch.minimum(a[..., :2], boxes[:, :2])
    near = shared - apart / around.square().sum(dim=2).clamp(min=1e-6)
    region = (0.25 * threshold <= near) & (near < threshold)
    return torch.where(region, overlap, 0.0).amax(dim=1)


def _candidates(
    anchors: Tensor, levels: list[int], boxes: Tensor, topk: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Overlaps (A, B), the threshold of each box (B,), and which anchors are candidates for it (A, B)."""
    levels = [int(n) for n in levels]
    _expect_rows('LD', 'anchors', anchors, 'A', 4)
    _expect_rows('LD', 'boxes', boxes, 'B', 4)
    if sum(levels) != len(anchors):
        raise ValueError(
            f'LD: levels must add up to {len(anchors)} anchors, got {levels}: count the anchors of each level'
        )
    shared = _intersection(anchors, boxes)
    overlap = shared / (_area(anchors)[:, None] + _area(boxes) - shared).clamp(min=1e-6)
    candidate = torch.zeros(overlap.shape, dtype=torch.bool, device=overlap.device)
    if not len(boxes):
        return overlap, overlap.new_zeros(0), candidate
    distance = torch.linalg.vector_norm(_centres(anchors)[:, None] - _centres(boxes), dim=2)
    nearest, start = [], 0
    for n in levels:
        part = distance[start : start + n]
        nearest.append(part.topk(min(topk, n), dim=0, largest=False).indices + start)
        start += n
    nearest = torch.cat(nearest)
    seen = overlap.gather(0, nearest)
    threshold = seen.mean(dim=0) + (seen.std(dim=0) if len(seen) > 1 else 0.0)
    return overlap, threshold, candidate.scatter_(0, nearest, True)


def _intersection(a: Tensor, b: Tensor) -> Tensor:
    """Areas (A, B)."""
    a = a[:, None]
    size = torch.minimum(a[..., 2:], b[:, 2:]) - torch.maximum(a[..., :2], b[:, :2])
    return size.clamp(min=0).prod(dim=2)


def _area(boxes: Tensor) -> Tensor:
    return (boxes[..., 2:] - boxes[..., :2]).prod(dim=-1)


def _centres(boxes: Tensor) -> Tensor:
    return (boxes[:, :2] + boxes[:, 2:]) / 2


def _expect_rows(who: str, name: str, x: Tensor, rows: int | str, *wanted: int | str) -> None:
    """As _expect, but no rows at all are legal, too."""
    if x.dim() and not len(x) and (isinstance(rows, str) or rows == 0):
        x, rows = x.new_empty(1, *x.shape[1:]), 1
    _expect(who, name, x, rows, *wanted)


def _kl(log_p_t: Tensor, log_p_s: Tensor, on_host: bool = False) -> Tensor:
    """p_t (log p_t - log p_s), and 0 where p_t is 0 whatever the logarithms are.

    on_host: p_t may be looked at, as labels on the CPU were: the mask, a third of the time, only if needed.
    """
    p_t = log_p_t.exp()
    kl = p_t * (log_p_t - log_p_s)
    if on_host and p_t.amin().view(1).tolist()[0] > 0:  # not with NaN
        return kl
    return torch.where(p_t == 0, 0.0, kl)


def _expect(who: str, name: str, x: Tensor, *wanted: int | str) -> None:
    """Refuse another shape and say what to do. A letter is an axis of any length but 0, for K (classes) 1."""
    got = tuple(x.shape)
    right = [n > int(w == 'K') if isinstance(w, str) else n == w for n, w in zip(got, wanted)]
    if len(got) == len(wanted) and all(right) and 0 not in got:
        return
    if 0 in got:
        remedy = 'leave an empty batch out'
    elif len(got) == 2 and len(wanted) == 1:
        remedy = 'a number per row: x.flatten() of (N, 1) or (N, L), x.argmax(1) of one-hot labels'
    elif len(got) > len(wanted) and len(wanted) < 3:
        remedy = (
            'classes last, then flatten: x.movedim(1, -1).flatten(0, 2) for (N, K, H, W), x.flatten(0, 1) '
        )
        remedy += 'for (N, L, V), target.flatten()'
    elif len(wanted) == 4 and len(got) in (3, 5):
        remedy = 'x[..., None] makes a map of (N, C, L), x.flatten(3) one of (N, C, D, H, W)'
    elif len(got) != len(wanted):
        remedy = 'unsqueeze or flatten axes'
    elif not right[0]:
        remedy = 'all arguments need the samples of one batch (drop_last=True if the last one is smaller)'
    elif got[1] == 1 and 'K' in wanted:
        remedy = 'a sigmoid network has two classes, torch.cat([torch.zeros_like(z), z], 1)'
    elif not right[1]:
        remedy = 'give channels, widths or classes as the loss was built for, or as the other side has them'
    else:
        remedy = 'bring maps to one size, F.adaptive_avg_pool2d'
    shape = ', '.join(map(str, wanted)) + ',' * (len(wanted) == 1)
    raise ValueError(f'{who}: {name} must be ({shape}), got {got}: {remedy}')


def _full(x: Tensor, like: Tensor | None = None) -> Tensor:
    """In float32, or float64 if the student (like) is. Inference tensors are copied, to serve backward."""
    x = x.double() if (x if like is None else like).dtype == torch.float64 else x.float()
    compiling = getattr(torch.compiler, 'is_compiling', bool)()  # torch 2.2 cannot tell: False
    return x.clone() if not compiling and x.is_inference() else x
