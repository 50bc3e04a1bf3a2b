"""KDCL, collaborative learning: networks trained together learn from the best combination of their logits.

Q. Guo, X. Wang, Y. Wu, Z. Yu, D. Liang, X. Hu, P. Luo, "Online Knowledge Distillation via Collaborative
Learning", CVPR 2020.

    z = combined logits of the M networks, without gradient:
        minlogit: z[k] = min over m of (outs_m[k] - outs_m[target])
        naive:    per sample the network with the smallest cross-entropy
        linear:   per sample the convex combination with the smallest cross-entropy
        general:  sum over m of w_m outs_m, w = C^-1 1 / (1' C^-1 1), C: products of the networks' errors,
                  averaged over held-out data, once per epoch (`general_weights`)
    loss = sum over m of CE(outs_m) + lam T^2 mean over n of KL(softmax(z / T) || softmax(outs_m / T))

Tap: the logits of all networks, each on its own augmentation of the same images. Contains its cross-entropy.

Differences: from the formula as secondary sources agree on it; no code of the authors was found. T and lam
are not certain. Ports that average the logits compute something else.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class KDCL(nn.Module):
    """Cross-entropy and soft targets of the combined logits, summed over the networks.

    Args:
        mode: 'minlogit', 'naive', 'linear' or 'general'.
        T: temperature, > 0; 2.
        lam: weight of the soft targets; 1.

    Shape:
        outs: list of M tensors (N, K), or stacked (M, N, K); target: (N,) int64; weights: (M,), for
        'general'. Returns a scalar. `combine` returns z (N, K).

    Raises:
        ValueError: an argument is not legal; shapes differ; weights are missing or not (M,).
    """

    def __init__(self, mode: str = 'minlogit', T: float = 2.0, lam: float = 1.0) -> None:
        super().__init__()
        if mode not in ('minlogit', 'naive', 'linear', 'general'):
            raise ValueError(f'KDCL: mode must be minlogit, naive, linear or general, got {mode!r}')
        if not T > 0:
            raise ValueError(f'KDCL: T must be > 0, got {T}')
        self.mode, self.T, self.lam = mode, T, lam

    def forward(self, outs: list[Tensor], target: Tensor, weights: Tensor | None = None) -> Tensor:
        shapes = [tuple(z.shape) for z in outs]
        if not shapes or len(shapes[0]) != 2 or any(s != shapes[0] for s in shapes):
            raise ValueError(f'KDCL: outs must hold tensors of one shape (N, K), got {shapes}')
        if target.shape != shapes[0][:1] or target.is_floating_point():
            raise ValueError(f'KDCL: target must be ({shapes[0][0]},) of integers, got {tuple(target.shape)}')
        if weights is not None and weights.shape != (len(shapes),):
            raise ValueError(f'KDCL: weights must be ({len(shapes)},), got {tuple(weights.shape)}')
        z = torch.stack([_full(x) for x in outs])
        hard = sum(F.cross_entropy(x, target) for x in z)
        log_q = F.log_softmax(self.combine(z, target, weights) / self.T, dim=1)
        log_p = F.log_softmax(z / self.T, dim=2)
        q = log_q.exp()
        soft = torch.where(q > 0, q * (log_q - log_p), 0.0).sum() / z.shape[1]
        return hard + self.lam * self.T**2 * soft

    @torch.no_grad()
    def combine(self, outs: list[Tensor], target: Tensor, weights: Tensor | None = None) -> Tensor:
        z = torch.stack([_full(x) for x in outs])
        truth = z.gather(2, target[None, :, None].expand(len(z), -1, 1))  # (M, N, 1)
        if self.mode == 'minlogit':
            return (z - truth).amin(dim=0)
        if self.mode == 'naive':
            best = (z.logsumexp(dim=2) - truth[:, :, 0]).argmin(dim=0)
            return z.gather(0, best[None, :, None].expand(1, -1, z.shape[2]))[0]
        if self.mode == 'linear':
            return torch.einsum('mn,mnk->nk', _best_mixture(z, target), z)
        if weights is None or weights.shape != (len(z),):
            got = None if weights is None else tuple(weights.shape)
            raise ValueError(f'KDCL: weights must be ({len(z)},) in mode general, got {got}')
        return torch.einsum('m,mnk->nk', weights.to(z.dtype), z)


@torch.no_grad()
def general_weights(probs: Tensor, onehot: Tensor) -> Tensor:
    """(M,) weights, to sum 1, from probabilities (M, n, K) and labels (n, K) of held-out data."""
    errors = (_full(probs) - onehot.to(_full(probs).dtype)).flatten(1)
    C = errors @ errors.T / probs.shape[1]
    C = C + 1e-6 * torch.eye(len(C), dtype=C.dtype, device=C.device)  # equal networks make it singular
    w = torch.linalg.solve(C, torch.ones_like(C[0]))
    return w / w.sum()


def _best_mixture(z: Tensor, target: Tensor, steps: int = 100) -> Tensor:
    """(M, N) non-negative weights, to sum 1 per sample, of small cross-entropy: exponentiated gradient."""
    a = torch.full(z.shape[:2], 1 / len(z), dtype=z.dtype, device=z.device)
    is_y = target[:, None] == torch.arange(z.shape[2], device=z.device)
    reach = (z.amax(dim=(0, 2)) - z.amin(dim=(0, 2))).clamp(min=1e-6)  # bounds the slope
    for step in range(steps):
        p = torch.einsum('mn,mnk->nk', a, z).softmax(dim=1)
        slope = torch.einsum('nk,mnk->mn', p - is_y.to(p.dtype), z)
        a = (a.clamp(min=1e-30).log() - 2 / (1 + step) ** 0.5 * slope / reach).softmax(dim=0)
    return a


def _full(x: Tensor) -> Tensor:
    """Half precision to float32; float64 stays."""
    return x if x.dtype == torch.float64 else x.float()


# ------------------------------------------ how the training scripts use it; a copied file may drop this


def feed(kd, s, t, batch):
    return kd([f.out for f in s], batch.target, kd.weights)


def build(loss, probe, **options):
    kd = loss(**options)
    kd.weights = torch.full((len(probe.s),), 1 / len(probe.s))  # until there are better ones
    return kd


@torch.no_grad()
def weigh(kd, held_out):
    """The general mode: weights of the networks from held-out data, at the start of every epoch."""
    if kd.mode != 'general':
        return
    found = held_out()
    if found is None:
        raise ValueError('KDCL: mode general weighs the networks on held-out data, --val_split gives some')
    outs, target = found
    kd.weights = general_weights(outs.softmax(dim=2), F.one_hot(target, outs.shape[2]))
