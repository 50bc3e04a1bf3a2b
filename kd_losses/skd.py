"""SKD, streamlined knowledge distillation: soft targets, and how the samples of a batch point to each other.

Jeong, Lee, Choi, "Streamlined Knowledge Distillation", CVPR 2026.

    instance = T^2 * mean over n of KL(softmax(out_t / T) || softmax(out_s / T))
    G = z * z^T / K, z = rows of the logits divided by their length, (N, N)
    D = G_s - G_t
    S = covariance of the columns of D over its rows (with N - 1) + tikhonov * identity
    direction = mean over n of sqrt(D_n^T * S^-1 * D_n)                 (Mahalanobis lengths of the rows)
    f1 = share of samples whose teacher confidence is at most the batch's median
    f2 = share of classes whose teacher probability, summed over the batch, is at most the median
    loss = w_kd * (f1 * instance + f2 * direction)

Tap: the logits; batches of two samples or more. Added to cross-entropy at 0.1 beside w_kd 0.9.

Differences: the authors' code. It means f1 and f2 as masks but applies them to means, so that they are
factors of about one half; the paper has no masks and, by secondary notes, no T^2. It divides G by K, which
leaves S with hardly more than tikhonov for 100 classes: direction then is the plain length of a row over
sqrt(tikhonov), a hundredth of the paper's. The paper's loss: SKD(w_kd=1, per_class=False, fractions=False),
instance / T^2. Their gradient is NaN where student and teacher agree, 0 here. A masked class (-inf) has no
direction: NaN.

Cost: a triangular solve with the Cholesky factor of S, N^3; no inverse.

Source: HyunJunSik/StreamLined, Distiller/SKD.py (SKD_loss, kd_loss).

Use:
    >>> import torch
    >>> from skd import SKD
    >>> out_s, out_t = torch.randn(8, 10, requires_grad=True), torch.randn(8, 10)
    >>> SKD()(out_s, out_t).backward()
    >>> out_s.grad.norm() > 0
    tensor(True)
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SKD(nn.Module):
    """KL divergence per sample, and a Mahalanobis distance between Gram matrices of logits.

    Args:
        T: temperature of the instance term, > 0; 4.
        tikhonov: added to the diagonal of the covariance, > 0; 0.1. Below 1e-5 a float32 factorisation can
            fail, which makes the loss NaN.
        w_kd: weight of both terms; 0.9 (0.5 for ResNet32x4 to 8x4).
        per_class: Gram matrices are divided by the number of classes, as in the authors' code.
        fractions: the terms are multiplied by f1 and f2, as in the authors' code.

    Shape:
        out_s, out_t: (N, K), equal, K >= 2. Returns a scalar; direction is 0 for N = 1. No gradient reaches
        out_t. `terms` returns (instance, direction) without w_kd and f; `shares(out_t)` returns (f1, f2).
        Computed in float32, also under TF32, or in float64 as the student.

    Raises:
        ValueError: T or tikhonov is not positive; the shapes differ or are not (N, K).
    """

    def __init__(
        self,
        T: float = 4.0,
        tikhonov: float = 0.1,
        w_kd: float = 0.9,
        per_class: bool = True,
        fractions: bool = True,
    ) -> None:
        super().__init__()
        if not T > 0 or not tikhonov > 0:
            raise ValueError(f'SKD: T and tikhonov must be > 0, got {T} and {tikhonov}')
        self.T, self.tikhonov, self.w_kd = T, tikhonov, w_kd
        self.per_class, self.fractions = per_class, fractions

    def forward(self, out_s: Tensor, out_t: Tensor) -> Tensor:
        instance, direction = self.terms(out_s, out_t)
        f1, f2 = self.shares(_full(out_t.detach(), out_s)) if self.fractions else (1, 1)
        return self.w_kd * (f1 * instance + f2 * direction)

    def terms(self, out_s: Tensor, out_t: Tensor) -> tuple[Tensor, Tensor]:
        _expect('SKD', 'out_s', out_s, 'N', 'K')
        _expect('SKD', 'out_t', out_t, *out_s.shape)
        s, t = _full(out_s), _full(out_t.detach(), out_s)
        log_p_s, log_p_t = F.log_softmax(s / self.T, dim=1), F.log_softmax(t / self.T, dim=1)
        p_t = log_p_t.exp()
        instance = torch.where(p_t == 0, 0.0, p_t * (log_p_t - log_p_s)).sum(dim=1).mean() * self.T**2
        with _no_autocast(s):
            return instance, self._direction(s, t)

    def shares(self, out_t: Tensor) -> tuple[Tensor, Tensor]:
        p_t = F.softmax(_full(out_t.detach()), dim=1)
        return _share_below_median(p_t.amax(dim=1)), _share_below_median(p_t.sum(dim=0))

    def _direction(self, s: Tensor, t: Tensor) -> Tensor:
        n, K = s.shape
        z_s, z_t = _exact(_unit(s)), _exact(_unit(t))
        D = z_s @ z_s.T - z_t @ z_t.T
        if n == 1:
            return 0 * D.sum().to(s.dtype)
        if self.per_class:
            D = D / K
        centred = D - D.mean(dim=0)
        S = centred.T @ centred / (n - 1) + self.tikhonov * torch.eye(n, dtype=D.dtype, device=D.device)
        factor, failed = torch.linalg.cholesky_ex(S, check_errors=False)
        factor = torch.where(failed == 0, factor, torch.nan)  # of a failure a part, finite and wrong
        white = torch.linalg.solve_triangular(factor, D.T, upper=False)
        return torch.linalg.vector_norm(white, dim=0).mean().to(s.dtype)  # gradient 0 at 0


def _share_below_median(x: Tensor) -> Tensor:
    """Share of entries at most the median, where an even count takes the mean of the middle two."""
    ordered = x.sort().values
    median = (ordered[(len(x) - 1) // 2] + ordered[len(x) // 2]) / 2
    return (x <= median).to(x.dtype).mean()


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


def _unit(x: Tensor) -> Tensor:
    """Rows divided by their length; a zero row stays zero and gets no gradient."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / norm.masked_fill(norm <= 1e-12, torch.inf)  # NaN is not: it must show in the loss


def _full(x: Tensor, like: Tensor | None = None) -> Tensor:
    """In float32, or float64 if the student (like) is. Inference tensors are copied, to serve backward."""
    x = x.double() if (x if like is None else like).dtype == torch.float64 else x.float()
    compiling = getattr(torch.compiler, 'is_compiling', bool)()  # torch 2.2 cannot tell: False
    return x.clone() if not compiling and x.is_inference() else x
