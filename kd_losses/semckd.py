"""SemCKD, semantic calibration: every student layer learns from all teacher layers, by attention.

D. Chen, J.-P. Mei, Y. Zhang, C. Wang, Z. Wang, Y. Feng, C. Chen, "Cross-Layer Distillation with Semantic
Calibration", AAAI 2021, arXiv:2012.03236.

    G(f) = F F^T, F = map flattened per sample                                       (N, N)
    q_i = query_i(G(fm_s of layer i)), k_j = key_j(G(fm_t of layer j))              rows of length 1
    w[n, i, j] = softmax over teacher layers j of q_i[n].k_j[n] / soft
    m[n, i, j] = mean over c, h, w of (regressor_ij(fm_s[i]) - fm_t[j])^2, the larger map average-pooled first
    loss = mean over n, i of sum over j of w[n, i, j] m[n, i, j]

Tap: lists of stage maps after their ReLU, without the stem; numbers of layers, channels and sizes may differ.
The attention networks act on rows of N x N matrices, so every batch must have exactly batch_size samples: the
trainer leaves out an incomplete last batch. The regressors cost more than a small student.

Differences: the authors' code with the later `soft` (1 is the original). A zero attention vector is 0 with
zero gradient, NaN in their code; sizes are compared and pooled by height and width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SemCKD(nn.Module):
    """Attention-weighted squared errors over all pairs of layers.

    Args:
        s_channels, t_channels: lists, channels of the layers of the two networks.
        batch_size: samples in every batch (per process).
        factor: the attention width is batch_size // factor; 4.
        soft: divides the scores, > 0; 1.

    Shape:
        fms_s: list of S maps (batch_size, C, H, W), fms_t: list of T maps. Returns a scalar. No gradient
        reaches fms_t. `terms` returns (w, m), each (N, S, T).

    Raises:
        ValueError: batch_size < factor; soft is not positive; a list has another length, a map other
            channels, a batch another size.
    """

    def __init__(
        self, s_channels: list, t_channels: list, batch_size: int, factor: int = 4, soft: float = 1.0
    ) -> None:
        super().__init__()
        d = batch_size // factor
        if d < 1 or not soft > 0:
            raise ValueError(
                f'SemCKD: batch_size must be at least factor, and soft > 0, '
                f'got {batch_size}, {factor} and {soft}'
            )
        self.s_channels, self.t_channels = list(s_channels), list(t_channels)
        self.batch_size, self.soft = batch_size, soft
        self.query = nn.ModuleList(_Attention(batch_size, d) for _ in s_channels)
        self.key = nn.ModuleList(_Attention(batch_size, d) for _ in t_channels)
        self.regressor = nn.ModuleList(
            nn.ModuleList(_regressor(s, t) for t in t_channels) for s in s_channels
        )

    def forward(self, fms_s: list[Tensor], fms_t: list[Tensor]) -> Tensor:
        w, m = self.terms(fms_s, fms_t)
        return (w * m).sum(dim=2).mean()

    def terms(self, fms_s: list[Tensor], fms_t: list[Tensor]) -> tuple[Tensor, Tensor]:
        for name, maps, channels in (('fms_s', fms_s, self.s_channels), ('fms_t', fms_t, self.t_channels)):
            shapes = [tuple(x.shape) for x in maps]
            wanted = [(self.batch_size, c) for c in channels]
            if [s[:2] for s in shapes] != wanted or any(len(s) != 4 for s in shapes):
                raise ValueError(f'SemCKD: {name} must be maps of batch and channels {wanted}, got {shapes}')
        with torch.autocast(fms_s[0].device.type, enabled=False):
            fms_s, fms_t = [_full(x) for x in fms_s], [_full(x.detach()) for x in fms_t]
            q = torch.stack([net(_gram(x)) for net, x in zip(self.query, fms_s)], dim=1)  # (N, S, d)
            k = torch.stack([net(_gram(x)) for net, x in zip(self.key, fms_t)], dim=1)  # (N, T, d)
            w = F.softmax(q @ k.mT / self.soft, dim=2)
            m = [
                torch.stack([_error(s, t, net) for t, net in zip(fms_t, nets)], dim=1)
                for s, nets in zip(fms_s, self.regressor)
            ]
            return w, torch.stack(m, dim=1)


class _Attention(nn.Module):
    """Rows of a Gram matrix to vectors of length 1."""

    def __init__(self, batch_size: int, d: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(batch_size, 2 * d), nn.Linear(2 * d, d)

    def forward(self, gram: Tensor) -> Tensor:
        return _unit(self.fc2(F.relu(self.fc1(gram))))


def _regressor(c_s: int, c_t: int) -> nn.Sequential:
    wide = 2 * c_t
    return nn.Sequential(
        *(nn.Conv2d(c_s, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.ReLU()),
        *(nn.Conv2d(wide, wide, 3, padding=1, bias=False), nn.BatchNorm2d(wide), nn.ReLU()),
        nn.Conv2d(wide, c_t, 1, bias=False),
    )


def _error(fm_s: Tensor, fm_t: Tensor, regressor: nn.Module) -> Tensor:
    """(N,) mean squared differences at the smaller of the two sizes."""
    if fm_s.shape[2] > fm_t.shape[2]:
        fm_s = F.adaptive_avg_pool2d(fm_s, fm_t.shape[2:])
    elif fm_s.shape[2:] != fm_t.shape[2:]:
        fm_t = F.adaptive_avg_pool2d(fm_t, fm_s.shape[2:])
    return (regressor(fm_s) - fm_t).square().mean(dim=(1, 2, 3))


def _gram(fm: Tensor) -> Tensor:
    f = fm.flatten(1)
    return f @ f.T


def _unit(x: Tensor) -> Tensor:
    """Rows divided by their length; a zero row stays zero and gets no gradient."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    alive = norm > 1e-12
    return torch.where(alive, x / torch.where(alive, norm, 1.0), 0.0)


def _full(x: Tensor) -> Tensor:
    """Half precision to float32; float64 stays."""
    return x if x.dtype == torch.float64 else x.float()


# ------------------------------------------ how the training scripts use it; a copied file may drop this


def build(loss, probe, **options):
    channels = ([x.shape[1] for x in f.fms[1:]] for f in (probe.s, probe.t))
    return loss(*channels, probe.batch_size, **options)
