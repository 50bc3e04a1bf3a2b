"""TTM, transformed teacher matching: soften the teacher only, as a power of its probabilities.

K. Zheng, E.-H. Yang, "Knowledge Distillation Based on Transformed Teacher Matching", ICLR 2024,
arXiv:2402.11148.

    q = softmax(out_t), p = softmax(out_s), both at temperature 1
    U = sum over k of q_k^l
    q' = q^l / U = softmax(l * out_t)
    loss = mean over n of KL(q' || p)                                     (TTM)
    loss = mean over n of U_n * KL(q' || p)                              (WTTM: a flatter teacher counts more)

Tap: the logits. l is 1 / T of ordinary soft targets; without a student temperature the loss also penalises
over-confident students. No T^2. The authors tune l and the weight per pair (TTM l 0.1 weight 45 for vgg13 to
vgg8, WTTM l 0.2 weight 4 on top of CRD).

Differences: the authors' code, with U from logsumexp, so that no class is lost where the teacher is certain.

Source: zkxufo/TTM, distiller_zoo/ttm.py (TTM) and distiller_zoo/wttm.py (WTTM).

Use:
    >>> import torch
    >>> from ttm import TTM
    >>> out_s, out_t = torch.randn(8, 10, requires_grad=True), torch.randn(8, 10)
    >>> TTM()(out_s, out_t).backward()
    >>> out_s.grad.norm() > 0
    tensor(True)
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TTM(nn.Module):
    """KL from the power-transformed teacher to the student.

    Args:
        l: the power, > 0; 0.1.
        weighted: False for TTM, True for WTTM.

    Shape:
        out_s, out_t: (N, K), equal. Returns a scalar. No gradient reaches out_t.
        Computed in float32, or in float64 as the student.

    Raises:
        ValueError: l is not positive; the shapes differ or are not (N, K).
    """

    def __init__(self, l: float = 0.1, weighted: bool = False) -> None:  # noqa: E741, the paper's letter
        super().__init__()
        if not l > 0:
            raise ValueError(f'TTM: l must be > 0, got {l}')
        self.l, self.weighted = l, weighted

    def forward(self, out_s: Tensor, out_t: Tensor) -> Tensor:
        _expect('TTM', 'out_s', out_s, 'N', 'K')
        _expect('TTM', 'out_t', out_t, *out_s.shape)
        out_s, out_t = _full(out_s), _full(out_t.detach(), out_s)
        log_q, log_p = F.log_softmax(self.l * out_t, dim=1), F.log_softmax(out_s, dim=1)
        q = log_q.exp()
        kl = torch.where(q == 0, 0.0, q * (log_q - log_p)).sum(dim=1)
        if self.weighted:
            kl = kl * torch.exp((self.l * out_t).logsumexp(dim=1) - self.l * out_t.logsumexp(dim=1))
        return kl.mean()


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
