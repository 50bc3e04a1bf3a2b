"""CS-KD, class-wise self-knowledge distillation: two images of one class should get the same prediction.

S. Yun, J. Park, K. Lee, J. Shin, "Regularizing Class-wise Predictions via Self-knowledge Distillation",
CVPR 2020, arXiv:2003.13964.

    out = logits of an image, out_pair = logits of another image of its class, same network
    loss = T^2 mean over n of KL(softmax(out_pair / T) || softmax(out / T))          no gradient to out_pair

Tap: logits of the batch, and of a second batch with one random image of the same class for each, forwarded
on its own without gradient but in training mode. Cross-entropy is on the first batch only. No teacher.

Differences: none from the authors' code.
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

    Raises:
        ValueError: T is not positive; the shapes differ or are not (N, K).
    """

    def __init__(self, T: float = 4.0) -> None:
        super().__init__()
        if not T > 0:
            raise ValueError(f'CSKD: T must be > 0, got {T}')
        self.T = T

    def forward(self, out: Tensor, out_pair: Tensor) -> Tensor:
        if out.dim() != 2:
            raise ValueError(f'CSKD: out must be (N, K), got {tuple(out.shape)}')
        if out_pair.shape != out.shape:
            raise ValueError(f'CSKD: out_pair must be {tuple(out.shape)} as out, got {tuple(out_pair.shape)}')
        log_p = F.log_softmax(_full(out) / self.T, dim=1)
        log_q = F.log_softmax(_full(out_pair.detach()) / self.T, dim=1)
        q = log_q.exp()
        return torch.where(q > 0, q * (log_q - log_p), 0.0).sum(dim=1).mean() * self.T**2


def _full(x: Tensor) -> Tensor:
    """Half precision to float32; float64 stays."""
    return x if x.dtype == torch.float64 else x.float()


# ------------------------------------------ how the training scripts use it; a copied file may drop this


def feed(kd, s, t, batch):
    """The partners go through the network in training mode, without gradient."""
    with torch.no_grad():
        out_pair = batch.student(batch.views['pair']).out
    return kd(s.out, out_pair)
