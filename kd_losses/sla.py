"""SLA+SD, self-supervised label augmentation: learn (class, rotation) jointly, and distil the average back.

H. Lee, S. J. Hwang, J. Shin, "Self-supervised Label Augmentation via Input Transformations", ICML 2020,
arXiv:1910.05872.

    each image in M transformed copies; joint head: K * M logits, index = class * M + transform; plain head: K
    joint = mean over the N * M copies of cross-entropy with label target * M + transform
    single = CE(out, target)                                  out: plain head, untransformed image
    agg[n, k] = mean over j of the joint logit (k, j) of copy j
    kd = T^2 * mean over n of KL(softmax(agg / T) || softmax(out / T)), no gradient to agg
    loss = joint + single + kd

Tap: images through `rotations`, one forward pass over all copies, two linear heads. No teacher. Contains its
cross-entropy. In use: the plain head (SLA+SD), or agg of all copies (SLA+AG).

Differences: none from the authors' code.

Source: hankook/SLA, trainers.py (create_sla_sd_trainer) and augmentations.py.

Use:
    >>> import torch
    >>> from sla import SLA
    >>> joint_out, out = torch.randn(32, 40, requires_grad=True), torch.randn(8, 10)
    >>> SLA()(joint_out, out, torch.arange(8)).backward()
    >>> joint_out.grad.norm() > 0
    tensor(True)
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
        Rows of label -100 are left out. Computed in float32, or in float64 as the student.

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
        _expect('SLA', 'out', out, 'N', 'K')
        _expect('SLA', 'joint_out', joint_out, len(out) * M, out.shape[1] * M)
        target, valid = _labels('SLA', target, *out.shape)
        joint_out, out = _full(joint_out, out), _full(out)
        label = (target[:, None] * M + torch.arange(M, device=target.device)).flatten()
        log_p = F.log_softmax(out / self.T, dim=1)
        log_q = F.log_softmax(self.aggregate(joint_out.detach()) / self.T, dim=1)
        q = log_q.exp()
        kd = torch.where(q == 0, 0.0, q * (log_q - log_p)).sum(dim=1) * self.T**2
        joint = F.cross_entropy(joint_out, label, reduction='none').unflatten(0, (-1, M)).mean(dim=1)
        single = F.cross_entropy(out, target, reduction='none')
        return _mean(joint, valid), _mean(single, valid), _mean(kd, valid)

    def aggregate(self, joint_out: Tensor) -> Tensor:
        """(N M, K M) -> (N, K): for each copy the logits of its own transform, averaged."""
        M = self.num_transforms
        per_copy = joint_out.unflatten(1, (-1, M)).unflatten(0, (-1, M))  # (N, copy, K, transform)
        return per_copy.diagonal(dim1=1, dim2=3).mean(dim=2)


def rotations(images: Tensor) -> Tensor:
    """(N, C, H, H) -> (4 N, C, H, H): each image turned by 0, 90, 180, 270 degrees, sample-major."""
    if images.dim() != 4 or images.shape[2] != images.shape[3]:
        raise ValueError(
            f'rotations: images must be (N, C, H, H), square, got {tuple(images.shape)}: crop them'
        )
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
        upright = {name: [x[::4] for x in part] for name, part in f._asdict().items() if type(part) is list}
        extra = self.joint(f.feat)
        return f._replace(**upright | {'out': f.out[::4], 'feat': f.feat[::4], 'extra': extra})


def _expect(who: str, name: str, x: Tensor, *wanted: int | str) -> None:
    """Refuse another shape and say what to do. A letter is an axis of any length but 0, for K (classes) 1."""
    got = tuple(x.shape)
    right = [n > int(w == 'K') if isinstance(w, str) else n == w for n, w in zip(got, wanted)]
    if len(got) == len(wanted) and all(right) and 0 not in got:
        return
    if 0 in got:
        remedy = 'leave an empty batch out'
    elif len(got) == 2 and len(wanted) == 1:
        remedy = 'a number per row: x.flatten() of (N, 1) or (N, L), x.argmax(1) of one-hot labels'
    elif len(got) > len(wanted) and len(wanted) < 3:
        remedy = (
            'classes last, then flatten: x.movedim(1, -1).flatten(0, 2) for (N, K, H, W), x.flatten(0, 1) '
        )
        remedy += 'for (N, L, V), target.flatten()'
    elif len(wanted) == 4 and len(got) in (3, 5):
        remedy = 'x[..., None] makes a map of (N, C, L), x.flatten(3) one of (N, C, D, H, W)'
    elif len(got) != len(wanted):
        remedy = 'unsqueeze or flatten axes'
    elif not right[0]:
        remedy = 'all arguments need the samples of one batch (drop_last=True if the last one is smaller)'
    elif got[1] == 1 and 'K' in wanted:
        remedy = 'a sigmoid network has two classes, torch.cat([torch.zeros_like(z), z], 1)'
    elif not right[1]:
        remedy = 'give channels, widths or classes as the loss was built for, or as the other side has them'
    else:
        remedy = 'bring maps to one size, F.adaptive_avg_pool2d'
    shape = ', '.join(map(str, wanted)) + ',' * (len(wanted) == 1)
    raise ValueError(f'{who}: {name} must be ({shape}), got {got}: {remedy}')


def _labels(who: str, target: Tensor, n: int, K: int, name: str = 'target') -> tuple[Tensor, Tensor | None]:
    """n labels of 0..K-1 as int64, and which rows count, None for all: not those of -100, which are 0 then.

    Other labels are refused, but on a GPU, where looking at them would wait, only by the kernels.
    """
    _expect(who, name, target, n)
    if target.is_floating_point():
        raise ValueError(f'{who}: {name} must be ({n},) of integers, got {target.dtype}: {name}.long()')
    target, compiling = target.long(), getattr(torch.compiler, 'is_compiling', bool)()
    if not compiling and target.is_inference():  # what a teacher says under inference_mode: for backward
        target = target.clone()
    if target.device.type == 'cpu' and not compiling:
        (lowest,), (highest,) = (y.tolist() for y in target.aminmax(dim=0, keepdim=True))
        if lowest >= 0 and highest < K:
            return target, None
        for y in target.tolist():
            if y != -100 and not 0 <= y < K:
                raise ValueError(f'{who}: {name} must be in 0..{K - 1}, or -100 to leave a row out, got {y}')
    valid = target != -100
    return torch.where(valid, target, 0), valid


def _mean(rows: Tensor, valid: Tensor | None) -> Tensor:
    """Over the rows (N, ...) that count; 0 if none does."""
    if valid is None:
        return rows.mean(dim=0)
    counts = valid.reshape(-1, *[1] * (rows.dim() - 1))
    return torch.where(counts, rows, 0.0).sum(dim=0) / valid.sum().clamp(min=1)


def _full(x: Tensor, like: Tensor | None = None) -> Tensor:
    """In float32, or float64 if the student (like) is. Inference tensors are copied, to serve backward."""
    x = x.double() if (x if like is None else like).dtype == torch.float64 else x.float()
    compiling = getattr(torch.compiler, 'is_compiling', bool)()  # torch 2.2 cannot tell: False
    return x.clone() if not compiling and x.is_inference() else x


# ------------------------------------------ how the training scripts use it; a copied file may drop this


def feed(kd, s, t, batch):
    return kd(s.extra, s.out, batch.target)


def student(net, kd, probe):
    if kd.num_transforms != 4:
        raise ValueError(
            f'SLA: num_transforms must be 4, of a student that turns images, got {kd.num_transforms}'
        )
    return SLAStudent(net, probe.s.feat.shape[1], probe.num_classes)
