"""PKT, probabilistic knowledge transfer: match who is whose neighbour in the batch.

N. Passalis, A. Tefas, "Learning Deep Representations with Probabilistic Knowledge Transfer", ECCV 2018,
arXiv:1803.10837.

    u_n = f_n / (||f_n|| + eps);  c_ij = (u_i.u_j + 1) / 2;  p_ij = c_ij / sum over k of c_ik
    loss = mean over i and j of p_t[i, j] * log((p_t[i, j] + eps) / (p_s[i, j] + eps))

Tap: the pooled embedding before the classifier; widths may differ, maps are flattened. The mean runs over N^2
entries of size 1/N: the value shrinks with the batch and useful weights are huge (10000 at 128, 30000 at 64).

Differences: the authors' code, diagonal included (the paper leaves it out). Their gradient is NaN as soon as
one student embedding is all zero; here such a row is the zero vector with zero gradient.
Knowledge-Distillation-Zoo uses eps 1e-6.
"""

import torch
from torch import Tensor, nn


class PKT(nn.Module):
    """Divergence between row-normalised cosine similarities of the batch.

    Args:
        eps: added to lengths and inside the logarithm; the authors' 1e-7.

    Shape:
        feat_s: (N, D_s), feat_t: (N, D_t); further axes are flattened. Returns a scalar, 0 for N = 1.
        No gradient reaches feat_t.

    Raises:
        ValueError: an argument has no feature axis; the batch sizes differ.
    """

    def __init__(self, eps: float = 1e-7) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, feat_s: Tensor, feat_t: Tensor) -> Tensor:
        if feat_s.dim() < 2:
            raise ValueError(f'PKT: feat_s must be (N, D), got {tuple(feat_s.shape)}')
        if feat_t.dim() < 2 or len(feat_t) != len(feat_s):
            raise ValueError(f'PKT: feat_t must be ({len(feat_s)}, D) as feat_s, got {tuple(feat_t.shape)}')
        with torch.autocast(feat_s.device.type, enabled=False):
            p_s, p_t = self.neighbours(_full(feat_s)), self.neighbours(_full(feat_t.detach()))
            return (p_t * torch.log((p_t + self.eps) / (p_s + self.eps))).mean()

    def neighbours(self, feat: Tensor) -> Tensor:
        """(N, D) -> (N, N): row i is how likely i picks each sample as its neighbour."""
        feat = feat.flatten(1)
        norm = torch.linalg.vector_norm(feat, dim=1, keepdim=True)
        u = torch.where(norm > 0, feat / (norm + self.eps), 0.0)
        c = (u @ u.T + 1) / 2
        return c / c.sum(dim=1, keepdim=True)


def _full(x: Tensor) -> Tensor:
    """Half precision to float32; float64 stays."""
    return x if x.dtype == torch.float64 else x.float()
