"""DLB, distillation from the last mini-batch: stay consistent with what was said one step ago.

Y. Shen, L. Xu, Y. Yang, Y. Li, Y. Guo, "Self-Distillation from the Last Mini-Batch for Consistency
Regularization", CVPR 2022, arXiv:2203.16172.

    out: logits of this batch, first view;  out_prev_then: those of the last batch, one step ago, first view
    out_prev_now: what the network says now of the last batch's second view
    loss = mean over both batches of cross-entropy (out and out_prev_now)
           + alpha T^2 mean over n of KL(softmax(out_prev_then / T) || softmax(out_prev_now / T))

Tap: two augmented views of every image, logits, labels; two forward passes per step. `remember` keeps the
last batch, also across epochs and in the state_dict. At the very first step the loss is cross-entropy. No
teacher. Contains its cross-entropy.

Differences: the authors' code, which replays the whole last batch where the paper overlaps batches by half.
alpha is not stated there.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DLB(nn.Module):
    """Cross-entropy on two batches and soft targets from the network's state one step ago.

    Args:
        T: temperature, > 0; 3.
        alpha: weight of the soft targets; 1.

    Shape:
        out: (N, K), target: (N,) int64; out_prev_now, out_prev_then: (N', K) and target_prev: (N',), all or
        none. Returns a scalar. No gradient reaches out_prev_then. `terms` returns (cross-entropy, KD),
        unweighted.

    Raises:
        ValueError: T is not positive; shapes do not fit; only some of the previous batch is given.
    """

    def __init__(self, T: float = 3.0, alpha: float = 1.0) -> None:
        super().__init__()
        if not T > 0:
            raise ValueError(f'DLB: T must be > 0, got {T}')
        self.T, self.alpha = T, alpha
        self.last = None  # (images of the second view, labels, logits) of the last batch

    def forward(
        self,
        out: Tensor,
        target: Tensor,
        out_prev_now: Tensor | None = None,
        out_prev_then: Tensor | None = None,
        target_prev: Tensor | None = None,
    ) -> Tensor:
        ce, kd = self.terms(out, target, out_prev_now, out_prev_then, target_prev)
        return ce + self.alpha * kd

    def terms(self, out, target, out_prev_now=None, out_prev_then=None, target_prev=None):
        _check('out', out, 'target', target)
        out = _full(out)
        given = [x is not None for x in (out_prev_now, out_prev_then, target_prev)]
        if not any(given):
            return F.cross_entropy(out, target), out.new_zeros(())
        if not all(given):
            raise ValueError('DLB: give out_prev_now, out_prev_then and target_prev, or none of them')
        _check('out_prev_now', out_prev_now, 'target_prev', target_prev)
        if out_prev_then.shape != out_prev_now.shape or out_prev_now.shape[1] != out.shape[1]:
            shapes = f'{tuple(out_prev_now.shape)} and {tuple(out_prev_then.shape)}'
            raise ValueError(
                f"DLB: out_prev_now and out_prev_then must be (N', {out.shape[1]}), equal, got {shapes}"
            )
        now, then = _full(out_prev_now), _full(out_prev_then.detach())
        ce = F.cross_entropy(torch.cat([now, out]), torch.cat([target_prev, target]))
        log_p, log_q = F.log_softmax(now / self.T, dim=1), F.log_softmax(then / self.T, dim=1)
        q = log_q.exp()
        kd = torch.where(q > 0, q * (log_q - log_p), 0.0).sum(dim=1).mean() * self.T**2
        return ce, kd

    def remember(self, img: Tensor, target: Tensor, out: Tensor) -> None:
        """Keep this batch for the next step: its second view, labels, and logits of the first view."""
        self.last = (img.detach(), target, _full(out.detach()).clone())

    def get_extra_state(self):
        return self.last

    def set_extra_state(self, state) -> None:
        self.last = state


def _check(name: str, out: Tensor, target_name: str, target: Tensor) -> None:
    if out.dim() != 2:
        raise ValueError(f'DLB: {name} must be (N, K), got {tuple(out.shape)}')
    if target.shape != out.shape[:1] or target.is_floating_point():
        raise ValueError(
            f'DLB: {target_name} must be ({len(out)},) of integers as {name} {tuple(out.shape)}, '
            f'got {tuple(target.shape)}'
        )


def _full(x: Tensor) -> Tensor:
    """Half precision to float32; float64 stays."""
    return x if x.dtype == torch.float64 else x.float()


# ------------------------------------------ how the training scripts use it; a copied file may drop this


def feed(kd, s, t, batch):
    """The last batch's second view now, against what was said of its first view then."""
    past = ()
    if kd.last is not None:
        img, target, then = kd.last
        past = (batch.student(img).out, then, target)
    loss = kd(s.out, batch.target, *past)
    if kd.training:
        kd.remember(batch.views['second'], batch.target, s.out)
    return loss
