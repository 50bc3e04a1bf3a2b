"""MLKD, multi-level logit distillation: match predictions per sample, between samples and between classes.

Y. Jin, J. Wang, D. Lin, "Multi-Level Logit Distillation", CVPR 2023.

    p = softmax(out_s / T), q = softmax(out_t / T), each (N, K)
    instance  T^2 mean over n of KL(q_n || p_n)
    batch     1/N ||q q^T - p p^T||^2                                            (N x N, between samples)
    class     1/K ||q^T q - p^T p||^2                                            (K x K, between classes)
    loss = sum over T in temps of instance + batch + class

Tap: the logits. The authors add 0.9 times this to 0.1 cross-entropy.

Differences: this is the paper's loss. two_view=True is what the released code optimises, which made the
published numbers: instance terms of the middle temperatures on a strongly augmented view, and instance and
batch terms multiplied by m, class terms by c, the shares of samples and classes whose confidence is at most
the median (meant as masks, applied after the mean).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MLKD(nn.Module):
    """Instance, batch and class terms at several temperatures.

    Args:
        temps: temperatures, > 0; 2, 3, 4, 5, 6.
        two_view: the released code's form, which also takes the logits of a strongly augmented view.
        logit_std: standardise the logits of the instance terms per sample (LSKD's setting; temps 2, 3, 5, 2,
        6).

    Shape:
        out_s, out_t, and with two_view out_s_strong, out_t_strong: (N, K), equal. Returns a scalar.
        No gradient reaches the teacher's. `terms` returns the instance, batch and class parts of the sum.

    Raises:
        ValueError: a temperature is not positive; the shapes differ or are not (N, K); two_view without
            strong views or the other way round.
    """

    def __init__(
        self, temps: tuple = (2.0, 3.0, 4.0, 5.0, 6.0), two_view: bool = False, logit_std: bool = False
    ) -> None:
        super().__init__()
        if not temps or not all(T > 0 for T in temps):
            raise ValueError(f'MLKD: temps must be temperatures > 0, got {temps}')
        self.temps, self.two_view, self.logit_std = sorted(temps), two_view, logit_std

    def forward(
        self,
        out_s: Tensor,
        out_t: Tensor,
        out_s_strong: Tensor | None = None,
        out_t_strong: Tensor | None = None,
    ) -> Tensor:
        return sum(self.terms(out_s, out_t, out_s_strong, out_t_strong))

    def terms(
        self,
        out_s: Tensor,
        out_t: Tensor,
        out_s_strong: Tensor | None = None,
        out_t_strong: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        if out_s.dim() != 2:
            raise ValueError(f'MLKD: out_s must be (N, K), got {tuple(out_s.shape)}')
        strong = {'out_s_strong': out_s_strong, 'out_t_strong': out_t_strong} if self.two_view else {}
        for name, out in {'out_t': out_t, **strong}.items():
            if out is None or out.shape != out_s.shape:
                got = None if out is None else tuple(out.shape)
                raise ValueError(f'MLKD: {name} must be {tuple(out_s.shape)} as out_s, got {got}')
        if not self.two_view and (out_s_strong is not None or out_t_strong is not None):
            raise ValueError('MLKD: out_s_strong and out_t_strong are for two_view=True, got two_view=False')

        s, t = _full(out_s), _full(out_t.detach())
        with torch.autocast(s.device.type, enabled=False):
            batch, class_ = self._grams(s, t)
            if not self.two_view:
                return sum(self._instance(s, t, T) for T in self.temps), batch, class_
            q = F.softmax(t, dim=1)
            m, c = _share_below_median(q.amax(dim=1)), _share_below_median(q.sum(dim=0))
            instance = m * sum(self._instance(s, t, T) for T in self.temps)
            instance = instance + sum(self._instance(s, t, T) for T in (self.temps[0], self.temps[-1]))
            s, t = _full(out_s_strong), _full(out_t_strong.detach())
            return instance + sum(self._instance(s, t, T) for T in self.temps[1:-1]), m * batch, c * class_

    def _instance(self, s: Tensor, t: Tensor, T: float) -> Tensor:
        if self.logit_std:
            s, t = _standardize(s), _standardize(t)
        log_p, log_q = F.log_softmax(s / T, dim=1), F.log_softmax(t / T, dim=1)
        q = log_q.exp()
        return torch.where(q > 0, q * (log_q - log_p), 0.0).sum(dim=1).mean() * T**2

    def _grams(self, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        batch = class_ = 0.0
        for T in self.temps:
            p, q = F.softmax(s / T, dim=1), F.softmax(t / T, dim=1)
            batch = batch + (q @ q.T - p @ p.T).square().sum() / len(p)
            class_ = class_ + (q.T @ q - p.T @ p).square().sum() / p.shape[1]
        return batch, class_


def _share_below_median(x: Tensor) -> Tensor:
    """Share of entries at most the median, where an even count takes the mean of the middle two."""
    ordered = x.sort().values
    median = (ordered[(len(x) - 1) // 2] + ordered[len(x) // 2]) / 2
    return (x <= median).to(x.dtype).mean()


def _standardize(out: Tensor) -> Tensor:
    """Mean 0, deviation 1 (with K - 1) per sample; constant rows to 0, without gradient."""
    centred = out - out.mean(dim=1, keepdim=True)
    deviation = torch.linalg.vector_norm(centred, dim=1, keepdim=True) / (out.shape[1] - 1) ** 0.5
    alive = deviation > 1e-12
    return torch.where(alive, centred / (1e-7 + torch.where(alive, deviation, 1.0)), 0.0)


def _full(x: Tensor) -> Tensor:
    """Half precision to float32; float64 stays."""
    return x if x.dtype == torch.float64 else x.float()


# ------------------------------------------ how the training scripts use it; a copied file may drop this


def feed_strong(kd, s, t, batch):
    """The released code's form, with its cross-entropy on the strong view at 0.1 beside a weight of 0.9."""
    img = batch.views['strong']
    out = batch.student(img).out
    with torch.no_grad():
        out_t = batch.teacher(img).out
    return kd(s.out, t.out, out, out_t) + F.cross_entropy(out, batch.target) / 9


def build_strong(loss, probe, **options):
    return loss(**{'two_view': True, **options})
