"""DIST: match how classes rank within a sample and samples within a class, not the values.

T. Huang, S. You, F. Wang, C. Qian, C. Xu, "Knowledge Distillation from A Stronger Teacher", NeurIPS 2022,
arXiv:2205.10536.

    p = softmax(out / tau) over the classes
    pearson(a, b) = a'.b' / (||a'|| ||b'|| + 1e-8), a' = a - mean(a)
    inter = tau^2 (1 - mean over samples n of pearson(p_s[n, :], p_t[n, :]))
    intra = tau^2 (1 - mean over classes k of pearson(p_s[:, k], p_t[:, k]))
    loss = beta inter + gamma intra

Tap: the logits. A stronger teacher's sharper probabilities need not be met exactly: any positive affine
change of a row or column costs nothing. The authors weigh the loss by 2 beside cross-entropy, without soft
targets.

Differences: the authors' classification code. A constant row or column (uniform logits, a batch of one)
counts as uncorrelated and gets no gradient; there it is about 1e6.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DIST(nn.Module):
    """Inter-class and intra-class Pearson distances between softened probabilities.

    Args:
        beta, gamma: weights of the inter-class and intra-class term; 1 and 1.
        tau: temperature, > 0; 4 on CIFAR, 1 on ImageNet.

    Shape:
        out_s, out_t: (N, K), equal, or (N, K, H, W), every position a sample. Returns a scalar.
        No gradient reaches out_t. `terms` returns (inter, intra), tau^2 included, beta and gamma not.

    Raises:
        ValueError: tau is not positive; the shapes differ or are neither (N, K) nor (N, K, H, W).
    """

    def __init__(self, beta: float = 1.0, gamma: float = 1.0, tau: float = 4.0) -> None:
        super().__init__()
        if not tau > 0:
            raise ValueError(f'DIST: tau must be > 0, got {tau}')
        self.beta, self.gamma, self.tau = beta, gamma, tau

    def forward(self, out_s: Tensor, out_t: Tensor) -> Tensor:
        inter, intra = self.terms(out_s, out_t)
        return self.beta * inter + self.gamma * intra

    def terms(self, out_s: Tensor, out_t: Tensor) -> tuple[Tensor, Tensor]:
        if out_s.dim() not in (2, 4):
            raise ValueError(f'DIST: out_s must be (N, K) or (N, K, H, W), got {tuple(out_s.shape)}')
        if out_t.shape != out_s.shape:
            raise ValueError(f'DIST: out_t must be {tuple(out_s.shape)} as out_s, got {tuple(out_t.shape)}')
        p_s = F.softmax(_samples(_full(out_s)) / self.tau, dim=1)
        p_t = F.softmax(_samples(_full(out_t.detach())) / self.tau, dim=1)
        inter, intra = (1 - _pearson(p_s, p_t, dim).mean() for dim in (1, 0))
        return inter * self.tau**2, intra * self.tau**2


def _samples(out: Tensor) -> Tensor:
    return out if out.dim() == 2 else out.movedim(1, -1).flatten(0, 2)


def _pearson(a: Tensor, b: Tensor, dim: int) -> Tensor:
    a, b = a - a.mean(dim, keepdim=True), b - b.mean(dim, keepdim=True)
    norms = torch.linalg.vector_norm(a, dim=dim) * torch.linalg.vector_norm(b, dim=dim)
    return torch.where(norms > 1e-12, (a * b).sum(dim) / (norms + 1e-8), 0.0)


def _full(x: Tensor) -> Tensor:
    """Half precision to float32; float64 stays."""
    return x if x.dtype == torch.float64 else x.float()
