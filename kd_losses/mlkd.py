"""MLKD, multi-level logit distillation: match predictions per sample, between samples and between classes.

Y. Jin, J. Wang, D. Lin, "Multi-Level Logit Distillation", CVPR 2023.

    p = softmax(out_s / T), q = softmax(out_t / T), each (N, K)
    instance = T^2 * mean over n of KL(q_n || p_n)
    batch = 1 / N * ||q * q^T - p * p^T||^2                                      (N x N, between samples)
    class = 1 / K * ||q^T * q - p^T * p||^2                                      (K x K, between classes)
    loss = sum over T in temps of [instance + batch + class]

Tap: the logits. The authors add 0.9 times this to 0.1 cross-entropy.

Differences: by default this is the paper's loss. two_view=True is what the released code optimises, and what
made the published numbers: the instance terms of the middle temperatures are on a strongly augmented view;
instance and batch terms are multiplied by the share of samples, class terms by the share of classes, whose
confidence is at most the median (the code makes masks of them, but applies them after the mean).

Source: Jin-Ying/Multi-Level-Logit-Distillation, mdistiller/distillers/KD_ours.py, with two_view=True; the
paper's loss: formula only.

Use:
    >>> import torch
    >>> from mlkd import MLKD
    >>> out_s, out_t = torch.randn(8, 10, requires_grad=True), torch.randn(8, 10)
    >>> MLKD()(out_s, out_t).backward()
    >>> out_s.grad.norm() > 0
    tensor(True)
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
        Computed in float32, also under TF32, or in float64 as the student.

    Raises:
        ValueError: a temperature is not positive; the shapes differ or are not (N, K); logit_std with two
            classes; two_view without strong views or the other way round.
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
        _expect('MLKD', 'out_s', out_s, 'N', 'K')
        if self.logit_std and out_s.shape[1] < 3:
            raise ValueError(
                f'MLKD: out_s must be (N, K) of at least 3 classes with logit_std, got {tuple(out_s.shape)}: '
                'two standardised logits are constant, leave logit_std off'
            )
        strong = {'out_s_strong': out_s_strong, 'out_t_strong': out_t_strong} if self.two_view else {}
        for name, out in {'out_t': out_t, **strong}.items():
            if out is None:
                raise ValueError(
                    f'MLKD: {name} must be {tuple(out_s.shape)} with two_view=True, got None: '
                    'give the second view'
                )
            _expect('MLKD', name, out, *out_s.shape)
        if not self.two_view and (out_s_strong is not None or out_t_strong is not None):
            raise ValueError('MLKD: out_s_strong and out_t_strong are for two_view=True, got two_view=False')

        s, t = _full(out_s), _full(out_t.detach(), out_s)
        with _no_autocast(s):
            batch, class_ = self._grams(s, t)
            if not self.two_view:
                return sum(self._instance(s, t, T) for T in self.temps), batch, class_
            q = F.softmax(t, dim=1)
            m, c = _share_below_median(q.amax(dim=1)), _share_below_median(q.sum(dim=0))
            instance = m * sum(self._instance(s, t, T) for T in self.temps)
            ends = [*self.temps[:1], *self.temps[1:][-1:]]  # a single temperature is one of them, once
            instance = instance + sum(self._instance(s, t, T) for T in ends)
            s, t = _full(out_s_strong, s), _full(out_t_strong.detach(), s)
            return instance + sum(self._instance(s, t, T) for T in self.temps[1:-1]), m * batch, c * class_

    def _instance(self, s: Tensor, t: Tensor, T: float) -> Tensor:
        if self.logit_std:
            s, t = _standardize(s), _standardize(t)
        log_p, log_q = F.log_softmax(s / T, dim=1), F.log_softmax(t / T, dim=1)
        q = log_q.exp()
        return torch.where(q == 0, 0.0, q * (log_q - log_p)).sum(dim=1).mean() * T**2

    def _grams(self, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        (n, K), batch, class_ = s.shape, 0.0, 0.0
        for T in self.temps:
            p, q = F.softmax(s / T, dim=1), F.softmax(t / T, dim=1)
            p, q = _exact(p), _exact(q)
            batch = batch + (q @ q.T - p @ p.T).square().sum() / n
            if K <= 2 * n:
                class_ = class_ + (q.T @ q - p.T @ p).square().sum() / K
                continue
            # the same without K x K: with d = q - p and m the mean of both, q^T q - p^T p = m^T d + d^T m
            d, m = q - p, (q + p) / 2
            x = m @ d.T
            class_ = class_ + 2 * ((m @ m.T) * (d @ d.T) + x * x.T).sum() / K
        return batch.to(s.dtype), class_.to(s.dtype)


def _share_below_median(x: Tensor) -> Tensor:
    """Share of entries at most the median, where an even count takes the mean of the middle two."""
    ordered = x.sort().values
    median = (ordered[(len(x) - 1) // 2] + ordered[len(x) // 2]) / 2
    return (x <= median).to(x.dtype).mean()


def _standardize(out: Tensor) -> Tensor:
    """Mean 0, deviation 1 (with K - 1) per sample; constant rows to 0, without gradient."""
    centred = out - out.mean(dim=1, keepdim=True)
    deviation = torch.linalg.vector_norm(centred, dim=1, keepdim=True) / (out.shape[1] - 1) ** 0.5
    # of equal numbers the mean is off by a rounding, and what is left is no direction
    noise = 8 * torch.finfo(out.dtype).eps * out.detach().abs().amax(dim=1, keepdim=True)
    dead = deviation <= noise.clamp(min=1e-12)
    return torch.where(dead, 0.0, centred / (1e-7 + torch.where(dead, 1.0, deviation)))


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


def _no_autocast(x: Tensor) -> torch.autocast:
    """Matrix products and convolutions in the precision of their tensors; there is no autocast on meta."""
    return torch.autocast('cpu' if x.is_meta else x.device.type, enabled=False)


def _exact(x: Tensor) -> Tensor:
    """For products that decide the loss: in float64 where float32 ones are rounded, TF32 for example."""
    return x.double() if x.dtype == torch.float32 and _rounded() and x.device.type != 'mps' else x


def _rounded() -> bool:
    """Whether torch.set_float32_matmul_precision or its newer forms ask for less than float32."""
    mode = getattr(torch.backends.cuda.matmul, 'fp32_precision', None)
    if mode is None:  # before torch 2.9
        return torch.get_float32_matmul_precision() != 'highest'
    rounded = ('tf32', 'bf16')
    return mode in rounded or torch.backends.mkldnn.matmul.fp32_precision in rounded


_rounded._dynamo_marked_constant = True  # torch.compiler.assume_constant_result, without its imports


def _full(x: Tensor, like: Tensor | None = None) -> Tensor:
    """In float32, or float64 if the student (like) is. Inference tensors are copied, to serve backward."""
    x = x.double() if (x if like is None else like).dtype == torch.float64 else x.float()
    compiling = getattr(torch.compiler, 'is_compiling', bool)()  # torch 2.2 cannot tell: False
    return x.clone() if not compiling and x.is_inference() else x


# ------------------------------------------ how the training scripts use it; a copied file may drop this


def feed_strong(kd, s, t, batch):
    """The released code's form, and the cross-entropy of the strong view."""
    img = batch.views['strong']
    out = batch.student(img).out
    with torch.no_grad():
        out_t = batch.teacher(img).out
    valid = batch.target != -100  # cross_entropy divides by their number, which may be 0
    target = torch.where(valid, batch.target, -100)  # a copy: those of inference mode cannot serve backward
    ce = F.cross_entropy(out, target, reduction='sum') / valid.sum().clamp(min=1)
    return kd(s.out, t.out, out, out_t) + kd.ce * ce


def build_strong(loss, probe, ce: float = 1 / 9, **options):
    """ce: of the strong view's cross-entropy, over the loss's weight: 0.1 in all beside a weight of 0.9."""
    kd = loss(**{'two_view': True, **options})
    kd.ce = ce
    return kd
