"""DML, deep mutual learning: networks trained together, each pulled to the others' predictions.

Y. Zhang, T. Xiang, T. M. Hospedales, H. Lu, "Deep Mutual Learning", CVPR 2018, arXiv:1706.00384.

    p = softmax of the logits
    loss = mean over the peers l of mean over n of sum over k of p_l (log p_l - log p)        KL(p_l || p)

Tap: the logits of M >= 2 networks on the same batch, one call per network with the others as peers; added to
each one's cross-entropy. Networks that start from equal weights stay equal, with loss 0 for ever.

Differences: the mean over the peers is the paper's, the authors' code sums (peer_reduction='sum'). All
networks step at once from the same forward pass, as in Knowledge-Distillation-Zoo; the authors update them in
turn.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DML(nn.Module):
    """KL divergence from the peers' to this network's probabilities.

    Args:
        peer_reduction: 'mean' or 'sum' over the peers.

    Shape:
        out: (N, K); peers: a tensor (N, K), or a list of them. Returns a scalar. No gradient reaches the
        peers.

    Raises:
        ValueError: peer_reduction is neither; there is no peer; the shapes differ.
    """

    def __init__(self, peer_reduction: str = 'mean') -> None:
        super().__init__()
        if peer_reduction not in ('mean', 'sum'):
            raise ValueError(f'DML: peer_reduction must be "mean" or "sum", got {peer_reduction!r}')
        self.peer_reduction = peer_reduction

    def forward(self, out: Tensor, peers: Tensor | list[Tensor]) -> Tensor:
        peers = [peers] if isinstance(peers, Tensor) else list(peers)
        if out.dim() != 2:
            raise ValueError(f'DML: out must be (N, K), got {tuple(out.shape)}')
        if not peers or any(p.shape != out.shape for p in peers):
            shapes = [tuple(p.shape) for p in peers]
            raise ValueError(f'DML: peers must be one or more {tuple(out.shape)} as out, got {shapes}')
        log_p = F.log_softmax(_full(out), dim=1)
        total = sum(_kl(F.log_softmax(_full(p.detach()), dim=1), log_p) for p in peers)
        return total / len(peers) if self.peer_reduction == 'mean' else total


def _kl(log_q: Tensor, log_p: Tensor) -> Tensor:
    q = log_q.exp()
    return torch.where(q > 0, q * (log_q - log_p), 0.0).sum(dim=1).mean()


def _full(x: Tensor) -> Tensor:
    """Half precision to float32; float64 stays."""
    return x if x.dtype == torch.float64 else x.float()


# ------------------------------------------ how the training scripts use it; a copied file may drop this


def feed(kd, s, t, batch):
    return sum(kd(x.out, [y.out for y in s if y is not x]) for x in s)
