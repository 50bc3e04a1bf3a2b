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


class BYOTStudent(nn.Module):
    """A network with an exit after every stage but the last; in use without them.

    An exit is a depthwise-separable convolution per remaining stage, with its stride and channels, an average
    over positions, and a linear classifier.

    Args:
        net: `net(x, True)` gives (out, feat, fms, pres, extra).
        shapes: (C, H, W) of the maps of all stages, shallow to deep.
        num_classes: K.

    Shape:
        x: (N, 3, H, W). Returns logits; with True the network's tuple, its `extra` (outs, feats), the deepest
        classifier first, as BYOT wants them.
    """

    def __init__(self, net: nn.Module, shapes: list, num_classes: int) -> None:
        super().__init__()
        self.net, self.exits, self.heads = net, nn.ModuleList(), nn.ModuleList()
        for k in range(len(shapes) - 1):
            steps = [_separable(a, b) for a, b in zip(shapes[k:], shapes[k + 1 :])]
            self.exits.append(nn.Sequential(*steps))
            self.heads.append(nn.Linear(shapes[-1][0], num_classes))

    def deployed(self) -> nn.Module:
        """What is kept after training."""
        return self.net

    def forward(self, x: Tensor, feats: bool = False):
        f = self.net(x, True)
        if not feats:
            return f.out
        stages = f.fms[-1 - len(self.exits) : -1]
        ends = [exit(fm).mean(dim=(2, 3)) for exit, fm in zip(self.exits, stages)]
        outs = [head(end) for head, end in zip(self.heads, ends)]
        return f._replace(extra=([f.out, *outs[::-1]], [f.feat, *ends[::-1]]))


def _separable(a: tuple, b: tuple) -> nn.Sequential:
    """From a map (C, H, W) to one of the next stage's channels and size."""
    stride = max(round(a[1] / b[1]), 1)
    return nn.Sequential(
        *(nn.Conv2d(a[0], a[0], 3, stride, 1, groups=a[0], bias=False), nn.BatchNorm2d(a[0]), nn.ReLU()),
        *(nn.Conv2d(a[0], b[0], 1, bias=False), nn.BatchNorm2d(b[0]), nn.ReLU()),
    )


def _full(x: Tensor) -> Tensor:
    """Half precision to float32; float64 stays."""
    return x if x.dtype == torch.float64 else x.float()


# ------------------------------------------ how the training scripts use it; a copied file may drop this


def feed(kd, s, t, batch):
    return kd(*s.extra, batch.target)


def build(loss, probe, **options):
    stages = len(probe.s.fms) - 1
    return loss([probe.s.feat.shape[1]] + [probe.s.fms[-1].shape[1]] * (stages - 1), **options)


def student(net, kd, probe):
    return BYOTStudent(net, [x.shape[1:] for x in probe.s.fms[1:]], probe.num_classes)
