"""SP, similarity preserving: samples that excite the teacher alike shall excite the student alike.

F. Tung, G. Mori, "Similarity-Preserving Knowledge Distillation", ICCV 2019, arXiv:1907.09682.

    X = map flattened to (N, M);  G = X X^T;  g_i = G_i / ||G_i||_2 row by row
    loss = mean over i and j of (g_s[i, j] - g_t[i, j])^2

Tap: the map at the end of each stage (Knowledge-Distillation-Zoo, our default) or of the last stage
(RepDistiller). Channels and sizes may differ freely: only the N x N similarities meet.

Differences: none in the formula from RepDistiller, whose comment says that the author verified it. A sample
whose features are all zero gets zero gradient; elsewhere it gets gradients of 1e10.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SP(nn.Module):
    """Mean squared difference of row-normalised batch similarities. No hyperparameters.

    Shape:
        fm_s: (N, ...), fm_t: (N, ...), only N must agree. Returns a scalar, 0 for N = 1.
        No gradient reaches fm_t.

    Raises:
        ValueError: an argument has no feature axis; the batch sizes differ.
    """

    def forward(self, fm_s: Tensor, fm_t: Tensor) -> Tensor:
        if fm_s.dim() < 2:
            raise ValueError(f'SP: fm_s must be (N, ...), got {tuple(fm_s.shape)}')
        if fm_t.dim() < 2 or len(fm_t) != len(fm_s):
            raise ValueError(f'SP: fm_t must be ({len(fm_s)}, ...) as fm_s, got {tuple(fm_t.shape)}')
        with torch.autocast(fm_s.device.type, enabled=False):
            return F.mse_loss(_similarity(_full(fm_s)), _similarity(_full(fm_t.detach())))


def _similarity(fm: Tensor) -> Tensor:
    return _unit(_Gram.apply(fm.flatten(1)))


class _Gram(torch.autograd.Function):
    """X X^T, with the one matrix product its gradient needs: (G + G^T) X. Autograd would run two."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x @ x.T

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return (grad + grad.T) @ ctx.saved_tensors[0]


def _unit(x: Tensor) -> Tensor:
    """Rows divided by their length; a zero row stays zero and gets no gradient."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    alive = norm > 1e-12
    return torch.where(alive, x / torch.where(alive, norm, 1.0), 0.0)


def _full(x: Tensor) -> Tensor:
    """Half precision to float32; float64 stays."""
    return x if x.dtype == torch.float64 else x.float()
