"""LSKD, logit standardisation: compare the shape of the logits, not their level and spread.

S. Sun, W. Ren, J. Li, R. Wang, X. Cao, "Logit Standardization in Knowledge Distillation", CVPR 2024,
arXiv:2403.01427.

    Z(out)[n, k] = (out[n, k] - mean over k) / (1e-7 + standard deviation over k, with K - 1)
    loss = T^2 * mean over n of KL(softmax(Z(out_t) / T) || softmax(Z(out_s) / T))                 (base=None)
    loss = base(Z(out_s), Z(out_t), ...)                                              (any other logit loss)

Tap: the logits. Gradients flow through mean and deviation. The authors weigh it by 9 beside 0.1 cross-entropy
(DKD: alpha and beta times 9 beside 1); cross-entropy sees the raw logits.

Differences: the authors' code (the paper divides by the deviation with K). A sample with constant logits
counts as uniform and gets no gradient; in the authors' code its gradient is about 1e6.

Source: sunshangquan/logit-standardization-KD, mdistiller/distillers/KD.py (normalize).

Use:
    >>> import torch
    >>> from lskd import LSKD
    >>> out_s, out_t = torch.randn(8, 10, requires_grad=True), torch.randn(8, 10)
    >>> LSKD()(out_s, out_t).backward()
    >>> out_s.grad.norm() > 0
    tensor(True)
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LSKD(nn.Module):
    """A logit loss on standardised logits.

    Args:
        base: module called as base(Z(out_s), Z(out_t), *args), e.g. DKD(); None: soft targets.
        T: temperature of the soft targets, > 0; 2. Not used with another base.

    Shape:
        out_s, out_t: (N, K), equal, K >= 3. Returns a scalar. No gradient reaches out_t.
        Computed in float32, or in float64 as the student.

    Raises:
        ValueError: T is not positive; the shapes differ or are not (N, K) with K >= 3: two standardised
            logits are constant.
    """

    def __init__(self, base: nn.Module | None = None, T: float = 2.0) -> None:
        super().__init__()
        if not T > 0:
            raise ValueError(f'LSKD: T must be > 0, got {T}')
        self.base, self.T = base, T

    def forward(self, out_s: Tensor, out_t: Tensor, *args) -> Tensor:
        _expect('LSKD', 'out_s', out_s, 'N', 'K')
        if out_s.shape[1] == 2:
            raise ValueError(
                f'LSKD: out_s must be (N, K) with K >= 3, got {tuple(out_s.shape)}: '
                'standardised, two logits are constant; take plain soft targets'
                ' (of torch.cat([torch.zeros_like(z), z], 1) where there is one logit)'
            )
        _expect('LSKD', 'out_t', out_t, *out_s.shape)
        z_s, z_t = standardize(_full(out_s)), standardize(_full(out_t.detach(), out_s))
        if self.base is not None:
            return self.base(z_s, z_t, *args)
        log_p_s, log_p_t = F.log_softmax(z_s / self.T, dim=1), F.log_softmax(z_t / self.T, dim=1)
        return (log_p_t.exp() * (log_p_t - log_p_s)).sum(dim=1).mean() * self.T**2


def standardize(out: Tensor, eps: float = 1e-7) -> Tensor:
    """(N, K) logits to mean 0, deviation 1 (with K - 1) per sample; constant rows to 0, without gradient."""
    centred = out - out.mean(dim=1, keepdim=True)
    deviation = torch.linalg.vector_norm(centred, dim=1, keepdim=True) / (out.shape[1] - 1) ** 0.5
    # of equal numbers the mean is off by a rounding, and what is left is no direction
    noise = 8 * torch.finfo(out.dtype).eps * out.detach().abs().amax(dim=1, keepdim=True)
    dead = deviation <= noise.clamp(min=1e-12)
    return torch.where(dead, 0.0, centred / (eps + torch.where(dead, 1.0, deviation)))


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
