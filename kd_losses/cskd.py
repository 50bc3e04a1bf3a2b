"""CS-KD, class-wise self-knowledge distillation: two images of one class should get the same prediction.

S. Yun, J. Park, K. Lee, J. Shin, "Regularizing Class-wise Predictions via Self-knowledge Distillation", CVPR
2020, arXiv:2003.13964.

    out = logits of an image, out_pair = logits of an image of its class, drawn at random, same network
    loss = T^2 * mean over n of KL(softmax(out_pair / T) || softmax(out / T))        no gradient to out_pair

Tap: logits of the batch, and of a second batch with one random image of the same class for each, forwarded on
its own without gradient but in training mode. Cross-entropy is on the first batch only. No teacher.

Differences: none from the authors' code.

Source: alinlab/cs-kd, train.py (KDLoss).

Use:
    >>> import torch
    >>> from cskd import CSKD
    >>> out, out_pair = torch.randn(8, 10, requires_grad=True), torch.randn(8, 10)
    >>> CSKD()(out, out_pair).backward()
    >>> out.grad.norm() > 0
    tensor(True)
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class CSKD(nn.Module):
    """KL divergence between softened predictions for two images of one class.

    Args:
        T: temperature, > 0; 4.

    Shape:
        out, out_pair: (N, K), equal. Returns a scalar. No gradient reaches out_pair.
        Computed in float32, or in float64 as the student.

    Raises:
        ValueError: T is not positive; the shapes differ or are not (N, K).
    """

    def __init__(self, T: float = 4.0) -> None:
        super().__init__()
        if not T > 0:
            raise ValueError(f'CSKD: T must be > 0, got {T}')
        self.T = T

    def forward(self, out: Tensor, out_pair: Tensor) -> Tensor:
        _expect('CSKD', 'out', out, 'N', 'K')
        _expect('CSKD', 'out_pair', out_pair, *out.shape)
        log_p = F.log_softmax(_full(out) / self.T, dim=1)
        log_q = F.log_softmax(_full(out_pair.detach(), out) / self.T, dim=1)
        q = log_q.exp()
        return torch.where(q == 0, 0.0, q * (log_q - log_p)).sum(dim=1).mean() * self.T**2


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
    """The partners go through the network in training mode, without gradient."""
    with torch.no_grad():
        out_pair = batch.student(batch.views['pair']).out
    return kd(s.out, out_pair)
