"""Logits: regress the teacher's class scores.

J. Ba, R. Caruana, "Do Deep Nets Really Need to be Deep?", NeurIPS 2014, arXiv:1312.6184.

    loss = mean over n and k of (out_s[n, k] - out_t[n, k])^2

Tap: the logits, before any softmax. Unlike soft targets the absolute level of the logits counts.

Differences: the paper sums over classes and halves, so its value is K/2 times ours; the mean is the form of
Knowledge-Distillation-Zoo. Going from 10 to 100 classes weakens the pull on each logit ten times.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Logits(nn.Module):
    """Mean squared error between class scores. No hyperparameters.

    Shape:
        out_s, out_t: (N, K), equal. Returns a scalar. No gradient reaches out_t.

    Raises:
        ValueError: the shapes differ or are not (N, K).
    """

    def forward(self, out_s: Tensor, out_t: Tensor) -> Tensor:
        if out_s.dim() != 2:
            raise ValueError(f'Logits: out_s must be (N, K), got {tuple(out_s.shape)}')
        if out_t.shape != out_s.shape:  # mse_loss would broadcast and only warn
            raise ValueError(f'Logits: out_t must be {tuple(out_s.shape)} as out_s, got {tuple(out_t.shape)}')
        return F.mse_loss(_full(out_s), _full(out_t.detach()))


def _full(x: Tensor) -> Tensor:
    """Half precision to float32; float64 stays."""
    return x if x.dtype == torch.float64 else x.float()
