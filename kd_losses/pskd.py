"""PS-KD, progressive self-knowledge distillation: labels softened by what the network said an epoch ago.

K. Kim, B. Ji, D. Yoon, S. Hwang, "Self-Knowledge Distillation with Progressive Refinement of Targets", ICCV
2021, arXiv:2006.12000.

    alpha = alpha_T (epoch + 1) / total_epochs                     epoch from 0
    s = (1 - alpha) onehot(target) + alpha softmax(out of this image, one epoch ago)
    loss = - mean over n of sum over k of s log softmax(out)       instead of cross-entropy
    then softmax(out) is remembered for the next epoch

Tap: logits, labels, the images' positions in the training set, the epoch. No teacher. The memory is a buffer,
so a resumed run goes on exactly.

Differences: the authors' loss; an image never seen yet counts as its one-hot label (they keep a row of
zeros).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PSKD(nn.Module):
    """Cross-entropy with labels refined by a memory of past predictions.

    Args:
        num_samples: size of the training set.
        num_classes: K.
        alpha_T: trust in the past at the end of training, in [0, 1]; 0.8.
        total_epochs: length of the run; 300.

    Shape:
        out: (N, K), target: (N,) int64, index: (N,) int64 positions, epoch: from 0. Returns a scalar. In
        training mode with gradients the predictions are remembered.

    Raises:
        ValueError: alpha_T or total_epochs is not legal; shapes do not fit.
    """

    def __init__(
        self, num_samples: int, num_classes: int, alpha_T: float = 0.8, total_epochs: int = 300
    ) -> None:
        super().__init__()
        if not 0 <= alpha_T <= 1 or total_epochs < 1:
            raise ValueError(
                f'PSKD: alpha_T must be in [0, 1] and total_epochs >= 1, got {alpha_T} and {total_epochs}'
            )
        self.alpha_T, self.total_epochs = alpha_T, total_epochs
        self.register_buffer('memory', torch.zeros(num_samples, num_classes))

    def forward(self, out: Tensor, target: Tensor, index: Tensor, epoch: int) -> Tensor:
        if out.dim() != 2 or out.shape[1] != self.memory.shape[1]:
            raise ValueError(f'PSKD: out must be (N, {self.memory.shape[1]}), got {tuple(out.shape)}')
        if index.shape != out.shape[:1] or index.is_floating_point():
            raise ValueError(
                f'PSKD: index must be ({len(out)},) of integers as out {tuple(out.shape)}, '
                f'got {tuple(index.shape)}'
            )
        past = self.memory[index].to(_full(out).dtype)
        if target.shape == out.shape[:1]:  # pskd_loss refuses others
            past = torch.where(past.sum(dim=1, keepdim=True) > 0, past, _one_hot(target, out))
        alpha = max(0.0, self.alpha_T * (epoch + 1) / self.total_epochs)
        loss = pskd_loss(out, past, target, alpha)
        if self.training and torch.is_grad_enabled():
            with torch.no_grad():
                now = _full(out.detach()).softmax(dim=1)
                self.memory.index_copy_(0, index, now.to(self.memory.dtype))
        return loss


def pskd_loss(out: Tensor, prev_prob: Tensor, target: Tensor, alpha: float) -> Tensor:
    """Cross-entropy of out (N, K) with (1 - alpha) onehot(target) + alpha prev_prob (N, K)."""
    if prev_prob.shape != out.shape:
        raise ValueError(
            f'pskd_loss: prev_prob must be {tuple(out.shape)} as out, got {tuple(prev_prob.shape)}'
        )
    if target.shape != out.shape[:1] or target.is_floating_point():
        raise ValueError(
            f'PSKD: target must be ({len(out)},) of integers, got {tuple(target.shape)} of {target.dtype}'
        )
    goal = (1 - alpha) * _one_hot(target, out) + alpha * prev_prob.detach()
    return -(goal * F.log_softmax(_full(out), dim=1)).sum(dim=1).mean()


def _one_hot(target: Tensor, out: Tensor) -> Tensor:
    return (target[:, None] == torch.arange(out.shape[1], device=out.device)).to(_full(out).dtype)


def _full(x: Tensor) -> Tensor:
    """Half precision to float32; float64 stays."""
    return x if x.dtype == torch.float64 else x.float()


# ------------------------------------------ how the training scripts use it; a copied file may drop this


def feed(kd, s, t, batch):
    return kd(s.out, batch.target, batch.index, batch.epoch)


def build(loss, probe, **options):
    return loss(len(probe.train_set), probe.num_classes, **{'total_epochs': probe.epochs, **options})
