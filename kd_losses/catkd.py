"""CAT-KD, class attention transfer: match, per class, where in the image its evidence lies.

Z. Guo, H. Yan, H. Li, X. Lin, "Class Attention Transfer Based Knowledge Distillation", CVPR 2023,
arXiv:2304.12777.

    cam[n, k, h, w] = sum over c of weight[k, c] fm[n, c, h, w]       classifier's weight on the unpooled map
    A = cam average-pooled to resolution x resolution;  normalize: A / its length, per sample and class
    loss = mean over n, k and positions of (A_s - A_t)^2

Tap: class activation maps, `to_cam(fm, weight)` of the last map before it is pooled. The student's classifier
has no bias, so that its logits are exactly the averages of its maps; the teacher's bias is dropped.

Differences: the authors' loss; the analysis options (binary maps, chosen classes) are left out. An all-zero
map is 0 with zero gradient. normalize=False with small weights is theirs for alike pairs (resnet56 to 20:
0.7), True with large ones for unlike pairs (resnet32x4 to ShuffleV1: 600).
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

    Raises:
        ValueError: resolution < 1; a map is not 4-D; batch or classes differ.
    """

    def __init__(self, resolution: int = 2, normalize: bool = True) -> None:
        super().__init__()
        if resolution < 1:
            raise ValueError(f'CATKD: resolution must be at least 1, got {resolution}')
        self.resolution, self.normalize = resolution, normalize

    def forward(self, cam_s: Tensor, cam_t: Tensor) -> Tensor:
        if cam_s.dim() != 4:
            raise ValueError(f'CATKD: cam_s must be (N, K, H, W), got {tuple(cam_s.shape)}')
        if cam_t.dim() != 4 or cam_t.shape[:2] != cam_s.shape[:2]:
            raise ValueError(
                f'CATKD: cam_t must be ({cam_s.shape[0]}, {cam_s.shape[1]}, H, W) as cam_s, '
                f'got {tuple(cam_t.shape)}'
            )
        return F.mse_loss(self._attention(_full(cam_s)), self._attention(_full(cam_t.detach())))

    def _attention(self, cam: Tensor) -> Tensor:
        a = F.adaptive_avg_pool2d(cam, self.resolution).flatten(2)
        return _unit(a) if self.normalize else a


def to_cam(fm: Tensor, fc_weight: Tensor) -> Tensor:
    """Map (N, C, H, W) and classifier weight (K, C) -> class activation maps (N, K, H, W)."""
    if fm.dim() != 4 or fc_weight.dim() != 2 or fc_weight.shape[1] != fm.shape[1]:
        shapes = f'{tuple(fm.shape)} and {tuple(fc_weight.shape)}'
        raise ValueError(f'to_cam: fm and fc_weight must be (N, C, H, W) and (K, C), got {shapes}')
    with torch.autocast(fm.device.type, enabled=False):
        return F.conv2d(_full(fm), fc_weight.to(_full(fm).dtype)[:, :, None, None])


def _unit(x: Tensor) -> Tensor:
    """Rows divided by their length; a zero row stays zero and gets no gradient."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    alive = norm > 1e-12
    return torch.where(alive, x / torch.where(alive, norm, 1.0), 0.0)


def _full(x: Tensor) -> Tensor:
    """Half precision to float32; float64 stays."""
    return x if x.dtype == torch.float64 else x.float()


# ------------------------------------------ how the training scripts use it; a copied file may drop this


def feed(kd, s, t, batch):
    """Maps as they are averaged for the classifier: the activation of the last map before it."""
    sides = ((s, batch.net_s), (t, batch.net_t))
    return kd(*(to_cam(f.pres[-1].relu(), net.classifier_layer().weight) for f, net in sides))


def build(loss, probe, **options):
    return loss(**{'normalize': False, **options})  # the authors', for networks of one kind


def student(net, kd, probe):
    """The classifier's bias is held at 0, so that logits are averages of class activation maps."""
    bias = net.classifier_layer().bias
    with torch.no_grad():
        bias.zero_()
    bias.requires_grad_(False)
    return net
