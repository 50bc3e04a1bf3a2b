"""DKD, decoupled knowledge distillation: weigh "how sure" and "what else it could be" separately.

B. Zhao, Q. Cui, R. Song, Y. Qiu, J. Liang, "Decoupled Knowledge Distillation", CVPR 2022, arXiv:2203.08679.

    p = softmax(out / T), y = target
    TCKD = T^2 * mean over n of KL between (p_y, 1 - p_y) of teacher and student
    NCKD = T^2 * mean over n of KL between the softmax over the other K - 1 classes of teacher and student
    loss = alpha * TCKD + beta * NCKD

Per sample, plain soft targets are TCKD + (1 - p_t[y]) * NCKD: a confident teacher hides NCKD.

Tap: the logits, and the labels. The authors raise the loss's weight linearly over the first 20 of 240 epochs;
our trainer does the same, scaled to the run. Replaces soft targets.

Differences: the authors' code takes the logarithm of summed probabilities and gives inf and NaN for a
confident student; here every logarithm is a logsumexp, equal to their value to rounding and finite for any
logits.

Source: megvii-research/mdistiller, mdistiller/distillers/DKD.py (dkd_loss).

Use:
    >>> import torch
    >>> from dkd import DKD
    >>> out_s, out_t = torch.randn(8, 10, requires_grad=True), torch.randn(8, 10)
    >>> DKD()(out_s, out_t, torch.arange(8)).backward()
    >>> out_s.grad.norm() > 0
    tensor(True)
"""

import torch
from torch import Tensor, nn


class DKD(nn.Module):
    """Target-class and non-target-class divergence with weights of their own.

    Args:
        alpha: weight of the target-class term, 1.
        beta: weight of the non-target term; authors' CIFAR-100: 8 in general, 2 (resnet56 to resnet20,
            resnet110 to resnet32), 6 (vgg13; wrn_40_2 to wrn_16_2, wrn_40_1); ImageNet 0.5
            (ResNet34 to 18), 2 (ResNet50 to MobileNet).
        T: temperature, > 0; 4 on CIFAR, 1 on ImageNet.

    Shape:
        out_s, out_t: (N, K), equal, K >= 2 (with K = 2 the second term is 0); target: (N,) labels.
        Returns a scalar. No gradient reaches out_t. `terms` returns (TCKD, NCKD) without alpha and beta.
        Rows of label -100 are left out. Computed in float32, or in float64 as the student.

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
        _expect('DKD', 'out_s', out_s, 'N', 'K')
        _expect('DKD', 'out_t', out_t, *out_s.shape)
        target, valid = _labels('DKD', target, *out_s.shape)
        sure_s, other_s = _log_probabilities(_full(out_s) / self.T, target)
        sure_t, other_t = _log_probabilities(_full(out_t.detach(), out_s) / self.T, target)
        tckd, nckd = (
            _mean(_kl(log_p_t, log_p_s).sum(dim=1), valid)
            for log_p_t, log_p_s in ((sure_t, sure_s), (other_t, other_s))
        )
        return tckd * self.T**2, nckd * self.T**2


def _log_probabilities(z: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """log p_y and log(1 - p_y), (N, 2), and the log-softmax over the other classes, (N, K), -inf at y."""
    y = target[:, None]
    others = z.scatter(1, y, -torch.inf)
    rest = others.logsumexp(dim=1, keepdim=True)
    sure = torch.cat([z.gather(1, y), rest], dim=1).log_softmax(dim=1)
    return sure, others - rest.masked_fill(rest == -torch.inf, 0.0)  # every other class may be masked


def _kl(log_p_t: Tensor, log_p_s: Tensor, on_host: bool = False) -> Tensor:
    """p_t (log p_t - log p_s), and 0 where p_t is 0 whatever the logarithms are.

    on_host: p_t may be looked at, as labels on the CPU were: the mask, a third of the time, only if needed.
    """
    p_t = log_p_t.exp()
    kl = p_t * (log_p_t - log_p_s)
    if on_host and p_t.amin().view(1).tolist()[0] > 0:  # not with NaN
        return kl
    return torch.where(p_t == 0, 0.0, kl)


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


def _labels(who: str, target: Tensor, n: int, K: int, name: str = 'target') -> tuple[Tensor, Tensor | None]:
    """n labels of 0..K-1 as int64, and which rows count, None for all: not those of -100, which are 0 then.

    Other labels are refused, but on a GPU, where looking at them would wait, only by the kernels.
    """
    _expect(who, name, target, n)
    if target.is_floating_point():
        raise ValueError(f'{who}: {name} must be ({n},) of integers, got {target.dtype}: {name}.long()')
    target, compiling = target.long(), getattr(torch.compiler, 'is_compiling', bool)()
    if not compiling and target.is_inference():  # what a teacher says under inference_mode: for backward
        target = target.clone()
    if target.device.type == 'cpu' and not compiling:
        (lowest,), (highest,) = (y.tolist() for y in target.aminmax(dim=0, keepdim=True))
        if lowest >= 0 and highest < K:
            return target, None
        for y in target.tolist():
            if y != -100 and not 0 <= y < K:
                raise ValueError(f'{who}: {name} must be in 0..{K - 1}, or -100 to leave a row out, got {y}')
    valid = target != -100
    return torch.where(valid, target, 0), valid


def _mean(rows: Tensor, valid: Tensor | None) -> Tensor:
    """Over the rows (N, ...) that count; 0 if none does."""
    if valid is None:
        return rows.mean(dim=0)
    counts = valid.reshape(-1, *[1] * (rows.dim() - 1))
    return torch.where(counts, rows, 0.0).sum(dim=0) / valid.sum().clamp(min=1)


def _full(x: Tensor, like: Tensor | None = None) -> Tensor:
    """In float32, or float64 if the student (like) is. Inference tensors are copied, to serve backward."""
    x = x.double() if (x if like is None else like).dtype == torch.float64 else x.float()
    compiling = getattr(torch.compiler, 'is_compiling', bool)()  # torch 2.2 cannot tell: False
    return x.clone() if not compiling and x.is_inference() else x
