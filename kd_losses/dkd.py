"""DKD, decoupled knowledge distillation: weigh "how sure" and "what else it could be" separately.

B. Zhao, Q. Cui, R. Song, Y. Qiu, J. Liang, "Decoupled Knowledge Distillation", CVPR 2022, arXiv:2203.08679.

    p = softmax(out / T), y = target
    TCKD = T^2 mean over n of KL between (p_y, 1 - p_y) of teacher and student
    NCKD = T^2 mean over n of KL between the softmax over the other K - 1 classes of teacher and student
    loss = alpha TCKD + beta NCKD

Per sample, plain soft targets are TCKD + (1 - p_t[y]) NCKD: a confident teacher hides NCKD.

Tap: the logits, and the labels. The authors raise the loss's weight linearly over the first 20 of 240 epochs;
our trainer does the same, scaled to the run. Replaces soft targets.

Differences: the authors' code takes the logarithm of summed probabilities and gives inf and NaN for a
confident student; here every logarithm is a logsumexp, equal to theirs to rounding and finite for any logits.
"""

import torch
from torch import Tensor, nn


class DKD(nn.Module):
    """Target-class and non-target-class divergence with weights of their own.

    Args:
        alpha: weight of the target-class term, 1.
        beta: weight of the non-target term; authors' CIFAR-100: 8 in general, 2 (resnet56 to resnet20,
            resnet110 to resnet32), 6 (vgg13, wrn_40_2 pairs); ImageNet 0.5 (ResNet34 to 18), 2 (ResNet50 to
            MobileNet).
        T: temperature, > 0; 4 on CIFAR, 1 on ImageNet.

    Shape:
        out_s, out_t: (N, K), equal, K >= 2 (with K = 2 the second term is 0); target: (N,) int64.
        Returns a scalar. No gradient reaches out_t. `terms` returns (TCKD, NCKD) without alpha and beta.

    Raises:
        ValueError: T is not positive; shapes differ; K < 2; target is not (N,) of integers.
    """

    def __init__(self, alpha: float = 1.0, beta: float = 8.0, T: float = 4.0) -> None:
        super().__init__()
        if not T > 0:
            raise ValueError(f'DKD: T must be > 0, got {T}')
        self.alpha, self.beta, self.T = alpha, beta, T

    def forward(self, out_s: Tensor, out_t: Tensor, target: Tensor) -> Tensor:
        tckd, nckd = self.terms(out_s, out_t, target)
        return self.alpha * tckd + self.beta * nckd

    def terms(self, out_s: Tensor, out_t: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        if out_s.dim() != 2 or out_s.shape[1] < 2:
            raise ValueError(f'DKD: out_s must be (N, K) with K >= 2, got {tuple(out_s.shape)}')
        if out_t.shape != out_s.shape:
            raise ValueError(f'DKD: out_t must be {tuple(out_s.shape)} as out_s, got {tuple(out_t.shape)}')
        if target.shape != out_s.shape[:1] or target.is_floating_point():
            raise ValueError(
                f'DKD: target must be ({len(out_s)},) of integers, '
                f'got {tuple(target.shape)} of {target.dtype}'
            )
        is_y = target[:, None] == torch.arange(out_s.shape[1], device=out_s.device)
        y_s, rest_s, other_s = _log_probabilities(_full(out_s) / self.T, is_y)
        y_t, rest_t, other_t = _log_probabilities(_full(out_t.detach()) / self.T, is_y)
        tckd = _kl(y_t, y_s).mean() + _kl(rest_t, rest_s).mean()
        nckd = _kl(other_t, other_s).sum(dim=1).mean()
        return tckd * self.T**2, nckd * self.T**2


def _log_probabilities(z: Tensor, is_y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """log p_y (N,), log(1 - p_y) (N,), and the log-softmax over the other classes (N, K), -inf at y."""
    others = z.masked_fill(is_y, -torch.inf)
    rest = others.logsumexp(dim=1)
    z_y = torch.where(is_y, z, 0.0).sum(dim=1)
    total = torch.logaddexp(z_y, rest)
    return z_y - total, rest - total, others - rest[:, None]


def _kl(log_p_t: Tensor, log_p_s: Tensor) -> Tensor:
    """p_t (log p_t - log p_s), and 0 where p_t is 0 whatever the logarithms are."""
    p_t = log_p_t.exp()
    return torch.where(p_t > 0, p_t * (log_p_t - log_p_s), 0.0)


def _full(x: Tensor) -> Tensor:
    """Half precision to float32; float64 stays."""
    return x if x.dtype == torch.float64 else x.float()
