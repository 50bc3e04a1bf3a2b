"""VkD: an orthogonal projection of the student's features onto the normalised teacher's.

R. Miles, I. Elezi, J. Deng, "VkD: Improving Knowledge Distillation using Orthogonal Projections", CVPR 2024,
arXiv:2403.06213.

    W: (t_dim, s_dim) with orthonormal columns (rows, if t_dim < s_dim), kept so while it is trained
    t = feat_t minus its mean over the t_dim entries, over its standard deviation, per sample
    e = W feat_s - t;   h(e) = e^2 / 2 where |e| < 1, else |e| - 1/2
    loss = mean over n and entries of h(e)

Tap: the pooled embeddings (for a transformer, the tokens' average). The projection preserves the student's
geometry, so it cannot do the learning in the student's place.

Differences: the authors' classification code; their detection variant standardises over the batch. The
projection is torch's orthogonal parametrisation, so the module can be copied and its state saved, but not
pickled whole.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal


class VkD(nn.Module):
    """Huber loss between orthogonally projected student and layer-normalised teacher features.

    Args:
        s_dim, t_dim: widths of the two embeddings.

    Shape:
        feat_s: (N, s_dim), feat_t: (N, t_dim); further axes are flattened. Returns a scalar. No gradient
        reaches feat_t.

    Raises:
        ValueError: a feature has another width than announced; the batch sizes differ.
    """

    def __init__(self, s_dim: int, t_dim: int) -> None:
        super().__init__()
        self.s_dim, self.t_dim = s_dim, t_dim
        self.projection = orthogonal(nn.Linear(s_dim, t_dim, bias=False))

    def forward(self, feat_s: Tensor, feat_t: Tensor) -> Tensor:
        if feat_s.dim() < 2 or feat_s[0].numel() != self.s_dim:
            raise ValueError(f'VkD: feat_s must be (N, {self.s_dim}), got {tuple(feat_s.shape)}')
        if feat_t.dim() < 2 or len(feat_t) != len(feat_s) or feat_t[0].numel() != self.t_dim:
            raise ValueError(
                f'VkD: feat_t must be ({len(feat_s)}, {self.t_dim}) as feat_s and t_dim say, '
                f'got {tuple(feat_t.shape)}'
            )
        with torch.autocast(feat_s.device.type, enabled=False):
            projected = self.projection(_full(feat_s).flatten(1))
            t = F.layer_norm(_full(feat_t.detach()).flatten(1), (self.t_dim,), eps=1e-5)
            return F.smooth_l1_loss(projected, t)


def _full(x: Tensor) -> Tensor:
    """Half precision to float32; float64 stays."""
    return x if x.dtype == torch.float64 else x.float()
