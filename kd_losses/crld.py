"""CRLD, cross-view consistency: soft targets within and across two views, where the teacher is sure enough.

W. Zhang, D. Liu, W. Cai, C. Ma, "Cross-View Consistency Regularisation for Knowledge Distillation", ACM MM
2024, arXiv:2412.16493.

    KL(x, y)_n = T^2 * KL(softmax(y_n / T) || softmax(x_n / T)), y the teacher
    m_weak = 1 where the largest of softmax(out_t) is at least tau_weak, else 0
    m_strong = 1 where the largest of softmax(out_t_strong) is at least tau_strong, else 0
    within = w_within * mean over n of m_weak * [KL(out_s, out_t) + KL(out_s_strong, out_t_strong)]
    cross = w_cross * mean over n of m_strong * [KL(out_s_strong, out_t) + KL(out_s, out_t_strong)]
    loss = within + cross

Tap: the logits of both networks on two views of the same images, one weakly and one strongly augmented. Both
views also get a cross-entropy of weight 1 each; in our trainer the strong view's is part of this loss
(--lambda_kd), the other one --lambda_ce.

Differences: the authors' code. The strong view's own term is masked by the weak view's confidence, and both
crossed terms by the strong view's. Means are over all samples, masked ones count as 0. The confidence is that
at temperature 1 whatever T is.

Source: arcaninez/CRLD, mdistiller/distillers/CRLD.py (CRLD).

Use:
    >>> import torch
    >>> from crld import CRLD
    >>> out_s, out_s_strong = (torch.randn(8, 10, requires_grad=True) for _ in range(2))
    >>> CRLD()(out_s, out_s_strong, torch.randn(8, 10), torch.randn(8, 10)).backward()
    >>> out_s.grad.norm() > 0
    tensor(True)
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class CRLD(nn.Module):
    """Masked divergences between two views of student and teacher.

    Args:
        T: temperature, > 0; CIFAR-100 4, Tiny-ImageNet 2, ImageNet 1.
        tau_weak, tau_strong: least confidence of the teacher on either view; 0.9 and 0.2.
        w_within: weight of the terms within a view; 2 (Tiny-ImageNet 4).
        w_cross: weight of the crossed terms; 0.5 (Tiny-ImageNet 1).

    Shape:
        out_s, out_s_strong, out_t, out_t_strong: (N, K), equal, K >= 2. Returns a scalar, 0 where the teacher
        is never sure. No gradient reaches the teacher's. A teacher logit of -inf is probability 0.
        `terms` returns (within, cross), weights included; `masks(out_t, out_t_strong)` returns both masks.
        Computed in float32, or in float64 as the student.

    Raises:
        ValueError: T is not positive; the shapes differ or are not (N, K).
    """

    def __init__(
        self,
        T: float = 4.0,
        tau_weak: float = 0.9,
        tau_strong: float = 0.2,
        w_within: float = 2.0,
        w_cross: float = 0.5,
    ) -> None:
        super().__init__()
        if not T > 0:
            raise ValueError(f'CRLD: T must be > 0, got {T}')
        self.T, self.tau_weak, self.tau_strong = T, tau_weak, tau_strong
        self.w_within, self.w_cross = w_within, w_cross

    def forward(self, out_s: Tensor, out_s_strong: Tensor, out_t: Tensor, out_t_strong: Tensor) -> Tensor:
        return sum(self.terms(out_s, out_s_strong, out_t, out_t_strong))

    def terms(
        self, out_s: Tensor, out_s_strong: Tensor, out_t: Tensor, out_t_strong: Tensor
    ) -> tuple[Tensor, Tensor]:
        _expect('CRLD', 'out_s', out_s, 'N', 'K')
        for name, out in (('out_s_strong', out_s_strong), ('out_t', out_t), ('out_t_strong', out_t_strong)):
            _expect('CRLD', name, out, *out_s.shape)
        teacher = [_full(out.detach(), out_s) for out in (out_t, out_t_strong)]
        s, strong_s = (F.log_softmax(_full(out, out_s) / self.T, dim=1) for out in (out_s, out_s_strong))
        t, strong_t = (F.log_softmax(out / self.T, dim=1) for out in teacher)
        weak, strong = self.masks(*teacher)
        # a product, not a choice: what is not finite must show also where the mask is 0
        within = (weak * (_kl_of_logs(t, s) + _kl_of_logs(strong_t, strong_s))).mean()
        cross = (strong * (_kl_of_logs(t, strong_s) + _kl_of_logs(strong_t, s))).mean()
        return self.w_within * self.T**2 * within, self.w_cross * self.T**2 * cross

    def masks(self, out_t: Tensor, out_t_strong: Tensor) -> tuple[Tensor, Tensor]:
        """(N,) of 0 and 1 each; NaN counts as sure, to show in the loss."""
        sides = ((out_t, self.tau_weak), (out_t_strong, self.tau_strong))
        outs = [(_full(out.detach()), tau) for out, tau in sides]
        return tuple((~(F.softmax(out, dim=1).amax(dim=1) < tau)).to(out.dtype) for out, tau in outs)


def _kl_of_logs(log_p_t: Tensor, log_p_s: Tensor) -> Tensor:
    """(N,): KL of each row; 0 where p_t is 0, whatever the logarithms are."""
    p_t = log_p_t.exp()
    return torch.where(p_t == 0, 0.0, p_t * (log_p_t - log_p_s)).sum(dim=1)


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


def _full(x: Tensor, like: Tensor | None = None) -> Tensor:
    """In float32, or float64 if the student (like) is. Inference tensors are copied, to serve backward."""
    x = x.double() if (x if like is None else like).dtype == torch.float64 else x.float()
    compiling = getattr(torch.compiler, 'is_compiling', bool)()  # torch 2.2 cannot tell: False
    return x.clone() if not compiling and x.is_inference() else x


# ------------------------------------------ how the training scripts use it; a copied file may drop this


def feed(kd, s, t, batch):
    """With the strong view's cross-entropy; the trainer adds the plain view's."""
    img = batch.views['strong']
    out = batch.student(img).out
    with torch.no_grad():
        out_t = batch.teacher(img).out
    valid = batch.target != -100  # cross_entropy divides by their number, which may be 0
    target = torch.where(valid, batch.target, -100)  # a copy: those of inference mode cannot serve backward
    ce = F.cross_entropy(out, target, reduction='sum') / valid.sum().clamp(min=1)
    return kd(s.out, out, t.out, out_t) + ce
