"""SimKD: give the student the teacher's own classifier, and train its features to fit it.

D. Chen, J.-P. Mei, H. Zhang, C. Wang, Y. Feng, C. Chen, "Knowledge Distillation with the Reused Teacher
Classifier", CVPR 2022, arXiv:2203.14001.

    the student's map is average-pooled to the teacher's size if it is larger, else the teacher's to its size
    f = projector(fm_s): 1x1 to C_t / factor channels, 3x3, 1x1 to C_t, each with batch norm and ReLU
    loss = mean over n, c, h, w of (f - fm_t)^2
    logits, in use:  teacher's classifier(average of f over positions)              (`predict`)

Tap: the last stage's maps after their ReLU, just before they are pooled for the classifier. There is no
cross-entropy and no label; the student's own classifier is not used.

Differences: the authors' code, with heights and widths of their own; the teacher's map size is remembered, so
that using the student does not need a teacher forward pass.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SimKD(nn.Module):
    """Squared error between the projected student map and the teacher's map.

    Args:
        s_channels, t_channels: channels of the two maps.
        factor: the projector's inner width is t_channels // factor; 2.

    Shape:
        fm_s: (N, s_channels, H_s, W_s), fm_t: (N, t_channels, H_t, W_t). Returns a scalar. No gradient
        reaches fm_t. `predict(fm_s, classifier)` returns logits (N, K); classifier: the teacher's last layer,
        a module or a pair (weight (K, t_channels), bias (K,)).

    Raises:
        ValueError: factor leaves no channel; a map is not 4-D or has other channels than announced; the batch
            sizes differ.
    """

    def __init__(self, s_channels: int, t_channels: int, factor: int = 2) -> None:
        super().__init__()
        mid = t_channels // factor
        if mid < 1:
            raise ValueError(f'SimKD: factor must be at most t_channels = {t_channels}, got {factor}')
        self.s_channels, self.t_channels = s_channels, t_channels
        self.projector = nn.Sequential(
            *(nn.Conv2d(s_channels, mid, 1, bias=False), nn.BatchNorm2d(mid), nn.ReLU()),
            *(nn.Conv2d(mid, mid, 3, padding=1, bias=False), nn.BatchNorm2d(mid), nn.ReLU()),
            *(nn.Conv2d(mid, t_channels, 1, bias=False), nn.BatchNorm2d(t_channels), nn.ReLU()),
        )
        self.register_buffer('size', torch.zeros(2, dtype=torch.int64))  # of the teacher's map; 0 0: unknown

    def forward(self, fm_s: Tensor, fm_t: Tensor) -> Tensor:
        if fm_t.dim() != 4 or fm_t.shape[:2] != (len(fm_s), self.t_channels):
            raise ValueError(
                f'SimKD: fm_t must be ({len(fm_s)}, {self.t_channels}, H, W) as fm_s and t_channels say, '
                f'got {tuple(fm_t.shape)}'
            )
        for i, side in enumerate(fm_t.shape[2:]):
            self.size[i].fill_(side)  # a tensor copied from the host would wait on a GPU
        return self.distance(self.project(fm_s, tuple(fm_t.shape[2:])), fm_t)

    def project(self, fm_s: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """(N, s_channels, H_s, W_s) -> (N, t_channels, H, W); size: of the teacher's map."""
        if fm_s.dim() != 4 or fm_s.shape[1] != self.s_channels:
            raise ValueError(f'SimKD: fm_s must be (N, {self.s_channels}, H, W), got {tuple(fm_s.shape)}')
        with torch.autocast(fm_s.device.type, enabled=False):
            fm_s = _full(fm_s)
            if size is not None and fm_s.shape[2] > size[0]:
                fm_s = F.adaptive_avg_pool2d(fm_s, size)
            return self.projector(fm_s)

    def distance(self, projected: Tensor, fm_t: Tensor) -> Tensor:
        """Mean squared difference; the teacher's map is pooled to the projected one's size."""
        if fm_t.dim() != 4 or fm_t.shape[:2] != projected.shape[:2]:
            raise ValueError(
                f'SimKD: fm_t must be {tuple(projected.shape[:2])} and a size, as the projected map, '
                f'got {tuple(fm_t.shape)}'
            )
        fm_t, size = _full(fm_t.detach()), projected.shape[2:]
        return F.mse_loss(projected, fm_t if fm_t.shape[2:] == size else F.adaptive_avg_pool2d(fm_t, size))

    def predict(self, fm_s: Tensor, classifier, size: tuple[int, int] | None = None) -> Tensor:
        """Logits of the student with the teacher's classifier; size: of the teacher's map, default the last
        one seen."""
        if size is None:
            size = tuple(self.size.tolist()) if int(self.size[0]) else None
        pooled = self.project(fm_s, size).mean(dim=(2, 3))
        weight, bias = (
            classifier if isinstance(classifier, (tuple, list)) else (classifier.weight, classifier.bias)
        )
        return F.linear(pooled, weight.to(pooled.dtype), None if bias is None else bias.to(pooled.dtype))


class SimKDStudent(nn.Module):
    """The student in use: its network up to the last map, the projector, the teacher's classifier.

    Args:
        net: `net(x, True)` gives (out, feat, fms, pres, extra).
        loss: the SimKD whose projector it shares.
        classifier: the teacher's last layer; its weights are kept here, frozen.
        size: (height, width) of the teacher's map.

    Shape:
        x: (N, 3, H, W). Returns logits; with True the network's tuple, the projected map as its `extra`.
    """

    def __init__(self, net: nn.Module, loss: SimKD, classifier: nn.Linear, size: tuple[int, int]) -> None:
        super().__init__()
        if classifier.in_features != loss.t_channels:
            raise ValueError(
                f"SimKD: the teacher's classifier must take the {loss.t_channels} channels of its last map, "
                f'got {classifier.in_features}'
            )
        self.net, self.loss = net, loss
        loss.size.copy_(torch.tensor(size))
        self.size = tuple(size)
        self.classifier = nn.Linear(classifier.in_features, classifier.out_features)
        self.classifier.load_state_dict(classifier.state_dict())
        self.classifier.requires_grad_(False)

    def forward(self, x: Tensor, feats: bool = False):
        f = self.net(x, True)
        projected = self.loss.project(f.pres[-1].relu(), self.size)
        feat = projected.mean(dim=(2, 3))
        out = self.classifier(feat)
        return f._replace(out=out, feat=feat, extra=projected) if feats else out


def _full(x: Tensor) -> Tensor:
    """Half precision to float32; float64 stays."""
    return x if x.dtype == torch.float64 else x.float()


# ------------------------------------------ how the training scripts use it; a copied file may drop this


def feed(kd, s, t, batch):
    return kd.distance(s.extra, t.pres[-1].relu())


def student(net, kd, probe):
    """The student's body, the projector, and the teacher's classifier."""
    return SimKDStudent(net, kd, probe.net_t.classifier_layer(), probe.t.fms[-1].shape[2:])
