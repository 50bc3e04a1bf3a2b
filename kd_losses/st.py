"""ST, soft targets: match the teacher's temperature-softened class probabilities.

G. Hinton, O. Vinyals, J. Dean, "Distilling the Knowledge in a Neural Network",
NIPS 2014 Deep Learning Workshop, arXiv:1503.02531.

    p = softmax(out / T) over the classes
    loss = T^2 * mean over n of sum over k of p_t (log p_t - log p_s)        (KL from teacher to student)

Tap: the logits. T^2 keeps the size of the gradient when T changes. This is the "KD" of "method + KD".

Differences: none from Knowledge-Distillation-Zoo, RepDistiller, mdistiller. A teacher logit of -inf (a masked
class) is a legal zero probability and contributes 0.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SoftTarget(nn.Module):
    """KL divergence of softened probabilities, times T squared.

    Args:
        T: temperature, > 0; 4 is usual on CIFAR, 1 on ImageNet.

    Shape:
        out_s, out_t: (N, K), equal. Returns a scalar. No gradient reaches out_t.

    Raises:
        ValueError: T is not positive; the shapes differ or are not (N, K).
    """

    def __init__(self, T: float = 4.0) -> None:
        super().__init__()
        if not T > 0:
            raise ValueError(f'SoftTarget: T must be > 0, got {T}')
        self.T = T

    def forward(self, out_s: Tensor, out_t: Tensor) -> Tensor:
        if out_s.dim() != 2:
            raise ValueError(f'SoftTarget: out_s must be (N, K), got {tuple(out_s.shape)}')
        if out_t.shape != out_s.shape:
            raise ValueError(
                f'SoftTarget: out_t must be {tuple(out_s.shape)} as out_s, got {tuple(out_t.shape)}'
            )
        log_p_s = F.log_softmax(_full(out_s) / self.T, dim=1)
        log_p_t = F.log_softmax(_full(out_t.detach()) / self.T, dim=1)
        p_t = log_p_t.exp()
        # where p_t is 0 the term is 0, although log p_t is -inf there
        kl = torch.where(p_t > 0, p_t * (log_p_t - log_p_s), 0.0)
        return kl.sum(dim=1).mean() * self.T**2


def _full(x: Tensor) -> Tensor:
    """Half precision to float32; float64 stays."""
    return x if x.dtype == torch.float64 else x.float()
