"""OFA-KD, one for all: distil logits between any architectures, with the target class enhanced.

Z. Hao, J. Guo, K. Han, Y. Tang, H. Hu, Y. Wang, C. Xu, "One-for-All: Bridge the Gap Between Heterogeneous
Architectures in Knowledge Distillation", NeurIPS 2023, arXiv:2310.19444.

    p = softmax(out_s / T), q = softmax(out_t / T), y = target
    w_k = q_k^eps for k != y
    w_y = (1 + q_y)^eps - 1
    loss = mean over n of - sum over k of w_k * log p_k

Tap: the logits, and the labels. The authors also hang an exit (OFAExit) on each stage of the student, which
turns its map into logits, and add the same loss of every exit's logits with the teacher's final ones. eps = 1
is the plain cross-entropy with the teacher; above 1 the target counts more.

Differences: none from the authors' code, written with log-softmax; their exits for transformers are left out.

Source: Hao840/OFAKD, distillers/ofa.py (ofa_loss); exits: formula only.

Use:
    >>> import torch
    >>> from ofakd import OFAKD
    >>> out_s, out_t = torch.randn(8, 10, requires_grad=True), torch.randn(8, 10)
    >>> OFAKD()(out_s, out_t, torch.arange(8)).backward()
    >>> out_s.grad.norm() > 0
    tensor(True)
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class OFAKD(nn.Module):
    """Cross-entropy with the target-enhanced teacher.

    Args:
        eps: power of the probabilities, > 0; 1, and 1.5 in the authors' ImageNet example.
        T: temperature, > 0; 1.

    Shape:
        out_s, out_t: (N, K), equal; target: (N,) labels, or (N, K) of which the largest counts. Returns a
        scalar. No gradient reaches out_t.
        Rows of label -100 are left out. Computed in float32, or in float64 as the student.

    Raises:
        ValueError: eps or T is not positive; shapes differ; target is neither.
    """

    def __init__(self, eps: float = 1.0, T: float = 1.0) -> None:
        super().__init__()
        if not (eps > 0 and T > 0):
            raise ValueError(f'OFAKD: eps and T must be > 0, got {eps} and {T}')
        self.eps, self.T = eps, T

    def forward(self, out_s: Tensor, out_t: Tensor, target: Tensor) -> Tensor:
        _expect('OFAKD', 'out_s', out_s, 'N', 'K')
        _expect('OFAKD', 'out_t', out_t, *out_s.shape)
        if target.dim() == 2:
            _expect('OFAKD', 'target', target, *out_s.shape)
            target = target.argmax(dim=1)
        target, valid = _labels('OFAKD', target, *out_s.shape)
        log_p, q = (
            F.log_softmax(_full(out_s) / self.T, dim=1),
            F.softmax(_full(out_t.detach(), out_s) / self.T, dim=1),
        )
        is_y = _is(target, out_s.shape[1])
        weight = torch.where(is_y, (1 + q).pow(self.eps) - 1, q.pow(self.eps))
        return -_per_sample(torch.where(weight == 0, 0.0, weight * log_p), valid)  # 0 times -inf counts 0


class OFAExit(nn.Module):
    """Logits from the map of one stage: separable convolutions down to the last stage's size, pooling, a
    classifier.

    Args:
        in_channels: of the map.
        stage: 1 to 4, counted so that the last stage is 4 (a net of S stages passes stage j as j + 4 - S).
        dim: width before the classifier, the larger of the two networks' embeddings.
        num_classes: K.

    Shape:
        fm: (N, in_channels, H, W). Returns (N, K).
    """

    def __init__(self, in_channels: int, stage: int, dim: int, num_classes: int) -> None:
        super().__init__()
        if stage not in (1, 2, 3, 4):
            raise ValueError(f'OFAExit: stage must be 1, 2, 3 or 4, got {stage}')
        blocks, c = [], in_channels
        for left in range(4 - stage, 0, -1):
            blocks += _separable(c, dim if left == 1 else 2 * c)
            c *= 2
        self.body = nn.Sequential(*blocks) if blocks else nn.Conv2d(in_channels, dim, kernel_size=1)
        self.classifier = nn.Linear(dim, num_classes)
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode='fan_out', nonlinearity='relu')
            if isinstance(m, (nn.Conv2d, nn.Linear)) and m.bias is not None:
                nn.init.zeros_(m.bias)
        nn.init.trunc_normal_(self.classifier.weight, std=0.02)

    def forward(self, fm: Tensor) -> Tensor:
        return self.classifier(self.body(fm).mean(dim=(2, 3)))


def _separable(c_in: int, c_out: int) -> list[nn.Module]:
    """Two depthwise-pointwise pairs; the first halves the size, the second changes the width."""
    layers = []
    for c, stride in ((c_in, 2), (c_out, 1)):
        layers += [
            nn.Conv2d(c_in, c_in, 3, stride=stride, padding=1, groups=c_in, bias=False),
            nn.Conv2d(c_in, c, kernel_size=1, bias=False),
            nn.BatchNorm2d(c),
            nn.ReLU(),
        ]
    return layers


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


def _labels(who: str, target: Tensor, n: int, K: int, name: str = 'target') -> tuple[Tensor, Tensor | None]:
    """n labels of 0..K-1 as int64, and which rows count, None for all: not those of -100, which are 0 then.

    Other labels are refused, but on a GPU, where looking at them would wait, only by the kernels.
    """
    _expect(who, name, target, n)
    if target.is_floating_point():
        raise ValueError(f'{who}: {name} must be ({n},) of integers, got {target.dtype}: {name}.long()')
    target, compiling = target.long(), getattr(torch.compiler, 'is_compiling', bool)()
    if not compiling and target.is_inference():  # what a teacher says under inference_mode: for backward
        target = target.clone()
    if target.device.type == 'cpu' and not compiling:
        (lowest,), (highest,) = (y.tolist() for y in target.aminmax(dim=0, keepdim=True))
        if lowest >= 0 and highest < K:
            return target, None
        for y in target.tolist():
            if y != -100 and not 0 <= y < K:
                raise ValueError(f'{who}: {name} must be in 0..{K - 1}, or -100 to leave a row out, got {y}')
    valid = target != -100
    return torch.where(valid, target, 0), valid


def _is(target: Tensor, K: int) -> Tensor:
    """(N,) -> (N, K), True at the label."""
    return torch.zeros(len(target), K, dtype=torch.bool, device=target.device).scatter_(
        1, target[:, None], True
    )


def _per_sample(x: Tensor, valid: Tensor | None, axis: int = 0) -> Tensor:
    """The sum over all axes but that of the samples, and the mean over the samples that count."""
    if valid is None:
        return x.sum() / x.shape[axis]
    return _mean(x.movedim(axis, 0).flatten(1).sum(dim=1), valid)


def _mean(rows: Tensor, valid: Tensor | None) -> Tensor:
    """Over the rows (N, ...) that count; 0 if none does."""
    if valid is None:
        return rows.mean(dim=0)
    counts = valid.reshape(-1, *[1] * (rows.dim() - 1))
    return torch.where(counts, rows, 0.0).sum(dim=0) / valid.sum().clamp(min=1)


def _full(x: Tensor, like: Tensor | None = None) -> Tensor:
    """In float32, or float64 if the student (like) is. Inference tensors are copied, to serve backward."""
    x = x.double() if (x if like is None else like).dtype == torch.float64 else x.float()
    compiling = getattr(torch.compiler, 'is_compiling', bool)()  # torch 2.2 cannot tell: False
    return x.clone() if not compiling and x.is_inference() else x
