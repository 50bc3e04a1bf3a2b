"""SLA+SD, self-supervised label augmentation: learn (class, rotation) jointly, and distil the average back.

H. Lee, S. J. Hwang, J. Shin, "Self-supervised Label Augmentation via Input Transformations", ICML 2020,
arXiv:1910.05872.

    each image in M transformed copies; joint head: K M logits, index = class M + transform; plain head: K
    joint = mean over the N M copies of cross-entropy with label target M + transform
    single = CE(out, target)                                  out: plain head, untransformed image
    agg[n, k] = mean over j of the joint logit (k, j) of copy j
    kd = T^2 mean over n of KL(softmax(agg / T) || softmax(out / T)), no gradient to agg
    loss = joint + single + kd

Tap: images through `rotations`, one forward pass over all copies, two linear heads. No teacher. Contains its
cross-entropy. In use: the plain head (SLA+SD), or agg of all copies (SLA+AG).

Differences: none from the authors' code.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SLA(nn.Module):
    """Joint cross-entropy, plain cross-entropy, and distillation of the aggregated prediction.

    Args:
        num_transforms: M copies per image; 4 rotations.
        T: temperature, > 0; 1.

    Shape:
        joint_out: (N M, K M), sample-major (copies of a sample are neighbours); out: (N, K); target: (N,)
        int64. Returns a scalar. `terms` returns (joint, single, kd); `aggregate` the (N, K) averaged logits.

    Raises:
        ValueError: T or num_transforms is not positive; shapes do not fit.
    """

    def __init__(self, num_transforms: int = 4, T: float = 1.0) -> None:
        super().__init__()
        if not T > 0 or num_transforms < 1:
            raise ValueError(f'SLA: T and num_transforms must be > 0, got {T} and {num_transforms}')
        self.num_transforms, self.T = num_transforms, T

    def forward(self, joint_out: Tensor, out: Tensor, target: Tensor) -> Tensor:
        return sum(self.terms(joint_out, out, target))

    def terms(self, joint_out: Tensor, out: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        M = self.num_transforms
        if out.dim() != 2:
            raise ValueError(f'SLA: out must be (N, K), got {tuple(out.shape)}')
        wanted = (len(out) * M, out.shape[1] * M)
        if joint_out.shape != wanted:
            raise ValueError(
                f'SLA: joint_out must be {wanted} as out {tuple(out.shape)}, got {tuple(joint_out.shape)}'
            )
        if target.shape != out.shape[:1] or target.is_floating_point():
            raise ValueError(f'SLA: target must be ({len(out)},) of integers, got {tuple(target.shape)}')
        joint_out, out = _full(joint_out), _full(out)
        label = (target[:, None] * M + torch.arange(M, device=target.device)).flatten()
        log_p = F.log_softmax(out / self.T, dim=1)
        log_q = F.log_softmax(self.aggregate(joint_out.detach()) / self.T, dim=1)
        q = log_q.exp()
        kd = torch.where(q > 0, q * (log_q - log_p), 0.0).sum(dim=1).mean() * self.T**2
        return F.cross_entropy(joint_out, label), F.cross_entropy(out, target), kd

    def aggregate(self, joint_out: Tensor) -> Tensor:
        """(N M, K M) -> (N, K): for each copy the logits of its own transform, averaged."""
        M = self.num_transforms
        per_copy = joint_out.unflatten(1, (-1, M)).unflatten(0, (-1, M))  # (N, copy, K, transform)
        return per_copy.diagonal(dim1=1, dim2=3).mean(dim=2)


def rotations(images: Tensor) -> Tensor:
    """(N, C, H, H) -> (4 N, C, H, H): each image turned by 0, 90, 180, 270 degrees, sample-major."""
    if images.dim() != 4 or images.shape[2] != images.shape[3]:
        raise ValueError(f'rotations: images must be (N, C, H, H), square, got {tuple(images.shape)}')
    return torch.stack([images.rot90(k, (2, 3)) for k in range(4)], dim=1).flatten(0, 1)


class SLAStudent(nn.Module):
    """A network with a joint head; in training it sees all rotations, in use only the image.

    Args:
        net: `net(x, True)` gives (out, feat, fms, pres, extra).
        feat_dim, num_classes: of the network.

    Shape:
        x: (N, 3, H, H). Returns logits; with True the network's tuple for the untransformed images, the joint
        logits (4 N, 4 K) as its `extra`.
    """

    def __init__(self, net: nn.Module, feat_dim: int, num_classes: int) -> None:
        super().__init__()
        self.net, self.joint = net, nn.Linear(feat_dim, 4 * num_classes)

    def deployed(self) -> nn.Module:
        """What is kept after training."""
        return self.net

    def forward(self, x: Tensor, feats: bool = False):
        if not feats:
            return self.net(x)
        f = self.net(rotations(x), True)
        first = [[m[::4] for m in maps] for maps in (f.fms, f.pres)]
        return f._replace(
            out=f.out[::4], feat=f.feat[::4], fms=first[0], pres=first[1], extra=self.joint(f.feat)
        )


def _full(x: Tensor) -> Tensor:
    """Half precision to float32; float64 stays."""
    return x if x.dtype == torch.float64 else x.float()


# ------------------------------------------ how the training scripts use it; a copied file may drop this


def feed(kd, s, t, batch):
    return kd(s.extra, s.out, batch.target)


def student(net, kd, probe):
    return SLAStudent(net, probe.s.feat.shape[1], probe.num_classes)
