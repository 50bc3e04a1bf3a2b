"""PAD, prime-aware adaptive distillation: trust the samples whose features can be predicted.

Y. Zhang, Z. Lan, Y. Dai, F. Zeng, Y. Bai, J. Chang, Y. Wei, "Prime-Aware Adaptive Distillation", ECCV 2020,
arXiv:2008.01458.

    f = feat_s, through a linear connector where the widths differ
    v = batch norm of a linear map of f: the predicted logarithm of the variance, per dimension
    loss = mean over n and dimensions of (feat_t - f)^2 / (exp(v) + eps) + v

Tap: the pooled embedding. Connector and variance branch are trained with the student. The authors warm up
with the plain squared error, the method `l2`, before switching to this.

Differences: the form torchdistill says it had from the author (mean, no factor 1/2); the connector is ours. A
batch of one is normalised by the running statistics.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PAD(nn.Module):
    """Gaussian negative log-likelihood of the teacher's embedding with a predicted variance per entry.

    Args:
        s_dim, t_dim: widths of the two embeddings.
        eps: added to the variance; 1e-6.

    Shape:
        feat_s: (N, s_dim), feat_t: (N, t_dim). Returns a scalar, possibly negative. No gradient reaches
        feat_t. `l2(feat_s, feat_t)` is the warm-up loss.

    Raises:
        ValueError: a feature of another shape than announced; the batch sizes differ.
    """

    def __init__(self, s_dim: int, t_dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.s_dim, self.t_dim, self.eps = s_dim, t_dim, eps
        self.connector = None
        if s_dim != t_dim:
            self.connector = nn.Linear(s_dim, t_dim)
            nn.init.xavier_normal_(self.connector.weight)
            nn.init.zeros_(self.connector.bias)
        self.variance = nn.Linear(t_dim, t_dim)
        self.norm = nn.BatchNorm1d(t_dim)

    def forward(self, feat_s: Tensor, feat_t: Tensor) -> Tensor:
        self._check(feat_s, feat_t)
        with torch.autocast(feat_s.device.type, enabled=False):
            f, t = self._connect(_full(feat_s)), _full(feat_t.detach())
            v = self.variance(f)
            if self.training and len(f) == 1:  # one sample has no batch statistics
                bn = self.norm
                v = F.batch_norm(v, bn.running_mean, bn.running_var, bn.weight, bn.bias, False, 0.0, bn.eps)
            else:
                v = self.norm(v)
            return ((t - f).square() / (v.exp() + self.eps) + v).mean()

    def l2(self, feat_s: Tensor, feat_t: Tensor) -> Tensor:
        self._check(feat_s, feat_t)
        with torch.autocast(feat_s.device.type, enabled=False):
            return F.mse_loss(self._connect(_full(feat_s)), _full(feat_t.detach()))

    def _connect(self, feat_s: Tensor) -> Tensor:
        return feat_s if self.connector is None else self.connector(feat_s)

    def _check(self, feat_s: Tensor, feat_t: Tensor) -> None:
        if feat_s.dim() != 2 or feat_s.shape[1] != self.s_dim:
            raise ValueError(f'PAD: feat_s must be (N, {self.s_dim}), got {tuple(feat_s.shape)}')
        if feat_t.shape != (len(feat_s), self.t_dim):
            raise ValueError(
                f'PAD: feat_t must be {(len(feat_s), self.t_dim)} as feat_s, got {tuple(feat_t.shape)}'
            )


def _full(x: Tensor) -> Tensor:
    """Half precision to float32; float64 stays."""
    return x if x.dtype == torch.float64 else x.float()


# ------------------------------------------ how the training scripts use it; a copied file may drop this


def feed(kd, s, t, batch):
    """Squared distances at first, as if every sample were equally certain."""
    return (kd if batch.inner else kd.l2)(s.feat, t.feat)
