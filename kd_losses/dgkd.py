"""DGKD, densely guided distillation: learn from the teacher and all assistants, some left out at random.

W. Son, J. Na, J. Choi, W. Hwang, "Densely Guided Knowledge Distillation using Multiple Teacher Assistants",
ICCV 2021, arXiv:2009.08825.

    KL_j = T^2 mean over n of KL(softmax(outs_t[j] / T) || softmax(out_s / T))
    loss = (1 - lam) CE(out_s) + lam sum over the kept teachers j of KL_j
    in training, `drop` of the M teachers are left out of each step, at random, never all

Tap: logits of the student and of several frozen networks, and labels. Contains its cross-entropy. The recipe:
train the teacher; each assistant, larger before smaller, from the teacher and all assistants before it; the
student from all.

Differences: the authors average KL over N K numbers (K times smaller) and weigh by lam = 1, so without
cross-entropy; here it is the mean over samples and lam = 0.6.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DGKD(nn.Module):
    """Cross-entropy and the summed soft targets of several teachers.

    Args:
        T: temperature, > 0; 5.
        lam: weight of the teachers, in [0, 1]; 0.6.
        drop: teachers left out of a training step; 1.

    Shape:
        out_s: (N, K); outs_t: list of M tensors (N, K), or stacked (M, N, K); target: (N,) int64; keep: (M,)
        of 0 and 1, which teachers count, otherwise drawn in training mode (from generator) and all in eval
        mode. Returns a scalar. No gradient reaches outs_t.

    Raises:
        ValueError: an argument is not legal; shapes do not fit.
    """

    def __init__(self, T: float = 5.0, lam: float = 0.6, drop: int = 1) -> None:
        super().__init__()
        if not T > 0 or not 0 <= lam <= 1 or drop < 0:
            raise ValueError(f'DGKD: T > 0, lam in [0, 1] and drop >= 0 are needed, got {T}, {lam}, {drop}')
        self.T, self.lam, self.drop = T, lam, drop

    def forward(
        self,
        out_s: Tensor,
        outs_t: list[Tensor],
        target: Tensor,
        keep: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        if out_s.dim() != 2:
            raise ValueError(f'DGKD: out_s must be (N, K), got {tuple(out_s.shape)}')
        shapes = [tuple(z.shape) for z in outs_t]
        if not shapes or any(s != tuple(out_s.shape) for s in shapes):
            raise ValueError(f'DGKD: outs_t must hold tensors {tuple(out_s.shape)} as out_s, got {shapes}')
        if target.shape != out_s.shape[:1] or target.is_floating_point():
            raise ValueError(f'DGKD: target must be ({len(out_s)},) of integers, got {tuple(target.shape)}')
        if keep is None:
            keep = self._draw(len(shapes), out_s.device, generator)
        elif keep.shape != (len(shapes),):
            raise ValueError(f'DGKD: keep must be ({len(shapes)},), got {tuple(keep.shape)}')
        out_s, outs_t = _full(out_s), torch.stack([_full(z.detach()) for z in outs_t])
        log_p, log_q = F.log_softmax(out_s / self.T, dim=1), F.log_softmax(outs_t / self.T, dim=2)
        q = log_q.exp()
        kl = torch.where(q > 0, q * (log_q - log_p), 0.0).sum(dim=2).mean(dim=1) * self.T**2
        return (1 - self.lam) * F.cross_entropy(out_s, target) + self.lam * (keep.to(kl.dtype) * kl).sum()

    def _draw(self, count: int, device, generator: torch.Generator | None) -> Tensor:
        dropped = min(self.drop, count - 1) if self.training else 0
        rank = torch.rand(count, device=device, generator=generator).argsort().argsort()
        return rank >= dropped


def _full(x: Tensor) -> Tensor:
    """Half precision to float32; float64 stays."""
    return x if x.dtype == torch.float64 else x.float()


# ------------------------------------------ how the training scripts use it; a copied file may drop this


def feed(kd, s, t, batch):
    return kd(s.out, [f.out for f in batch.all_t], batch.target, generator=batch.generator)
