"""OFA-KD, one for all: distil logits between any architectures, with the target class enhanced.

Z. Hao, J. Guo, K. Han, Y. Tang, H. Hu, Y. Wang, C. Xu, "One-for-All: Bridge the Gap Between Heterogeneous
Architectures in Knowledge Distillation", NeurIPS 2023, arXiv:2310.19444.

    p = softmax(out_s / T), q = softmax(out_t / T), y = target
    w_k = q_k^eps for k != y;  w_y = (1 + q_y)^eps - 1
    loss = mean over n of - sum over k of w_k log p_k

Tap: the logits, and the labels. The authors also hang an exit (OFAExit) on each stage of the student, which
turns its map into logits, and add the same loss of every exit's logits with the teacher's final ones. eps = 1
is the plain cross-entropy with the teacher; above 1 the target counts more.

Differences: none from the authors' code, written with log-softmax; their exits for transformers are left out.
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
        out_s, out_t: (N, K), equal; target: (N,) int64, or (N, K) of which the largest counts. Returns a
        scalar. No gradient reaches out_t.

    Raises:
        ValueError: eps or T is not positive; shapes differ; target is neither.
    """

    def __init__(self, eps: float = 1.0, T: float = 1.0) -> None:
        super().__init__()
        if not (eps > 0 and T > 0):
            raise ValueError(f'OFAKD: eps and T must be > 0, got {eps} and {T}')
        self.eps, self.T = eps, T

    def forward(self, out_s: Tensor, out_t: Tensor, target: Tensor) -> Tensor:
        if out_s.dim() != 2:
            raise ValueError(f'OFAKD: out_s must be (N, K), got {tuple(out_s.shape)}')
        if out_t.shape != out_s.shape:
            raise ValueError(f'OFAKD: out_t must be {tuple(out_s.shape)} as out_s, got {tuple(out_t.shape)}')
        if target.shape == out_s.shape:
            target = target.argmax(dim=1)
        if target.shape != out_s.shape[:1] or target.is_floating_point():
            raise ValueError(
                f'OFAKD: target must be ({len(out_s)},) of integers or {tuple(out_s.shape)}, '
                f'got {tuple(target.shape)} of {target.dtype}'
            )
        log_p, q = (
            F.log_softmax(_full(out_s) / self.T, dim=1),
            F.softmax(_full(out_t.detach()) / self.T, dim=1),
        )
        is_y = target[:, None] == torch.arange(out_s.shape[1], device=out_s.device)
        weight = torch.where(is_y, (1 + q).pow(self.eps) - 1, q.pow(self.eps))
        return -(weight * log_p).sum(dim=1).mean()


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


def _full(x: Tensor) -> Tensor:
    """Half precision to float32; float64 stays."""
    return x if x.dtype == torch.float64 else x.float()
