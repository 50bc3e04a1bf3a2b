"""EEL, evolutionary embedding learning: an angular constraint between student and teacher embeddings.

X. Wu, R. He, Y. Hu, Z. Sun, "Learning an Evolutionary Embedding via Massive Knowledge Distillation", IJCV
2020.

RECONSTRUCTION. Only the abstract could be read; this is its "correlated embedding loss with an angular
constraint", rebuilt from the published Angular Loss. It is verified against two implementations of this
formula, not against the authors' code.

    s, t = embeddings of length 1;  a = tan(angle)^2;  K(i) = the samples of other classes than i
    e[i, k] = 4 a (s_i + t_i).t_k - 2 (1 + a) s_i.t_i
    loss = mean over i of log(1 + sum over k in K(i) of exp(e[i, k]))

Tap: the pooled embeddings, and the labels. The paper repeats training with each student as the next teacher.

Differences: nothing to compare with.
"""

import math

import torch
from torch import Tensor, nn


class EEL(nn.Module):
    """Smooth angular loss with teacher embeddings as positives and negatives.

    Args:
        s_dim, t_dim: widths of the two embeddings; where they differ, a bias-free linear map brings the
            student's to t_dim. Omitted: equal widths.
        angle: in degrees, between 0 and 90; 45.

    Shape:
        feat_s: (N, s_dim), feat_t: (N, t_dim), target: (N,) int64. Returns a scalar; a sample without a
        negative contributes 0. No gradient reaches feat_t.

    Raises:
        ValueError: angle is out of range; a feature or target of a wrong shape.
    """

    def __init__(self, s_dim: int | None = None, t_dim: int | None = None, angle: float = 45.0) -> None:
        super().__init__()
        if not 0 < angle < 90:
            raise ValueError(f'EEL: angle must be between 0 and 90 degrees, got {angle}')
        self.a = math.tan(math.radians(angle)) ** 2
        self.map = None
        if s_dim != t_dim:
            self.map = nn.Linear(s_dim, t_dim, bias=False)

    def forward(self, feat_s: Tensor, feat_t: Tensor, target: Tensor) -> Tensor:
        if feat_s.dim() != 2 or (self.map is not None and feat_s.shape[1] != self.map.in_features):
            width = 'D' if self.map is None else self.map.in_features
            raise ValueError(f'EEL: feat_s must be (N, {width}), got {tuple(feat_s.shape)}')
        wanted = (len(feat_s), feat_s.shape[1] if self.map is None else self.map.out_features)
        if feat_t.shape != wanted:
            raise ValueError(f'EEL: feat_t must be {wanted} as feat_s, got {tuple(feat_t.shape)}')
        if target.shape != feat_s.shape[:1]:
            raise ValueError(f'EEL: target must be ({len(feat_s)},) as feat_s, got {tuple(target.shape)}')
        with torch.autocast(feat_s.device.type, enabled=False):
            s = _full(feat_s)
            s, t = _unit(s if self.map is None else self.map(s)), _unit(_full(feat_t.detach()))
            e = 4 * self.a * (s + t) @ t.T - 2 * (1 + self.a) * (s * t).sum(dim=1, keepdim=True)
            e = e.masked_fill(target[:, None] == target[None, :], -torch.inf)
            return torch.cat([torch.zeros_like(e[:, :1]), e], dim=1).logsumexp(dim=1).mean()


def _unit(x: Tensor) -> Tensor:
    """Rows divided by their length; a zero row stays zero and gets no gradient."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    alive = norm > 1e-12
    return torch.where(alive, x / torch.where(alive, norm, 1.0), 0.0)


def _full(x: Tensor) -> Tensor:
    """Half precision to float32; float64 stays."""
    return x if x.dtype == torch.float64 else x.float()


# ------------------------------------------ how the training scripts use it; a copied file may drop this


def feed(kd, s, t, batch):
    return kd(s.feat, t.feat, batch.target)
