"""SimKD: give the student the teacher's own classifier, and train its features to fit it.

D. Chen, J.-P. Mei, H. Zhang, C. Wang, Y. Feng, C. Chen, "Knowledge Distillation with the Reused Teacher
Classifier", CVPR 2022, arXiv:2203.14001.

    the student's map is average-pooled to the teacher's size if it is larger, else the teacher's to its size
    f = projector(fm_s): 1x1 to C_t / factor channels, 3x3, 1x1 to C_t, each with batch norm and ReLU
    loss = mean over n, c, h, w of (f - fm_t)^2
    logits, in use:  teacher's classifier(average of f over positions)              (`predict`)

Tap: the last stage's maps after their ReLU, just before they are pooled for the classifier. There is no
cross-entropy and no label; the student's own classifier is not used.

Differences: the authors' code; height and width are compared and pooled separately, and the teacher's map
size is remembered, so that using the student does not need a teacher forward pass.

Source: DefangChen/SimKD, models/util.py (SimKD) and helper/loops.py.

Use:
    >>> import torch
    >>> from simkd import SimKD
    >>> fm_s, fm_t = torch.randn(8, 16, 8, 8, requires_grad=True), torch.randn(8, 32, 8, 8)
    >>> SimKD(16, 32)(fm_s, fm_t).backward()
    >>> fm_s.grad.norm() > 0
    tensor(True)
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
        Computed in float32, or in float64 as the student.

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
        self.sized = False  # has a step of a training, or a loaded state, said it?

    def forward(self, fm_s: Tensor, fm_t: Tensor) -> Tensor:
        _expect('SimKD', 'fm_s', fm_s, 'N', self.s_channels, 'H', 'W')
        _expect('SimKD', 'fm_t', fm_t, len(fm_s), self.t_channels, 'H', 'W')
        if self.training or not self.sized:  # another size in validation leaves what predict pools to
            self.sized = self.sized or self.training
            for i, side in enumerate(fm_t.shape[2:]):
                self.size[i].fill_(side)  # a tensor copied from the host would wait on a GPU
        return self.distance(self.project(fm_s, tuple(fm_t.shape[2:])), fm_t)

    def _load_from_state_dict(self, *args) -> None:
        super()._load_from_state_dict(*args)
        self.sized = True

    def project(self, fm_s: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """(N, s_channels, H_s, W_s) -> (N, t_channels, H, W); size: of the teacher's map."""
        _expect('SimKD', 'fm_s', fm_s, 'N', self.s_channels, 'H', 'W')
        with _no_autocast(fm_s):
            fm_s = _full(fm_s)
            size = fm_s.shape[2:] if size is None else tuple(map(min, fm_s.shape[2:], size))
            if fm_s.shape[2:] != size:
                fm_s = F.adaptive_avg_pool2d(fm_s, size)
            return _run(self.projector, fm_s)

    def distance(self, projected: Tensor, fm_t: Tensor) -> Tensor:
        """Mean squared difference; the teacher's map is pooled to the projected one's size."""
        _expect('SimKD', 'fm_t', fm_t, *projected.shape[:2], 'H', 'W')
        projected, fm_t = _full(projected), _full(fm_t.detach(), projected)
        size = projected.shape[2:]
        return F.mse_loss(projected, fm_t if fm_t.shape[2:] == size else F.adaptive_avg_pool2d(fm_t, size))

    def predict(self, fm_s: Tensor, classifier, size: tuple[int, int] | None = None) -> Tensor:
        """Logits of the student with the teacher's classifier; size: of the teacher's map, default the last
        one seen in training, for which a GPU waits."""
        if size is None:
            size = tuple(self.size.tolist()) if int(self.size[0]) else None
        pooled = self.project(fm_s, size).mean(dim=(2, 3))
        weight, bias = _affine('SimKD', 'classifier', classifier)
        _expect('SimKD', 'classifier.weight', weight, 'V', pooled.shape[1])
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
        bias = classifier.bias is not None
        self.classifier = nn.Linear(classifier.in_features, classifier.out_features, bias)
        self.classifier.load_state_dict(classifier.state_dict())
        self.classifier.requires_grad_(False)

    def forward(self, x: Tensor, feats: bool = False):
        f = self.net(x, True)
        projected = self.loss.project(f.pres[-1].relu(), self.size)
        feat = projected.mean(dim=(2, 3))
        out = self.classifier(feat)
        return f._replace(out=out, feat=feat, extra=projected) if feats else out


def _affine(who: str, name: str, layer) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a linear layer, or of the pair (weight, bias)."""
    if isinstance(layer, (tuple, list)):
        return layer
    if getattr(getattr(layer, 'weight', None), 'ndim', 0) != 2:
        kind = type(layer).__name__
        raise ValueError(
            f'{who}: {name} must be a Linear or (weight, bias), got {kind}: give the last Linear'
        )
    return layer.weight, layer.bias


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


def _run(module: nn.Module, x: Tensor, *more):
    """module(x, ...) in the precision of x, whatever half() or double() has made of the parameters."""
    if all(p.dtype == x.dtype for p in module.parameters()):
        return module(x, *more)
    state = {name: _full(p, x) for name, p in module.named_parameters()}
    state |= {name: _full(b, x) if b.is_floating_point() else b for name, b in module.named_buffers()}
    y = torch.func.functional_call(module, state, (x, *more))
    with torch.no_grad():
        for name, b in module.named_buffers():  # running statistics
            if b is not state[name]:  # a copy onto itself is a change, which backward would refuse
                b.copy_(state[name])
    return y


def _no_autocast(x: Tensor) -> torch.autocast:
    """Matrix products and convolutions in the precision of their tensors; there is no autocast on meta."""
    return torch.autocast('cpu' if x.is_meta else x.device.type, enabled=False)


def _full(x: Tensor, like: Tensor | None = None) -> Tensor:
    """In float32, or float64 if the student (like) is. Inference tensors are copied, to serve backward."""
    x = x.double() if (x if like is None else like).dtype == torch.float64 else x.float()
    compiling = getattr(torch.compiler, 'is_compiling', bool)()  # torch 2.2 cannot tell: False
    return x.clone() if not compiling and x.is_inference() else x


# ------------------------------------------ how the training scripts use it; a copied file may drop this


def feed(kd, s, t, batch):
    return kd.distance(s.extra, t.pres[-1].relu())


def student(net, kd, probe):
    """The student's body, the projector, and the teacher's classifier."""
    t, layer = probe.t, probe.net_t.classifier_layer()
    fm_t = t.pres[-1].relu()
    fits = layer.weight.shape[1:] == fm_t.shape[1:2]
    if fits and not _close(F.linear(fm_t.mean(dim=(2, 3)), layer.weight, layer.bias), t.out):
        raise ValueError(
            'SimKD: the teacher must end in ReLU, average over positions and classifier, or its classifier '
            'does not read its last map: take a resnet, wrn or vgg'
        )
    return SimKDStudent(net, kd, layer, fm_t.shape[2:])


def _close(out: Tensor, wanted: Tensor) -> bool:
    """As far as bfloat16 goes; logits of a head that is all zero say nothing."""
    most = 0.05 * float(wanted.detach().abs().max())
    return most > 0 and torch.allclose(out.float(), wanted.float(), rtol=0, atol=most)
