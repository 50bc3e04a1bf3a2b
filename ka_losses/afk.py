"""AFK, amalgamating filtered knowledge: streams through one shared trunk that differ only by small filters.

J. Ye, X. Wang, Y. Ji, K. Ou, M. Song, "Amalgamating Filtered Knowledge: Learning Task-customized Student from
Multi-task Teachers", IJCAI 2019, arXiv:1905.11569.

    y_u = 1 where sigmoid(out_t_u) > 0.5, else 0
    loss = sum over streams u of mean over n and classes of binary cross-entropy(out_s_u, y_u)

    Filter: gate_u = sigmoid(W2 relu(W1 pooled m_u)), m_u the middle activation of a residual block; the block
    gives relu(branch(x_u) + shortcut(x_u) gate_u) for every stream u.

Tap: multi-label logits of each stream and of its teacher. Branching off the trunk, freezing and fine-tuning
go as in sbm.py.

Differences: hard pseudo-labels as in the authors' code, a logit of exactly 0 counts as negative. Its hidden
width is a fraction under Python 3; ours is rounded down.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class AFK(nn.Module):
    """Binary cross-entropy against each teacher's decisions.

    Shape:
        outs_s, outs_t: lists over streams of (N, K_u), equal. Returns a scalar, with return_terms=True also
        {'stream0': ..., ...}. No gradient reaches outs_t.

    Raises:
        ValueError: lists or shapes that do not meet.
    """

    def forward(self, outs_s: list[Tensor], outs_t: list[Tensor], return_terms: bool = False):
        if len(outs_s) != len(outs_t) or not outs_s:
            raise ValueError(f'AFK: outs_t must hold {len(outs_s)} tensors as outs_s, got {len(outs_t)}')
        terms = {}
        for u, (out_s, out_t) in enumerate(zip(outs_s, outs_t)):
            if out_s.dim() != 2 or out_t.shape != out_s.shape:
                raise ValueError(
                    f'AFK: outs_t[{u}] must be {tuple(out_s.shape)} as outs_s[{u}], (N, K), '
                    f'got {tuple(out_t.shape)}'
                )
            label = (_full(out_t.detach()) > 0).to(_full(out_s))
            terms[f'stream{u}'] = F.binary_cross_entropy_with_logits(_full(out_s), label)
        loss = sum(terms.values())
        return (loss, terms) if return_terms else loss


class Filter(nn.Module):
    """A gate per channel for one stream through a residual block.

    Args:
        in_channels: of the block's middle activation.
        out_channels: of the block's output.
        reduction, min_hidden: hidden width = max(min_hidden, out_channels // reduction); 8 and 16.

    Shape:
        mid: (N, in_channels, H, W) -> (N, out_channels, 1, 1).

    Raises:
        ValueError: mid has other channels.
    """

    def __init__(self, in_channels: int, out_channels: int, reduction: int = 8, min_hidden: int = 16) -> None:
        super().__init__()
        hidden = max(min_hidden, out_channels // reduction)
        self.w1 = nn.Conv2d(in_channels, hidden, 1, bias=False)
        self.w2 = nn.Conv2d(hidden, out_channels, 1, bias=False)

    def forward(self, mid: Tensor) -> Tensor:
        if mid.dim() != 4 or mid.shape[1] != self.w1.in_channels:
            raise ValueError(f'Filter: mid must be (N, {self.w1.in_channels}, H, W), got {tuple(mid.shape)}')
        return torch.sigmoid(self.w2(F.relu(self.w1(mid.mean(dim=(2, 3), keepdim=True)))))


def _full(x: Tensor) -> Tensor:
    """Half precision to float32; float64 stays."""
    return x if x.dtype == torch.float64 else x.float()
