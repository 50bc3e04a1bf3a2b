"""USKD, universal self-knowledge distillation: soft labels from the student itself, without a teacher.

Z. Yang, A. Zeng, Z. Li, T. Zhang, C. Yuan, Y. Li, "From Knowledge Distillation to Self-Knowledge
Distillation: A Unified Approach with Normalized Loss and Customized Soft Labels", ICCV 2023,
arXiv:2303.13005.

    p = softmax(out_s),  w = softmax(fc(feat_mid)) (the weak head, trained with the student),  y = target
    target term:      P_n = p_n[y]^2 + 1 - mean over the batch of p[y]^2;   - mean over n of P_n log p_n[y]
    non-target term:  classes ranked by R = w / (1 - w[y]) + p / (1 - p[y]); z = 1 / rank without y, to sum 1;
                      - mean over n of sum over k != y of z_k log softmax over the K - 1 others of out_s
    weak term:        cross-entropy of fc(feat_mid) with the label smoothed by 0.1
    loss = alpha target + beta non-target + mu weak                 (P, z and the ranking carry no gradient)

Tap: the globally pooled map of the last stage but one, the logits, and the labels. Added to cross-entropy.

Differences: the ranking uses probabilities, as in the paper; the authors' code ranks by log-probabilities by
accident (rank_on='logprob'). Integer labels only.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class USKD(nn.Module):
    """Self-made target and non-target soft labels, and a weak classifier on an earlier stage.

    Args:
        mid_dim: width of feat_mid.
        num_classes: K >= 2.
        alpha, beta, mu: weights of the three terms; 0.1, 0.1, 0.1 on CIFAR-100, 1, 0.1, 0.005 on ImageNet.
        rank_on: 'prob' or 'logprob', what the logits contribute to the ranking.

    Shape:
        feat_mid: (N, mid_dim), out_s: (N, K), target: (N,) int64. Returns a scalar. `terms` returns the three
        summands, weights included.

    Raises:
        ValueError: rank_on is neither; K < 2; shapes do not fit.
    """

    def __init__(
        self,
        mid_dim: int,
        num_classes: int,
        alpha: float = 0.1,
        beta: float = 0.1,
        mu: float = 0.1,
        rank_on: str = 'prob',
    ) -> None:
        super().__init__()
        if rank_on not in ('prob', 'logprob'):
            raise ValueError(f'USKD: rank_on must be "prob" or "logprob", got {rank_on!r}')
        if num_classes < 2:
            raise ValueError(f'USKD: num_classes must be at least 2, got {num_classes}')
        self.mid_dim, self.num_classes, self.rank_on = mid_dim, num_classes, rank_on
        self.alpha, self.beta, self.mu = alpha, beta, mu
        self.fc = nn.Linear(mid_dim, num_classes)

    def forward(self, feat_mid: Tensor, out_s: Tensor, target: Tensor) -> Tensor:
        return sum(self.terms(feat_mid, out_s, target))

    def terms(self, feat_mid: Tensor, out_s: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if feat_mid.dim() != 2 or feat_mid.shape[1] != self.mid_dim:
            raise ValueError(f'USKD: feat_mid must be (N, {self.mid_dim}), got {tuple(feat_mid.shape)}')
        if out_s.shape != (len(feat_mid), self.num_classes):
            raise ValueError(
                f'USKD: out_s must be ({len(feat_mid)}, {self.num_classes}), got {tuple(out_s.shape)}'
            )
        if target.shape != out_s.shape[:1] or target.is_floating_point():
            raise ValueError(
                f'USKD: target must be ({len(out_s)},) of integers, '
                f'got {tuple(target.shape)} of {target.dtype}'
            )
        with torch.autocast(out_s.device.type, enabled=False):
            out_s = _full(out_s)
            weak = self.fc(_full(feat_mid))
            log_p, is_y = F.log_softmax(out_s, dim=1), _is(target, out_s)
            log_p_y = log_p.gather(1, target[:, None])[:, 0]
            square = log_p_y.detach().exp().square()
            goal = square + 1 - square.mean()
            z = self._ranks(log_p.detach(), weak.detach(), target, is_y)
            log_others = F.log_softmax(out_s.masked_fill(is_y, -torch.inf), dim=1)
            return (
                -self.alpha * (goal * log_p_y).mean(),
                -self.beta * torch.where(is_y, 0.0, z * log_others).sum(dim=1).mean(),
                self.mu * F.cross_entropy(weak, target, label_smoothing=0.1),
            )

    def _ranks(self, log_p: Tensor, weak: Tensor, target: Tensor, is_y: Tensor) -> Tensor:
        """(N, K): one over each class's rank among all K, without the target, to sum 1."""
        w, u = weak.softmax(dim=1), log_p.exp() if self.rank_on == 'prob' else log_p
        score = sum(x / (1 - x.gather(1, target[:, None]) + 1e-6) for x in (w, u))
        order = score.argsort(dim=1, descending=True)
        zipf = 1 / torch.arange(1, score.shape[1] + 1, dtype=score.dtype, device=score.device)
        z = torch.zeros_like(score).scatter(1, order, zipf.expand_as(order)).masked_fill(is_y, 0.0)
        return z / z.sum(dim=1, keepdim=True)


def _is(target: Tensor, out: Tensor) -> Tensor:
    return target[:, None] == torch.arange(out.shape[1], device=out.device)


def _full(x: Tensor) -> Tensor:
    """Half precision to float32; float64 stays."""
    return x if x.dtype == torch.float64 else x.float()


# ------------------------------------------ how the training scripts use it; a copied file may drop this


def feed(kd, s, t, batch):
    return kd(s.fms[-2].mean(dim=(2, 3)), s.out, batch.target)


def build(loss, probe, **options):
    return loss(probe.s.fms[-2].shape[1], probe.num_classes, **options)
