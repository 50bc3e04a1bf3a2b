"""BYOT, be your own teacher: exits after earlier stages learn from the network's own end.

L. Zhang, J. Song, A. Gao, J. Chen, C. Bao, K. Ma, "Be Your Own Teacher: Improve the Performance of
Convolutional Neural Networks via Self Distillation", ICCV 2019, arXiv:1905.08094.

    index 0: the deepest classifier, 1, 2, ...: exits, shallower and shallower
    H_i = - mean over n of sum over k of softmax(outs[0] / T) log softmax(outs[i] / T)
    F_i = Euclidean length, over the whole batch, of (A_i feats[i] - feats[0]),  A_i linear, learned
    loss = CE(outs[0]) + sum over i > 0 of (1 - alpha) CE(outs[i]) + alpha H_i + beta F_i

Tap: logits and pooled features of all classifiers. What comes from index 0 is a target and gets no gradient
in H and F. No teacher. Contains its cross-entropy. The exits may be kept or dropped.

Differences: the authors' code leaves F_1 out, against its own comment; skip=(1,) does that. No T^2 and the
length itself, not its square, as there.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class BYOT(nn.Module):
    """Cross-entropy, soft targets and features for every exit.

    Args:
        feat_dims: list of the widths of feats, the deepest first.
        T: temperature, > 0; 3.
        alpha: share of the soft targets at an exit; 0.3.
        beta: weight of the features; 0.03.
        skip: indices of exits without the feature term; none.

    Shape:
        outs: list of L tensors (N, K); feats: list of L tensors (N, feat_dims[i]); target: (N,) int64.
        Returns a scalar. `terms` returns the sums (hard, soft, features), weights included.

    Raises:
        ValueError: T is not positive; lists of another length; shapes differ.
    """

    def __init__(
        self, feat_dims: list, T: float = 3.0, alpha: float = 0.3, beta: float = 0.03, skip: tuple = ()
    ) -> None:
        super().__init__()
        if not T > 0:
            raise ValueError(f'BYOT: T must be > 0, got {T}')
        self.feat_dims, self.T, self.alpha, self.beta, self.skip = (
            list(feat_dims),
            T,
            alpha,
            beta,
            tuple(skip),
        )
        self.adapt = nn.ModuleList(nn.Linear(d, feat_dims[0]) for d in feat_dims[1:])

    def forward(self, outs: list[Tensor], feats: list[Tensor], target: Tensor) -> Tensor:
        return sum(self.terms(outs, feats, target))

    def terms(self, outs: list[Tensor], feats: list[Tensor], target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        self._check(outs, feats, target)
        with torch.autocast(outs[0].device.type, enabled=False):
            outs, feats = [_full(x) for x in outs], [_full(x) for x in feats]
            hard = F.cross_entropy(outs[0], target)
            soft, features = torch.zeros_like(hard), torch.zeros_like(hard)
            q = F.softmax(outs[0].detach() / self.T, dim=1)
            for i, (out, feat, adapt) in enumerate(zip(outs[1:], feats[1:], self.adapt), 1):
                hard = hard + (1 - self.alpha) * F.cross_entropy(out, target)
                log_p = F.log_softmax(out / self.T, dim=1)
                soft = soft - self.alpha * (q * log_p).sum(dim=1).mean()
                if i not in self.skip:
                    gap = adapt(feat) - feats[0].detach()
                    features = features + self.beta * torch.linalg.vector_norm(gap)
            return hard, soft, features

    def _check(self, outs: list[Tensor], feats: list[Tensor], target: Tensor) -> None:
        shapes = [tuple(x.shape) for x in outs]
        if not shapes or len(shapes[0]) != 2 or any(s != shapes[0] for s in shapes):
            raise ValueError(f'BYOT: outs must be tensors of one shape (N, K), got {shapes}')
        if len(outs) != len(self.feat_dims):
            raise ValueError(f'BYOT: outs must hold {len(self.feat_dims)} tensors, got {shapes}')
        got, wanted = [tuple(x.shape) for x in feats], [(shapes[0][0], d) for d in self.feat_dims]
        if got != wanted:
            raise ValueError(f'BYOT: feats must be {wanted}, got {got}')
        if target.shape != (shapes[0][0],) or target.is_floating_point():
            raise ValueError(f'BYOT: target must be ({shapes[0][0]},) of integers, got {tuple(target.shape)}')


def _full(x: Tensor) -> Tensor:
    """Half precision to float32; float64 stays."""
    return x if x.dtype == torch.float64 else x.float()
