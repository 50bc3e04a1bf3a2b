"""DDGSD, data-distortion guided self-distillation: two distorted views of an image should be read alike.

T.-B. Xu, C.-L. Liu, "Data-Distortion Guided Self-Distillation for Deep Neural Networks", AAAI 2019.

    a, b: two random augmentations of the same images through one network KD(a from b) = T^2 mean over n of
    KL(softmax(out_b / T) || softmax(out_a / T)), no gradient to the target side MMD = || mean over n of
    feat_a - mean over n of feat_b ||^2 loss = CE(out_a) + CE(out_b) + lam (KD(a from b) + KD(b from a)) + mu
    MMD

Tap: logits and pooled embeddings of two views, one forward pass each. No teacher. Contains its cross-entropy.

Differences: from the formula; no code of the authors was found. T, lam, mu and the detached targets are those
of secondary sources. The ports average the divergence over classes, leave out T^2, or use logits in the MMD.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DDGSD(nn.Module):
    """Cross-entropy of both views, mutual soft targets, and a linear-kernel MMD of the embeddings.

    Args:
        T: temperature, > 0; 3.
        lam: weight of the mutual soft targets; 1.
        mu: weight of the MMD; 5e-4.

    Shape:
        out_a, out_b: (N, K), feat_a, feat_b: (N, D), target: (N,) int64. Returns a scalar. `terms` returns
        (cross-entropy, KD, MMD), unweighted.

    Raises:
        ValueError: T is not positive; shapes differ.
    """

    def __init__(self, T: float = 3.0, lam: float = 1.0, mu: float = 5e-4) -> None:
        super().__init__()
        if not T > 0:
            raise ValueError(f'DDGSD: T must be > 0, got {T}')
        self.T, self.lam, self.mu = T, lam, mu

    def forward(self, out_a: Tensor, out_b: Tensor, feat_a: Tensor, feat_b: Tensor, target: Tensor) -> Tensor:
        ce, kd, mmd = self.terms(out_a, out_b, feat_a, feat_b, target)
        return ce + self.lam * kd + self.mu * mmd

    def terms(self, out_a, out_b, feat_a, feat_b, target) -> tuple[Tensor, Tensor, Tensor]:
        if out_a.dim() != 2 or out_b.shape != out_a.shape:
            shapes = f'{tuple(out_a.shape)} and {tuple(out_b.shape)}'
            raise ValueError(f'DDGSD: out_a and out_b must be (N, K), equal, got {shapes}')
        if feat_a.dim() != 2 or len(feat_a) != len(out_a) or feat_b.shape != feat_a.shape:
            shapes = f'{tuple(feat_a.shape)} and {tuple(feat_b.shape)}'
            raise ValueError(f'DDGSD: feat_a and feat_b must be ({len(out_a)}, D), equal, got {shapes}')
        if target.shape != out_a.shape[:1] or target.is_floating_point():
            raise ValueError(f'DDGSD: target must be ({len(out_a)},) of integers, got {tuple(target.shape)}')
        out_a, out_b = _full(out_a), _full(out_b)
        ce = F.cross_entropy(out_a, target) + F.cross_entropy(out_b, target)
        kd = self._kl(out_a, out_b) + self._kl(out_b, out_a)
        mmd = (_full(feat_a).mean(dim=0) - _full(feat_b).mean(dim=0)).square().sum()
        return ce, kd, mmd

    def _kl(self, out: Tensor, goal: Tensor) -> Tensor:
        log_p = F.log_softmax(out / self.T, dim=1)
        log_q = F.log_softmax(goal.detach() / self.T, dim=1)
        q = log_q.exp()
        return torch.where(q > 0, q * (log_q - log_p), 0.0).sum(dim=1).mean() * self.T**2


def _full(x: Tensor) -> Tensor:
    """Half precision to float32; float64 stays."""
    return x if x.dtype == torch.float64 else x.float()


# ------------------------------------------ how the training scripts use it; a copied file may drop this


def feed(kd, s, t, batch):
    other = batch.student(batch.views['second'])
    return kd(s.out, other.out, s.feat, other.feat, batch.target)
