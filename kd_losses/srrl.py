"""SRRL, softmax regression representation learning: features that the teacher's own classifier can read.

J. Yang, B. Martinez, A. Bulat, G. Tzimiropoulos, "Knowledge Distillation via Softmax Regression
Representation Learning", ICLR 2021.

    f = ReLU of a batch norm of a 1x1 convolution of fm_s (the connector, trained with the student)
    FM = mean over n, c of (pooled f - pooled fm_t)^2
    SR = mean over n, k of (classifier(pooled f) - out_t)^2, classifier = the teacher's last layer, frozen
    loss = FM + sr_weight * SR

Tap: the last stage's maps, the teacher's logits and its classifier. Channels differ through the connector,
sizes are pooled away. The gradient passes through the classifier to the student.

Differences: the authors' code. The copies in SimKD and CTKD pool before the connector, which is another
function.

Source: jingyang2017/KD_SRRL, distiller_zoo/AIN.py (transfer_conv, statm_loss) and
train_imagenet_distillation.py.

Use:
    >>> import torch
    >>> from srrl import SRRL
    >>> fm_s, fm_t = torch.randn(8, 16, 8, 8, requires_grad=True), torch.randn(8, 32, 8, 8)
    >>> classifier = torch.nn.Linear(32, 10)
    >>> SRRL(16, 32)(fm_s, fm_t, classifier(fm_t.mean(dim=(2, 3))), classifier).backward()
    >>> fm_s.grad.norm() > 0
    tensor(True)
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SRRL(nn.Module):
    """Squared errors of pooled features and of the logits the teacher's classifier makes of them.

    Args:
        s_channels, t_channels: channels of the two maps.
        sr_weight: weight of the logit term; 1.

    Shape:
        fm_s: (N, s_channels, H_s, W_s), fm_t: (N, t_channels, H_t, W_t), out_t: (N, K); classifier: the
        teacher's last nn.Linear or a pair (weight (K, t_channels), bias (K,) or None). Returns a scalar. No
        gradient reaches fm_t, out_t or the classifier's parameters. `terms` returns (FM, SR).
        Computed in float32, or in float64 as the student.

    Raises:
        ValueError: a map is not 4-D or has other channels than announced; the batch sizes differ; out_t is
            not what the classifier gives.
    """

    def __init__(self, s_channels: int, t_channels: int, sr_weight: float = 1.0) -> None:
        super().__init__()
        self.s_channels, self.t_channels, self.sr_weight = s_channels, t_channels, sr_weight
        self.connector = nn.Sequential(
            nn.Conv2d(s_channels, t_channels, kernel_size=1, bias=False),
            nn.BatchNorm2d(t_channels),
            nn.ReLU(),
        )
        nn.init.kaiming_normal_(self.connector[0].weight, mode='fan_out', nonlinearity='relu')

    def forward(self, fm_s: Tensor, fm_t: Tensor, out_t: Tensor, classifier) -> Tensor:
        feature, logit = self.terms(fm_s, fm_t, out_t, classifier)
        return feature + self.sr_weight * logit

    def terms(self, fm_s: Tensor, fm_t: Tensor, out_t: Tensor, classifier) -> tuple[Tensor, Tensor]:
        _expect('SRRL', 'fm_s', fm_s, 'N', self.s_channels, 'H', 'W')
        _expect('SRRL', 'fm_t', fm_t, len(fm_s), self.t_channels, 'H', 'W')
        weight, bias = _affine('SRRL', 'classifier', classifier)
        _expect('SRRL', 'classifier.weight', weight, 'V', self.t_channels)
        _expect('SRRL', 'out_t', out_t, len(fm_s), len(weight))
        with _no_autocast(fm_s):
            pooled = _run(self.connector, _full(fm_s)).mean(dim=(2, 3))
            weight, bias = (None if x is None else _full(x.detach(), fm_s) for x in (weight, bias))
            feature = F.mse_loss(pooled, _full(fm_t.detach(), fm_s).mean(dim=(2, 3)))
            return feature, F.mse_loss(F.linear(pooled, weight, bias), _full(out_t.detach(), fm_s))


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
    """The student's map through the teacher's classifier."""
    return kd(s.pres[-1].relu(), t.pres[-1].relu(), t.out, batch.net_t.classifier_layer())


def build(loss, probe, **options):
    t = probe.t
    fm_t = t.pres[-1].relu()  # stored answers say here that they have no maps
    layer = probe.net_t.classifier_layer()
    fits = layer.weight.shape[1:] == fm_t.shape[1:2]
    if not fits or not _close(F.linear(fm_t.mean(dim=(2, 3)), layer.weight, layer.bias), t.out):
        raise ValueError(
            'SRRL: the teacher must end in ReLU, average over positions and classifier, or its classifier '
            'does not read its last map: take a resnet, wrn or vgg'
        )
    return loss(probe.s.fms[-1].shape[1], fm_t.shape[1], **options)


def _close(out: Tensor, wanted: Tensor) -> bool:
    """As far as bfloat16 goes; logits of a head that is all zero say nothing."""
    most = 0.05 * float(wanted.detach().abs().max())
    return most > 0 and torch.allclose(out.float(), wanted.float(), rtol=0, atol=most)
