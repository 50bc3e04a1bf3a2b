"""TTM, transformed teacher matching: soften the teacher only, as a power of its probabilities.

K. Zheng, E.-H. Yang, "Knowledge Distillation Based on Transformed Teacher Matching", ICLR 2024,
arXiv:2402.11148.

    q = softmax(out_t), p = softmax(out_s), both at temperature 1
    U = sum over k of q_k^l;  q' = q^l / U = softmax(l out_t)
    loss = mean over n of KL(q' || p)                                     (TTM)
    loss = mean over n of U_n KL(q' || p)                                (WTTM: a flatter teacher counts more)

Tap: the logits. l is 1 / T of ordinary soft targets; without a student temperature the loss also penalises
over-confident students. No T^2. The authors tune l and the weight per pair (TTM l 0.1 weight 45 for vgg13 to
vgg8, WTTM l 0.2 weight 4 on top of CRD).

Differences: the authors' code, with U from logsumexp, so that a saturated teacher loses no class.
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

    Raises:
        ValueError: l is not positive; the shapes differ or are not (N, K).
    """

    def __init__(self, l: float = 0.1, weighted: bool = False) -> None:  # noqa: E741, the paper's letter
        super().__init__()
        if not l > 0:
            raise ValueError(f'TTM: l must be > 0, got {l}')
        self.l, self.weighted = l, weighted

    def forward(self, out_s: Tensor, out_t: Tensor) -> Tensor:
        if out_s.dim() != 2:
            raise ValueError(f'TTM: out_s must be (N, K), got {tuple(out_s.shape)}')
        if out_t.shape != out_s.shape:
            raise ValueError(f'TTM: out_t must be {tuple(out_s.shape)} as out_s, got {tuple(out_t.shape)}')
        out_s, out_t = _full(out_s), _full(out_t.detach())
        log_q, log_p = F.log_softmax(self.l * out_t, dim=1), F.log_softmax(out_s, dim=1)
        q = log_q.exp()
        kl = torch.where(q > 0, q * (log_q - log_p), 0.0).sum(dim=1)
        if self.weighted:
            kl = kl * torch.exp((self.l * out_t).logsumexp(dim=1) - self.l * out_t.logsumexp(dim=1))
        return kl.mean()


def _full(x: Tensor) -> Tensor:
    """Half precision to float32; float64 stays."""
    return x if x.dtype == torch.float64 else x.float()
