"""OKDDip, diverse peers: every peer has its own, attention-weighted view of the others; a leader sees all.

D. Chen, J.-P. Mei, C. Wang, Y. Feng, C. Chen, "Online Knowledge Distillation with Diverse Peers", AAAI 2020,
arXiv:1912.00350.

    att[a, b] = softmax over b of (W_q feats_a).(W_k feats_b), per sample, b = a included
    t_a = sum over b of att[a, b] outs_b
    KL(s, t) = T^2 mean over n of sum over k of p (log p - log softmax(s / T)), p = softmax(t / T) + 1e-7
    loss = sum over a of CE(outs_a) + CE(out_leader)
           + kd_weight (sum over a of KL(outs_a, t_a) + KL(out_leader, mean over a of outs_a))

Tap: logits and pooled embeddings of the peers, logits of the group leader, which is the network that is kept:
branches of one network, or separate networks. Contains its cross-entropy. kd_weight rises over the first 80
of 300 epochs as exp(-5 (1 - epoch / 80)^2).

Differences: the authors' code, which lets gradients flow into the targets (that is how W_q and W_k learn);
the paper's plain targets are detach=True.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class OKDDip(nn.Module):
    """Cross-entropy, attention-weighted soft targets for the peers, averaged ones for the leader.

    Args:
        feat_dim: width of the peers' embeddings.
        T: temperature, > 0; 3.
        factor: the attention width is max(1, feat_dim // factor); 8.
        detach: no gradient into the targets; False.

    Shape:
        outs: list of M tensors (N, K), feats: list of M tensors (N, feat_dim), or both stacked; out_leader:
        (N, K); target: (N,) int64; kd_weight: of this epoch. Returns a scalar. `terms` returns
        (cross-entropies, peers' KL, leader's KL); `attention` and `targets` the (N, M, M) weights and (N, K,
        M) targets.

    Raises:
        ValueError: T is not positive; shapes do not fit.
    """

    def __init__(self, feat_dim: int, T: float = 3.0, factor: int = 8, detach: bool = False) -> None:
        super().__init__()
        if not T > 0:
            raise ValueError(f'OKDDip: T must be > 0, got {T}')
        self.feat_dim, self.T, self.detach = feat_dim, T, detach
        width = max(1, feat_dim // factor)
        self.query = nn.Linear(feat_dim, width, bias=False)
        self.key = nn.Linear(feat_dim, width, bias=False)

    def forward(
        self,
        outs: list[Tensor],
        feats: list[Tensor],
        out_leader: Tensor,
        target: Tensor,
        kd_weight: float = 1.0,
    ) -> Tensor:
        hard, peers, leader = self.terms(outs, feats, out_leader, target)
        return hard + kd_weight * (peers + leader)

    def terms(self, outs, feats, out_leader, target) -> tuple[Tensor, Tensor, Tensor]:
        shapes = [tuple(z.shape) for z in outs]
        if out_leader.dim() != 2 or not shapes or any(s != tuple(out_leader.shape) for s in shapes):
            raise ValueError(
                f'OKDDip: outs and out_leader must be (N, K), equal, '
                f'got {shapes} and {tuple(out_leader.shape)}'
            )
        n, got = len(out_leader), [tuple(f.shape) for f in feats]
        if got != [(n, self.feat_dim)] * len(shapes):
            raise ValueError(f'OKDDip: feats must be {len(shapes)} of {(n, self.feat_dim)}, got {got}')
        if target.shape != (n,) or target.is_floating_point():
            raise ValueError(f'OKDDip: target must be ({n},) of integers, got {tuple(target.shape)}')
        with torch.autocast(out_leader.device.type, enabled=False):
            outs, leader = torch.stack([_full(z) for z in outs]), _full(out_leader)
            hard = sum(F.cross_entropy(z, target) for z in (*outs, leader))
            goals = self.targets(outs, feats).permute(2, 0, 1)
            mean = outs.mean(dim=0)
            if self.detach:
                goals, mean = goals.detach(), mean.detach()
            return hard, self._kl(outs, goals), self._kl(leader[None], mean[None])

    def attention(self, feats: list[Tensor]) -> Tensor:
        """(N, M, M): sample, learning peer, peer it listens to."""
        feats = torch.stack([_full(f) for f in feats], dim=1)
        return F.softmax(self.query(feats) @ self.key(feats).mT, dim=2)

    def targets(self, outs: Tensor, feats: list[Tensor]) -> Tensor:
        """(N, K, M): the logits that each peer learns from."""
        return torch.einsum('nab,bnk->nka', self.attention(feats), outs)

    def _kl(self, outs: Tensor, goals: Tensor) -> Tensor:
        """Summed over the leading axis."""
        p = (goals / self.T).softmax(dim=2) + 1e-7
        return (p * (p.log() - F.log_softmax(outs / self.T, dim=2))).sum() / outs.shape[1] * self.T**2


def _full(x: Tensor) -> Tensor:
    """Half precision to float32; float64 stays."""
    return x if x.dtype == torch.float64 else x.float()


# ------------------------------------------ how the training scripts use it; a copied file may drop this


def feed(kd, s, t, batch):
    *peers, leader = s
    return kd([f.out for f in peers], [f.feat for f in peers], leader.out, batch.target, batch.inner)


def build(loss, probe, **options):
    return loss(probe.s[0].feat.shape[1], **options)
