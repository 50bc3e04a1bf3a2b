"""ONE, on-the-fly native ensemble: branches of one network learn from their own gated ensemble.

X. Lan, X. Zhu, S. Gong, "Knowledge Distillation by On-the-Fly Native Ensemble", NeurIPS 2018,
arXiv:1806.04606.

    g = softmax over branches of ReLU(batch norm of a linear map of feat)             the gate, learned
    z = sum over m of g_m outs_m                                                       the ensemble
    q = softmax(z / T) + 1e-7, no gradient
    loss = sum over m of CE(outs_m) + CE(z)
           + kd_weight sum over m of T^2 mean over n of sum over k of q (log q - log softmax(outs_m / T))

Tap: a network with a shared trunk and M last stages: their logits, and the trunk's pooled map. No teacher.
Contains its cross-entropy. kd_weight rises over the first 80 of 300 epochs as exp(-5 (1 - epoch / 80)^2). In
use: one branch (ONE) or the ensemble (ONE-E).

Differences: the authors' code (the ReLU keeps gate logits at or above 0). In training mode a batch of one is
normalised with the running statistics.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ONE(nn.Module):
    """Cross-entropy of branches and ensemble, and soft targets from the ensemble to the branches.

    Args:
        feat_dim: width of feat.
        num_branches: M; 3.
        T: temperature, > 0; 3.

    Shape:
        outs: list of M tensors (N, K), or stacked (M, N, K); feat: (N, feat_dim); target: (N,) int64;
        kd_weight: of this epoch. Returns a scalar. `terms` returns (cross-entropies, KD); `ensemble` is z of
        the last call, detached.

    Raises:
        ValueError: T is not positive; shapes do not fit.
    """

    def __init__(self, feat_dim: int, num_branches: int = 3, T: float = 3.0) -> None:
        super().__init__()
        if not T > 0:
            raise ValueError(f'ONE: T must be > 0, got {T}')
        self.feat_dim, self.num_branches, self.T = feat_dim, num_branches, T
        self.gate = nn.Linear(feat_dim, num_branches)
        self.norm = nn.BatchNorm1d(num_branches)
        self.ensemble = None

    def forward(self, outs: list[Tensor], feat: Tensor, target: Tensor, kd_weight: float = 1.0) -> Tensor:
        hard, kd = self.terms(outs, feat, target)
        return hard + kd_weight * kd

    def terms(self, outs: list[Tensor], feat: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        shapes = [tuple(z.shape) for z in outs]
        if len(shapes) != self.num_branches or len(shapes[0]) != 2 or any(s != shapes[0] for s in shapes):
            raise ValueError(f'ONE: outs must hold {self.num_branches} tensors (N, K), got {shapes}')
        if feat.shape != (shapes[0][0], self.feat_dim):
            raise ValueError(f'ONE: feat must be {(shapes[0][0], self.feat_dim)}, got {tuple(feat.shape)}')
        if target.shape != shapes[0][:1] or target.is_floating_point():
            raise ValueError(f'ONE: target must be ({shapes[0][0]},) of integers, got {tuple(target.shape)}')
        with torch.autocast(feat.device.type, enabled=False):
            outs = torch.stack([_full(z) for z in outs])
            z = self.combine(outs, feat)
            self.ensemble = z.detach()
            hard = sum(F.cross_entropy(out, target) for out in (*outs, z))
            q = (z.detach() / self.T).softmax(dim=1) + 1e-7
            log_p = F.log_softmax(outs / self.T, dim=2)
            kd = (q * (q.log() - log_p)).sum() / outs.shape[1] * self.T**2
            return hard, kd

    def combine(self, outs: Tensor, feat: Tensor) -> Tensor:
        """Branches' logits (M, N, K) and trunk features (N, feat_dim) -> the ensemble's logits (N, K)."""
        with torch.autocast(feat.device.type, enabled=False):
            outs = torch.stack([_full(z) for z in outs])
            x = self.gate(_full(feat))
            if self.training and len(x) == 1:
                n = self.norm
                x = F.batch_norm(x, n.running_mean, n.running_var, n.weight, n.bias, eps=n.eps)
            else:
                x = self.norm(x)
            return torch.einsum('nm,mnk->nk', F.softmax(x.relu(), dim=1), outs)


class Branches(nn.Module):
    """One trunk, several last stages and classifiers.

    Args:
        nets: fresh networks of one architecture; the first gives the trunk and a branch, the others a branch.
            `net(x, True)` gives (out, feat, fms, pres, extra), `net.after(k, fm)` goes on from its k-th map,
            `net.feat_modules()` lists its parts in order.

    Shape:
        x: (N, 3, H, W). Returns a list of the networks' tuples, one per branch.
    """

    def __init__(self, nets: list) -> None:
        super().__init__()
        self.nets = nn.ModuleList(nets)
        for net in nets[1:]:  # what comes before the last stage is never used
            for name, part in list(net.named_children()):
                if any(part is m for m in net.feat_modules()[:-1]):
                    setattr(net, name, nn.Identity())

    def weights(self, k: int) -> dict:
        """State dict of the k-th branch with the trunk, as one network."""
        return {**self.nets[0].state_dict(), **self.nets[k].state_dict()}

    def forward(self, x: Tensor) -> list:
        first, *others = self.nets
        f = first(x, True)
        k = len(f.fms) - 2
        ends = [net.after(k, f.fms[k]) for net in others]
        return [f, *(e._replace(fms=f.fms[:-1] + e.fms, pres=f.pres[:-1] + e.pres) for e in ends)]


def _full(x: Tensor) -> Tensor:
    """Half precision to float32; float64 stays."""
    return x if x.dtype == torch.float64 else x.float()


# ------------------------------------------ how the training scripts use it; a copied file may drop this


def feed(kd, s, t, batch):
    return kd([f.out for f in s], s[0].fms[-2].mean(dim=(2, 3)), batch.target, batch.inner)


def build(loss, probe, **options):
    return loss(probe.s[0].fms[-2].shape[1], len(probe.s), **options)


def peers(nets, probe):
    """Branches of one trunk."""
    if len({str(net) for net in nets}) > 1:
        raise ValueError('ONE: branches of one trunk need networks of one architecture')
    return Branches(nets)


def ensemble(kd, s):
    return kd.combine(torch.stack([f.out for f in s]), s[0].fms[-2].mean(dim=(2, 3)))
