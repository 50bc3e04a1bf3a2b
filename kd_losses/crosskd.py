"""CrossKD: the student's half-way features go through the teacher's head, and that is what is compared.

J. Wang, Y. Chen, Z. Zheng, X. Li, M.-M. Cheng, Q. Hou, "CrossKD: Cross-Head Knowledge Distillation for Object
Detection", CVPR 2024, arXiv:2306.11369.

    t = sigmoid(out_t);  ce = binary cross-entropy of sigmoid(out_s) with t
    cls = sum over rows and classes of label_weight * ce * |sigmoid(out_s) - t|^beta / avg_factor
    w = sigmoid(largest logit of out_t), 0 where label_weight is 0
    reg = sum over rows of w * (1 - GIoU of the decoded boxes) / avg_factor; of edge distributions p and q
        sum over edges of w / 4 * T^2 * sum over bins of p * (log p - log q), divided by the sum of w
    loss = w_cls * cls + w_reg * reg

Tap: student's side: keep its tower's output after convolution i (3 of 4), before the ReLU, `align` it to the
teacher's at the same place, ReLU, and let the teacher's frozen later layers predict from it. Teacher's side:
its own predictions. All levels in one call, rows in the order image, row, column, anchor. The student's own
later layers get no gradient, which is the point. RetinaNet and ATSS: w_reg 1; GFL: w_reg 4.

Differences: the authors' GFL version divides by the sum of w, here by 1 if it is 0; avg_factor is at least 1.

Source: jbwang1997/CrossKD, mmdet/models/losses/kd_loss.py and mmdet/models/detectors/crosskd_retinanet.py.

Use:
    >>> import torch
    >>> from crosskd import CrossKD
    >>> out_s, reg_s = torch.randn(6, 5, requires_grad=True), torch.randn(6, 4, requires_grad=True)
    >>> anchors = torch.tensor([[0.0, 0, 8, 8]]).repeat(6, 1)
    >>> CrossKD()(out_s, torch.randn(6, 5), reg_s, torch.randn(6, 4), torch.ones(6), 2, anchors).backward()
    >>> out_s.grad.norm() * reg_s.grad.norm() > 0
    tensor(True)
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPS = 2.0**-23  # of float32, as the authors add it to what they divide by


class CrossKD(nn.Module):
    """Quality focal loss on classes, and GIoU of boxes or divergence of edge distributions.

    Args:
        beta: power of the distance that weighs the classes, >= 1 (below, its gradient is infinite at 0); 1.
        T: temperature of the edge distributions, > 0; 1.
        w_cls, w_reg: weights of the two terms; 1 and 1.

    Shape:
        out_s, out_t: (M, K) class logits, K >= 1; out_s are the cross-head predictions. reg_s, reg_t: (M, 4)
        box deltas with anchors (M, 4) x1 y1 x2 y2, or (4 * M, B) edge logits without. label_weight: (M,), 0
        for anchors that are left out. avg_factor: positives in the batch, a number or a tensor of one. M may
        be 0. Returns a scalar; `terms` returns (cls, reg) without their weights. No gradient reaches the
        teacher, label_weight and anchors. Computed in float32, or in float64 as the student.

    Raises:
        ValueError: beta < 1; T is not positive; shapes differ.
    """

    def __init__(self, beta: float = 1.0, T: float = 1.0, w_cls: float = 1.0, w_reg: float = 1.0) -> None:
        super().__init__()
        if not (beta >= 1 and T > 0):
            raise ValueError(f'CrossKD: beta >= 1 and T > 0 are needed, got {beta} and {T}')
        self.beta, self.T, self.w_cls, self.w_reg = beta, T, w_cls, w_reg

    def forward(
        self,
        out_s: Tensor,
        out_t: Tensor,
        reg_s: Tensor,
        reg_t: Tensor,
        label_weight: Tensor,
        avg_factor: float | Tensor,
        anchors: Tensor | None = None,
    ) -> Tensor:
        cls, reg = self.terms(out_s, out_t, reg_s, reg_t, label_weight, avg_factor, anchors)
        return self.w_cls * cls + self.w_reg * reg

    def terms(
        self,
        out_s: Tensor,
        out_t: Tensor,
        reg_s: Tensor,
        reg_t: Tensor,
        label_weight: Tensor,
        avg_factor: float | Tensor,
        anchors: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        cls = quality_focal(out_s, out_t, label_weight, avg_factor, self.beta)
        n = len(out_s)
        rows = (4 * n, 'K') if anchors is None else (n, 4)
        _expect_rows('CrossKD', 'reg_s', reg_s, *rows)
        _expect_rows('CrossKD', 'reg_t', reg_t, *reg_s.shape)
        x, y = _full(reg_s), _full(reg_t.detach(), out_s)
        w = _full(out_t.detach(), out_s).amax(dim=1).sigmoid() * (label_weight.detach() != 0)
        if anchors is None:
            log_q, log_p = ((z / self.T).log_softmax(dim=1) for z in (x, y))
            edges = _kl(log_p, log_q).sum(dim=1).view(n, 4).sum(dim=1) * (self.T**2 / (4 + EPS))
            total = w.sum()
            return cls, (w * edges).sum() / torch.where(total == 0, 1.0, total)
        _expect_rows('CrossKD', 'anchors', anchors, n, 4)
        anchors = _full(anchors.detach(), out_s)
        unlike = 1 - giou(decode(anchors, x), decode(anchors, y))
        hidden = 0 * (x.detach().sum() + y.sum())  # decode cuts sizes, but what is not finite must show
        return cls, (w * unlike).sum() / _at_least_one(avg_factor, x) + hidden


def quality_focal(
    out_s: Tensor, out_t: Tensor, weight: Tensor, avg_factor: float | Tensor, beta: float = 1.0
) -> Tensor:
    """The class term; arguments as CrossKD's."""
    _expect_rows('CrossKD', 'out_s', out_s, 'M', 'C')
    _expect_rows('CrossKD', 'out_t', out_t, *out_s.shape)
    _expect_rows('CrossKD', 'label_weight', weight, len(out_s))
    x, y = _full(out_s), _full(out_t.detach(), out_s)
    t = y.sigmoid()
    never = (x == -torch.inf) & (t == 0)  # for both: nothing to learn, where 0 times inf would be NaN
    x = x.masked_fill(never, 0.0)
    ce = F.binary_cross_entropy_with_logits(x, t, reduction='none')
    rows = (ce * (x.sigmoid() - t).abs() ** beta).masked_fill(never, 0.0).sum(dim=1)
    hidden = 0 * y.masked_fill(y == -torch.inf, 0.0).sum()  # t = 1 hides an inf; -inf, t = 0, is legal
    return (_full(weight.detach(), out_s) * rows).sum() / _at_least_one(avg_factor, x) + hidden


def decode(anchors: Tensor, deltas: Tensor) -> Tensor:
    """Boxes (M, 4) from deltas of centres, in sizes of the anchor, and of logarithms of sizes, cut."""
    size = anchors[:, 2:] - anchors[:, :2]
    centre = (anchors[:, :2] + anchors[:, 2:]) / 2 + deltas[:, :2] * size
    limit = -math.log(16 / 1000)
    half = size * deltas[:, 2:].clamp(-limit, limit).exp() / 2
    return torch.cat([centre - half, centre + half], dim=1)


def giou(boxes_s: Tensor, boxes_t: Tensor) -> Tensor:
    """Generalised intersection over union of boxes, row by row (M,)."""
    low_s, high_s, low_t, high_t = boxes_s[:, :2], boxes_s[:, 2:], boxes_t[:, :2], boxes_t[:, 2:]
    both = (torch.minimum(high_s, high_t) - torch.maximum(low_s, low_t)).clamp(min=0).prod(dim=1)
    union = (high_s - low_s).prod(dim=1) + (high_t - low_t).prod(dim=1) - both
    union = union.clamp(min=1e-6)
    around = (torch.maximum(high_s, high_t) - torch.minimum(low_s, low_t)).prod(dim=1).clamp(min=1e-6)
    return both / union - (around - union) / around


def align(fm_s: Tensor, fm_t: Tensor) -> Tensor:
    """The student's map with the teacher's mean and deviation of each channel, over batch and positions.

    fm_s, fm_t: (N, C, H, W), of two values per channel or more. A constant channel of the student's has no
    gradient.
    """
    _expect('CrossKD', 'fm_s', fm_s, 'N', 'C', 'H', 'W')
    _expect('CrossKD', 'fm_t', fm_t, *fm_s.shape)
    if fm_s[:, 0].numel() < 2:
        raise ValueError(
            f'CrossKD: fm_s must have two values per channel, got {tuple(fm_s.shape)}: leave this level out'
        )
    (mean_s, std_s), (mean_t, std_t) = (_moments(x) for x in (_full(fm_s), _full(fm_t.detach(), fm_s)))
    unit = torch.where(std_s == 0, 0.0, (_full(fm_s) - mean_s) / (std_s + 1e-6))
    return unit * std_t + mean_t


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    mean = x.mean(dim=(0, 2, 3), keepdim=True)
    var = (x - mean).square().sum(dim=(0, 2, 3), keepdim=True) / (x[:, 0].numel() - 1)
    # of equal numbers the mean is off by a rounding. NaN is not dead: it must show
    dead = var <= (8 * torch.finfo(x.dtype).eps * mean).square().clamp(min=1e-24)
    return mean, torch.where(dead, 0.0, torch.where(dead, 1.0, var).sqrt())


def _at_least_one(avg_factor: float | Tensor, like: Tensor) -> Tensor:
    x = avg_factor.to(like).reshape(()) if isinstance(avg_factor, Tensor) else like.new_full((), avg_factor)
    return x.clamp(min=1) + EPS


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


# ------------------------------------------ how the training scripts use it; a copied file may drop this


def feed(kd, s, t, batch):
    """The student's towers, aligned, through the last layers of the teacher's RetinaNet head."""
    head_s, head_t = s.head, t.head
    across = {
        name: [align(x, y) for x, y in zip(maps, t.towers[name], strict=True)]
        for name, maps in s.towers.items()
    }
    out_s, reg_s = t.finished(across)
    out_t, reg_t = (head_t[key].flatten(0, 1) for key in ('cls_logits', 'bbox_regression'))
    if head_s['cls_logits'].shape != head_t['cls_logits'].shape:
        shapes = [tuple(head['cls_logits'].shape) for head in (head_s, head_t)]
        raise ValueError(
            f'crosskd: student and teacher must have the same anchors and classes, got {shapes}: train the '
            'teacher with the same head and size'
        )
    return kd(out_s, out_t, reg_s, reg_t, *s.matched(), torch.cat(s.anchors))
