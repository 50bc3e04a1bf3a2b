"""RLD, refined logit distillation: how sure the teacher is, and the classes that it ranks below the label.

W. Sun, D. Chen, S. Lyu, G. Chen, C. Chen, C. Wang, "Knowledge Distillation with Refined Logits", ICCV 2025,
arXiv:2408.07703.

    y = target, m = argmax(out_t)
    a = softmax(out_t / T_conf)_m,  b = softmax(out_s / T_conf)_y
    SCD = T_conf^2 * mean over n of [a * log(a / b) + (1 - a) * log((1 - a) / (1 - b))]
    MCD = T^2 * mean over n of KL between the softmax of out_t / T and out_s / T over the classes k with
          out_t_k < out_t_y
    loss = alpha * SCD + beta * MCD

A teacher that is wrong passes on its confidence, not its label, and nothing about the classes it prefers to
the label. Where the teacher is always right and T_conf = T this is DKD.

Tap: the logits, and the labels. The authors raise the loss's weight linearly over the first 20 of 240 epochs;
our trainer does the same, scaled to the run, and passes T_conf = T as their README does.

Differences: the authors' code takes the logarithm of summed probabilities and gives inf and NaN for a
confident student; here every logarithm is a logsumexp. Their file of settings has T_conf 1 (the default), the
command in their README T_conf = T; which of them gave their tables is not said. A sample whose label the
teacher ranks last has no MCD and no gradient of it. standardise changes the values, but not the mask.

Source: zju-SWJ/RLD, mdistiller/distillers/RLD.py (rld_loss).

Use:
    >>> import torch
    >>> from rld import RLD
    >>> out_s, out_t = torch.randn(8, 10, requires_grad=True), torch.randn(8, 10)
    >>> RLD()(out_s, out_t, torch.arange(8)).backward()
    >>> out_s.grad.norm() > 0
    tensor(True)
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RLD(nn.Module):
    """Sample confidence and masked correlation.

    Args:
        alpha, beta: weights of the two terms, 1 and 8; ImageNet's beta: 0.5 (ResNet34 to 18), 2 (ResNet50 to
            MobileNet).
        T: temperature of the correlation, > 0; 4 on CIFAR, 1 on ImageNet.
        T_conf: temperature of the confidence, > 0; 1, or T.
        standardise: whether logits are first shifted and scaled to mean 0 and deviation 1 per sample.

    Shape:
        out_s, out_t: (N, K), equal, K >= 2 (with K = 2 MCD is 0); target: (N,) labels. Returns a scalar.
        No gradient reaches out_t. `terms` returns (SCD, MCD) without alpha and beta; `dropped` (N, K) says
        which classes MCD leaves out. Rows of label -100 are left out.
        Computed in float32, or in float64 as the student.

    Raises:
        ValueError: a temperature is not positive; shapes differ; K < 2; target is not (N,) of integers.
    """

    def __init__(
        self,
        alpha: float = 1.0,
        beta: float = 8.0,
        T: float = 4.0,
        T_conf: float = 1.0,
        standardise: bool = False,
    ) -> None:
        super().__init__()
        if not (T > 0 and T_conf > 0):
            raise ValueError(f'RLD: T and T_conf must be > 0, got {T} and {T_conf}')
        self.alpha, self.beta, self.T, self.T_conf = alpha, beta, T, T_conf
        self.standardise = standardise

    def forward(self, out_s: Tensor, out_t: Tensor, target: Tensor) -> Tensor:
        scd, mcd = self.terms(out_s, out_t, target)
        return self.alpha * scd + self.beta * mcd

    def terms(self, out_s: Tensor, out_t: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        _expect('RLD', 'out_s', out_s, 'N', 'K')
        _expect('RLD', 'out_t', out_t, *out_s.shape)
        target, valid = _labels('RLD', target, *out_s.shape)
        s, t, K = _full(out_s), _full(out_t.detach(), out_s), out_s.shape[1]
        if self.standardise:
            s, t = _standardize(s), _standardize(t)

        b, rest_b, _ = _log_probabilities(s / self.T_conf, _is(target, K))
        a, rest_a, _ = _log_probabilities(t / self.T_conf, _is(t.argmax(dim=1), K))
        scd = _mean(_kl(a, b) + _kl(rest_a, rest_b), valid)

        dropped = self.dropped(t, target)
        nothing = (dropped | (t == -torch.inf)).all(dim=1, keepdim=True)  # of what has a probability
        log_p_s, log_p_t = (
            F.log_softmax(torch.where(nothing, 0.0, (z / self.T).masked_fill(dropped, -torch.inf)), dim=1)
            for z in (s, t)
        )
        mcd = _mean(_kl(log_p_t, log_p_s).sum(dim=1), valid)
        return scd * self.T_conf**2, mcd * self.T**2

    def dropped(self, out_t: Tensor, target: Tensor) -> Tensor:
        """(N, K), True at the classes that the teacher ranks as high as the label, and at the label."""
        return out_t >= out_t.gather(1, target[:, None])


def _standardize(out: Tensor) -> Tensor:
    """Mean 0, deviation 1 (with K - 1) per sample; constant rows to 0, without gradient."""
    centred = out - out.mean(dim=1, keepdim=True)
    deviation = torch.linalg.vector_norm(centred, dim=1, keepdim=True) / (out.shape[1] - 1) ** 0.5
    # of equal numbers the mean is off by a rounding, and what is left is no direction
    noise = 8 * torch.finfo(out.dtype).eps * out.detach().abs().amax(dim=1, keepdim=True)
    dead = deviation <= noise.clamp(min=1e-12)
    return torch.where(dead, 0.0, centred / (1e-7 + torch.where(dead, 1.0, deviation)))


def _log_probabilities(z: Tensor, is_y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """log p_y (N,), log(1 - p_y) (N,), and the log-softmax over the other classes (N, K), -inf at y."""
    others = z.masked_fill(is_y, -torch.inf)
    rest = others.logsumexp(dim=1)
    z_y = torch.where(is_y, z, 0.0).sum(dim=1)
    total = torch.logaddexp(z_y, rest)
    return z_y - total, rest - total, others - rest[:, None]


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


def _is(target: Tensor, K: int) -> Tensor:
    """(N,) -> (N, K), True at the label."""
    return torch.zeros(len(target), K, dtype=torch.bool, device=target.device).scatter_(
        1, target[:, None], True
    )


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


# ------------------------------------------ how the training scripts use it; a copied file may drop this


def build(loss, probe, **options):
    """One temperature for both terms, as in the command of the authors' README."""
    return loss(**{'T_conf': options.get('T', 4.0)} | options)
