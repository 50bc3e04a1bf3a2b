"""DCM, dense cross-layer mutual distillation: every classifier of one network teaches every one of the other.

A. Yao, D. Sun, "Knowledge Transfer via Dense Cross-layer Mutual-distillation", ECCV 2020, arXiv:2008.07816.

    each network has L classifiers: auxiliary ones after earlier stages, the final one last
    q = (softmax(z) + eps) / (1 + K eps)
    KL(a, b) = mean over n of sum over k of q_a (log q_a - log q_b), no gradient to a
    loss = sum over all 2 L classifiers of cross-entropy
           + sum over ordered pairs (a, b) of classifiers of different networks of KL(a, b)

Tap: the logits of all classifiers of two networks trained together on the same batch. Contains its
cross-entropy. The auxiliary classifiers are dropped after training.

Differences: none from the authors' code.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DCM(nn.Module):
    """Cross-entropy of all classifiers and mutual KL divergence across two networks, all weights 1.

    Args:
        eps: smoothing of the probabilities, >= 0; 1e-8.

    Shape:
        outs_1, outs_2: lists of L tensors (N, K), or stacked (L, N, K); target: (N,) int64. Returns a scalar.
        `terms` returns (cross-entropies, divergences).

    Raises:
        ValueError: eps is negative; the shapes differ.
    """

    def __init__(self, eps: float = 1e-8) -> None:
        super().__init__()
        if eps < 0:
            raise ValueError(f'DCM: eps must be >= 0, got {eps}')
        self.eps = eps

    def forward(self, outs_1: list[Tensor], outs_2: list[Tensor], target: Tensor) -> Tensor:
        hard, soft = self.terms(outs_1, outs_2, target)
        return hard + soft

    def terms(self, outs_1: list[Tensor], outs_2: list[Tensor], target: Tensor) -> tuple[Tensor, Tensor]:
        shapes = [[tuple(z.shape) for z in outs] for outs in (outs_1, outs_2)]
        flat = shapes[0] + shapes[1]
        if not flat or len(flat[0]) != 2 or any(s != flat[0] for s in flat):
            raise ValueError(f'DCM: outs_1 and outs_2 must hold tensors of one shape (N, K), got {shapes}')
        if len(outs_1) != len(outs_2):
            raise ValueError(f'DCM: outs_1 and outs_2 must have one length, got {shapes}')
        if target.shape != flat[0][:1] or target.is_floating_point():
            raise ValueError(f'DCM: target must be ({flat[0][0]},) of integers, got {tuple(target.shape)}')
        outs_1, outs_2 = ([_full(z) for z in outs] for outs in (outs_1, outs_2))
        hard = sum(F.cross_entropy(z, target) for z in (*outs_1, *outs_2))
        q_1, q_2 = (self._smooth(torch.stack(outs)) for outs in (outs_1, outs_2))
        return hard, self._pairs(q_1, q_2) + self._pairs(q_2, q_1)

    def _smooth(self, outs: Tensor) -> Tensor:
        """(L, N, K) logits -> smoothed log-probabilities."""
        if self.eps == 0:
            return F.log_softmax(outs, dim=2)
        return ((outs.softmax(dim=2) + self.eps) / (1 + outs.shape[2] * self.eps)).log()

    def _pairs(self, log_a: Tensor, log_b: Tensor) -> Tensor:
        """Sum over all (a, b) of KL(a, b): L sum of a log a, minus (sum of a) times (sum of log b)."""
        log_a = log_a.detach()
        a = log_a.exp()
        entropy = torch.where(a > 0, a * log_a, 0.0).sum() * len(log_b)
        return (entropy - (a.sum(dim=0) * log_b.sum(dim=0)).sum()) / log_a.shape[1]


class DCMStudent(nn.Module):
    """A network with an auxiliary classifier after every stage but the last; in use without them.

    An auxiliary classifier is a fresh copy of everything that follows in the network. (The authors double the
    width of the last one.)

    Args:
        nets: fresh networks of one architecture, one per stage; the first is the network that is kept.
            `net(x, True)` gives (out, feat, fms, pres, extra), `net.after(k, fm)` goes on from its k-th map.

    Shape:
        x: (N, 3, H, W). Returns logits; with True the network's tuple, the auxiliary logits as its `extra`.
    """

    def __init__(self, nets: list) -> None:
        super().__init__()
        self.net, *others = nets
        self.others = nn.ModuleList(others)
        for k, other in enumerate(others, 1):  # what comes before its first stage is never used
            parts = other.feat_modules()
            unused = parts[: max(len(parts) - (len(nets) - k), 0)]
            for name, part in list(other.named_children()):
                if any(part is m for m in unused):
                    setattr(other, name, nn.Identity())

    def deployed(self) -> nn.Module:
        """What is kept after training."""
        return self.net

    def forward(self, x: Tensor, feats: bool = False):
        f = self.net(x, True)
        if not feats:
            return f.out
        return f._replace(extra=[net.after(k, f.fms[k]).out for k, net in enumerate(self.others, 1)])


def _full(x: Tensor) -> Tensor:
    """Half precision to float32; float64 stays."""
    return x if x.dtype == torch.float64 else x.float()


# ------------------------------------------ how the training scripts use it; a copied file may drop this


def feed(kd, s, t, batch):
    if len(s) != 2:
        raise ValueError(f'DCM: is for two networks, got {len(s)}')
    return kd(*([*f.extra, f.out] for f in s), batch.target)
