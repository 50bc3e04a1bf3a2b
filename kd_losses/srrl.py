"""SRRL, softmax regression representation learning: features that the teacher's own classifier can read.

J. Yang, B. Martinez, A. Bulat, G. Tzimiropoulos, "Knowledge Distillation via Softmax Regression
Representation Learning", ICLR 2021.

    f = ReLU of a batch norm of a 1x1 convolution of fm_s (the connector, trained with the student)
    FM = mean over n, c of (pooled f - pooled fm_t)^2
    SR = mean over n, k of (classifier(pooled f) - out_t)^2, classifier = the teacher's last layer, frozen
    loss = FM + sr_weight SR

Tap: the last stage's maps, the teacher's logits and its classifier. Channels differ through the connector,
sizes are pooled away. The gradient passes through the classifier to the student.

Differences: the authors' code. The copies in SimKD and CTKD pool before the connector, another function.
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
        fm_s: (N, s_channels, H_s, W_s), fm_t: (N, t_channels, H_t, W_t), out_t: (N, K); classifier: a module
        from (N, t_channels) to (N, K) or a pair (weight (K, t_channels), bias (K,)). Returns a scalar. No
        gradient reaches fm_t, out_t or the classifier's parameters. `terms` returns (FM, SR).

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
        if fm_s.dim() != 4 or fm_s.shape[1] != self.s_channels:
            raise ValueError(f'SRRL: fm_s must be (N, {self.s_channels}, H, W), got {tuple(fm_s.shape)}')
        if fm_t.dim() != 4 or fm_t.shape[:2] != (len(fm_s), self.t_channels):
            raise ValueError(
                f'SRRL: fm_t must be ({len(fm_s)}, {self.t_channels}, H, W) as fm_s and t_channels say, '
                f'got {tuple(fm_t.shape)}'
            )
        weight, bias = (
            classifier if isinstance(classifier, (tuple, list)) else (classifier.weight, classifier.bias)
        )
        if out_t.shape != (len(fm_s), len(weight)):
            raise ValueError(f'SRRL: out_t must be {(len(fm_s), len(weight))}, got {tuple(out_t.shape)}')
        with torch.autocast(fm_s.device.type, enabled=False):
            pooled = self.connector(_full(fm_s)).mean(dim=(2, 3))
            bias = None if bias is None else _full(bias.detach())
            feature = F.mse_loss(pooled, _full(fm_t.detach()).mean(dim=(2, 3)))
            return feature, F.mse_loss(F.linear(pooled, _full(weight.detach()), bias), _full(out_t.detach()))


def _full(x: Tensor) -> Tensor:
    """Half precision to float32; float64 stays."""
    return x if x.dtype == torch.float64 else x.float()


# ------------------------------------------ how the training scripts use it; a copied file may drop this


def feed(kd, s, t, batch):
    """The student's map through the teacher's classifier."""
    return kd(s.pres[-1].relu(), t.pres[-1].relu(), t.out, batch.net_t.classifier_layer())
