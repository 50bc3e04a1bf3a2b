"""EA-KD, entropy-based adaptive distillation: samples about which both networks are unsure count more.

Su et al., "EA-KD: Entropy-based Adaptive Knowledge Distillation", ICCV 2025, arXiv:2311.13621.

    H(z) = - sum over k of p_k * log(p_k + 1e-10), p = softmax(z / T_entropy)
    w_n = H(out_t_n) / 2 * (1 + H(out_s_n) / upper), a constant
    loss = T^2 * mean over n of w_n * KL(softmax(out_t_n / T) || softmax(out_s_n / T))

Tap: the logits. `entropy_weight` gives w for any other loss that has one number per sample (DKD: before the
mean of alpha TCKD_n + beta NCKD_n; ReviewKD: each sample's mean square).

Differences: the authors' code with upper = log K, as the paper has it. For CIFAR-100 their KD and DKD take
100 instead of log(100), so that the student's entropy hardly acts; upper=K reproduces that. Their DKD clamps
p at 1e-10 instead of adding it, and always uses T_entropy 3. w is an entropy, at most log K: for 1000 classes
the loss grows up to 6.9 times, and the authors halve its weight.

Source: cpsu00/EA-KD, mdistiller/distillers/KD.py (get_w, kd_loss).

Use:
    >>> import torch
    >>> from eakd import EAKD
    >>> out_s, out_t = torch.randn(8, 10, requires_grad=True), torch.randn(8, 10)
    >>> EAKD()(out_s, out_t).backward()
    >>> out_s.grad.norm() > 0
    tensor(True)
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def entropy_weight(out_s: Tensor, out_t: Tensor, T: float = 3.0, upper: float | None = None) -> Tensor:
    """(N, K) logits of both -> (N,) weights without gradient; upper None: log K."""
    _expect('entropy_weight', 'out_s', out_s, 'N', 'K')
    _expect('entropy_weight', 'out_t', out_t, *out_s.shape)
    upper = math.log(out_s.shape[1]) if upper is None else upper
    h_s, h_t = (_entropies(_full(out.detach(), out_s) / T) for out in (out_s, out_t))
    return h_t / 2 * (1 + h_s / upper)


def _entropies(z: Tensor) -> Tensor:
    p = F.softmax(z, dim=1)
    return -(p * (p + 1e-10).log()).sum(dim=1)


class EAKD(nn.Module):
    """KL divergence of softened probabilities, weighed by entropies.

    Args:
        T: temperature of the divergence, > 0; 4 on CIFAR-100, 1 on ImageNet.
        T_entropy: temperature of the entropies, > 0; 3 on CIFAR-100, 2 on ImageNet and for transformers.
        upper: the student's entropy counts as a share of this, > 0; None: log K.

    Shape:
        out_s, out_t: (N, K), equal, K >= 2. Returns a scalar. No gradient reaches out_t. A teacher logit of
        -inf is probability 0. Computed in float32, or in float64 as the student.

    Raises:
        ValueError: T, T_entropy or upper is not positive; the shapes differ or are not (N, K).
    """

    def __init__(self, T: float = 4.0, T_entropy: float = 3.0, upper: float | None = None) -> None:
        super().__init__()
        if not T > 0 or not T_entropy > 0 or not (upper is None or upper > 0):
            raise ValueError(f'EAKD: T, T_entropy and upper must be > 0, got {T}, {T_entropy} and {upper}')
        self.T, self.T_entropy, self.upper = T, T_entropy, upper

    def forward(self, out_s: Tensor, out_t: Tensor) -> Tensor:
        _expect('EAKD', 'out_s', out_s, 'N', 'K')
        _expect('EAKD', 'out_t', out_t, *out_s.shape)
        out_s, out_t = _full(out_s), _full(out_t.detach(), out_s)
        log_p_s, log_p_t = F.log_softmax(out_s / self.T, dim=1), F.log_softmax(out_t / self.T, dim=1)
        p_t = log_p_t.exp()
        # where p_t is 0 the term is 0, although log p_t is -inf there
        kl = torch.where(p_t == 0, 0.0, p_t * (log_p_t - log_p_s)).sum(dim=1)
        return (entropy_weight(out_s, out_t, self.T_entropy, self.upper) * kl).mean() * self.T**2


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
