"""CAT-KD, class attention transfer: match, per class, where in the image its evidence lies.

Z. Guo, H. Yan, H. Li, X. Lin, "Class Attention Transfer Based Knowledge Distillation", CVPR 2023,
arXiv:2304.12777.

    cam[n, k, h, w] = sum over c of weight[k, c] * fm[n, c, h, w]     classifier's weight on the unpooled map
    A = cam average-pooled to resolution x resolution;  normalize: A / its length, per sample and class
    loss = mean over n, k and positions of (A_s - A_t)^2

Tap: class activation maps, `to_cam(fm, weight)` of the last map before it is pooled. The student's classifier
has no bias, so that its logits are exactly the averages of its maps; the teacher's bias is dropped.

Differences: the authors' loss; the analysis options (binary maps, chosen classes) are left out. An all-zero
map is 0 with zero gradient. The authors use normalize=False with small weights for alike pairs (resnet56 to
resnet20: 0.7) and True with large weights for unlike pairs (resnet32x4 to ShuffleV1: 600).

Source: GzyAftermath/CAT-KD, mdistiller/distillers/CAT_KD.py (CAT_loss).

Use:
    >>> import torch
    >>> from catkd import CATKD
    >>> cam_s, cam_t = torch.randn(8, 10, 8, 8, requires_grad=True), torch.randn(8, 10, 4, 4)
    >>> CATKD()(cam_s, cam_t).backward()
    >>> cam_s.grad.norm() > 0
    tensor(True)
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class CATKD(nn.Module):
    """Mean squared difference of pooled, normalised class activation maps.

    Args:
        resolution: side of the pooled maps; 2 (4 for ShuffleNet students).
        normalize: divide every map by its length; True.

    Shape:
        cam_s: (N, K, H_s, W_s), cam_t: (N, K, H_t, W_t). Returns a scalar. No gradient reaches cam_t.
        Computed in float32, or in float64 as the student.

    Raises:
        ValueError: resolution < 1; a map is not 4-D; batch or classes differ.
    """

    def __init__(self, resolution: int = 2, normalize: bool = True) -> None:
        super().__init__()
        if resolution < 1:
            raise ValueError(f'CATKD: resolution must be at least 1, got {resolution}')
        self.resolution, self.normalize = resolution, normalize

    def forward(self, cam_s: Tensor, cam_t: Tensor) -> Tensor:
        _expect('CATKD', 'cam_s', cam_s, 'N', 'C', 'H', 'W')  # one class is legal: nothing is a softmax
        _expect('CATKD', 'cam_t', cam_t, *cam_s.shape[:2], 'H', 'W')
        return F.mse_loss(self._attention(_full(cam_s)), self._attention(_full(cam_t.detach(), cam_s)))

    def _attention(self, cam: Tensor) -> Tensor:
        a = F.adaptive_avg_pool2d(cam, self.resolution).flatten(2)
        return _unit(a) if self.normalize else a


def to_cam(fm: Tensor, fc_weight: Tensor) -> Tensor:
    """Map (N, C, H, W) and classifier weight (K, C) -> class activation maps (N, K, H, W)."""
    if fm.dim() != 4 or fc_weight.dim() != 2 or fc_weight.shape[1] != fm.shape[1]:
        shapes = f'{tuple(fm.shape)} and {tuple(fc_weight.shape)}'
        raise ValueError(f'to_cam: fm and fc_weight must be (N, C, H, W) and (K, C), got {shapes}')
    with _no_autocast(fm):
        return F.conv2d(_full(fm), fc_weight.to(_full(fm).dtype)[:, :, None, None])


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


def _no_autocast(x: Tensor) -> torch.autocast:
    """Matrix products and convolutions in the precision of their tensors; there is no autocast on meta."""
    return torch.autocast('cpu' if x.is_meta else x.device.type, enabled=False)


def _unit(x: Tensor) -> Tensor:
    """Rows divided by their length; a zero row stays zero and gets no gradient."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / norm.masked_fill(norm <= 1e-12, torch.inf)  # NaN is not: it must show in the loss


def _full(x: Tensor, like: Tensor | None = None) -> Tensor:
    """In float32, or float64 if the student (like) is. Inference tensors are copied, to serve backward."""
    x = x.double() if (x if like is None else like).dtype == torch.float64 else x.float()
    compiling = getattr(torch.compiler, 'is_compiling', bool)()  # torch 2.2 cannot tell: False
    return x.clone() if not compiling and x.is_inference() else x


# ------------------------------------------ how the training scripts use it; a copied file may drop this


def feed(kd, s, t, batch):
    """Maps as they are averaged for the classifier: the activation of the last map before it."""
    sides = ((s, batch.net_s), (t, batch.net_t))
    return kd(*(to_cam(f.pres[-1].relu(), net.classifier_layer().weight) for f, net in sides))


def build(loss, probe, **options):
    for who, f, net in (('student', probe.s, probe.net_s), ('teacher', probe.t, probe.net_t)):
        feat = f.pres[-1].relu().mean(dim=(2, 3))  # stored answers say here that they have no maps
        layer = net.classifier_layer()
        fits = layer.weight.shape[1:] == feat.shape[1:]
        if not fits or not _close(F.linear(feat, layer.weight, layer.bias), f.out):
            raise ValueError(
                f'CATKD: the {who} must end in ReLU, average over positions and classifier, or its class '
                f'activation maps say nothing of its logits: take a resnet, wrn or vgg'
            )
    return loss(**{'normalize': False, **options})  # the authors', for networks of one kind


def _close(out: Tensor, wanted: Tensor) -> bool:
    """As far as bfloat16 goes; logits of a head that is all zero say nothing."""
    most = 0.05 * float(wanted.detach().abs().max())
    return most > 0 and torch.allclose(out.float(), wanted.float(), rtol=0, atol=most)


def student(net, kd, probe):
    """The classifier's bias is held at 0, so that logits are averages of class activation maps."""
    bias = net.classifier_layer().bias
    if bias is not None:
        with torch.no_grad():
            bias.zero_()
        bias.requires_grad_(False)
    return net
