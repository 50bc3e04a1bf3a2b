"""AEKD, agreeing to disagree: the direction in which no teacher is contradicted.

S. Du, S. You, X. Li, J. Wu, F. Wang, C. Qian, C. Zhang, "Agree to Disagree: Adaptive Ensemble Knowledge
Distillation in Gradient Space", NeurIPS 2020.

    l_m = T^2 * mean over n of KL(softmax(outs_t[m] / T) || softmax(out_s / T))
    g_m = gradient of l_m in out_s, which is T / N * (softmax(out_s / T) - softmax(outs_t[m] / T))
    v_m = mean over n of g_m[n], G = V V'
    w = the smallest w' G w / 2 with sum of w = 1 and 0 <= w_m <= max(C, 1 / M)
    loss = sum over m of w_m * l_m, w without gradient

C = 1 / M is the plain average, C >= 1 the smallest vector in the hull of the gradients. With norm=True v_m is
divided by its length first, and w_m afterwards, which then sum to 1 again.

Tap: logits of the student and of up to six frozen networks.

Differences: the authors solve the same problem with a one-class support vector machine of tolerance 1e-6,
which leaves errors of 1e-4 in w; here it is solved exactly, by trying every choice of weights at a bound.
Among equally good weights the most even ones are taken: equal teachers weigh the same.

Source: AnTuo1998/AE-KD, helper/optimization.py (find_optimal_svm) and helper/loops.py.

Use:
    >>> import torch
    >>> from aekd import AEKD
    >>> out_s, outs_t = torch.randn(8, 10, requires_grad=True), [torch.randn(8, 10) for _ in range(3)]
    >>> AEKD()(out_s, outs_t).backward()
    >>> out_s.grad.norm() > 0
    tensor(True)
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class AEKD(nn.Module):
    """Soft targets of several teachers, weighed so that the common gradient is as short as C allows.

    Args:
        T: temperature, > 0; 4.
        C: largest weight of a teacher, > 0; 0.6. Below 1 / M it is 1 / M.
        norm: whether only the directions of the gradients count; False.

    Shape:
        out_s: (N, K); outs_t: list of 1 to 6 tensors (N, K), or stacked (M, N, K). Returns a scalar. No
        gradient reaches outs_t. `weights(grads, C, norm)` is the rule itself for gradients (M, N, ...) with
        respect to any tensor of the student, and returns (M,) in float64.
        Computed in float32, or in float64 as the student; the weights in float64.

    Raises:
        ValueError: T or C is not positive; there is no teacher, or more than six; shapes differ.
    """

    def __init__(self, T: float = 4.0, C: float = 0.6, norm: bool = False) -> None:
        super().__init__()
        if not T > 0 or not C > 0:
            raise ValueError(f'AEKD: T > 0 and C > 0 are needed, got {T} and {C}')
        self.T, self.C, self.norm = T, C, norm

    def forward(self, out_s: Tensor, outs_t: list[Tensor]) -> Tensor:
        outs_t = _teachers('AEKD', out_s, outs_t)
        log_p, log_q = F.log_softmax(outs_t / self.T, dim=2), F.log_softmax(_full(out_s) / self.T, dim=1)
        each = _kl(log_p, log_q).sum(dim=2).mean(dim=1) * self.T**2
        w = self.weights(self.gradients(out_s, outs_t), self.C, self.norm)
        return (w.to(each.dtype).to(each.device) * each).sum()

    @torch.no_grad()
    def gradients(self, out_s: Tensor, outs_t: list[Tensor]) -> Tensor:
        """(M, N, K): of every teacher's loss with respect to out_s."""
        outs_t = _teachers('AEKD', out_s, outs_t)
        q = (_full(out_s.detach()) / self.T).softmax(dim=1)
        return self.T / len(out_s) * (q - (outs_t / self.T).softmax(dim=2))

    @staticmethod
    @torch.no_grad()
    def weights(grads: Tensor, C: float, norm: bool = False) -> Tensor:
        """(M, N, ...) gradients -> (M,) weights in float64, of Apple's GPU on the CPU."""
        M = len(grads)
        if M > 6:
            raise ValueError(f'AEKD: outs_t must hold 1 to 6 teachers, got {M}: average some of them first')
        v = grads.detach().flatten(2) if grads.dim() > 3 else grads.detach()
        v = _double(v.mean(dim=1).flatten(1))
        length = torch.linalg.vector_norm(v, dim=1).clamp(min=1e-12)
        if norm:
            v = v / length[:, None]
        gram = (v[:, None] * v[None, :]).sum(dim=2)
        w = _smallest(gram, min(1.0, max(1 / M, C)))
        # between equal teachers rounding would decide
        apart = torch.linalg.vector_norm(v[:, None] - v[None], dim=2)
        equal = (apart <= 1e-12 * torch.linalg.vector_norm(v, dim=1).max()).to(w.dtype)
        w = (equal * w).sum(dim=1) / equal.sum(dim=1)
        if norm:
            w = w / length
        return w / w.sum()


def _smallest(gram: Tensor, cap: float) -> Tensor:
    """(M,) w of sum 1 in [0, cap] with the smallest w' gram w.

    Every weight is 0, cap or free; each of the 3^M choices leaves linear equations (the gradient is the same
    number, -price, for all free weights), and the best of the solutions within the bounds is the answer.
    """
    M = len(gram)
    one = torch.eye(M, dtype=gram.dtype, device=gram.device)
    trace = gram.diagonal().sum()
    # gradients are tiny: to size 1. The ridge makes the most even weights the best of equals
    scaled = gram / torch.where(trace <= 0, 1.0, trace) + 1e-12 * one
    choice = torch.arange(3**M, device=gram.device)[:, None] // 3 ** torch.arange(M, device=gram.device) % 3
    free = choice == 2
    fixed = (choice == 1).to(gram.dtype) * cap
    rows = torch.where(free[:, :, None], scaled, one)
    rows = torch.cat([rows, free[:, :, None].to(gram.dtype)], dim=2)  # times w and the price
    total = torch.cat([one.new_ones(len(choice), 1, M), one.new_zeros(len(choice), 1, 1)], dim=2)
    # without a free weight there is no price to find: 1, and the sum decides whether the choice is legal
    none = ~free.any(dim=1)
    total = torch.where(none[:, None, None], (torch.arange(M + 1, device=gram.device) == M) * 1.0, total)
    matrix = torch.cat([rows, total], dim=1).to(gram.dtype)
    right = torch.cat([fixed, one.new_ones(len(choice), 1)], dim=1)
    w = torch.linalg.solve_ex(matrix, right[:, :, None])[0][:, :M, 0]
    legal = ((w >= -1e-9) & (w <= cap + 1e-9)).all(dim=1) & ((w.sum(dim=1) - 1).abs() < 1e-9)
    value = (w[:, :, None] * scaled * w[:, None, :]).sum(dim=(1, 2))
    best = torch.where(legal, value, torch.inf).argmin()
    return w.index_select(0, best[None])[0].clamp(min=0, max=cap)


def _teachers(who: str, out_s: Tensor, outs_t: list[Tensor] | Tensor, least: int = 1) -> Tensor:
    """Logits of all teachers in one tensor (M, N, K), detached, in the precision of the student."""
    _expect(who, 'out_s', out_s, 'N', 'K')
    if len(outs_t) < least:
        raise ValueError(
            f'{who}: outs_t must hold {least} or more tensors, got {len(outs_t)}: give one per teacher'
        )
    for i, z in enumerate(outs_t):
        _expect(who, f'outs_t[{i}]', z, *out_s.shape)
    return torch.stack([_full(z.detach(), out_s) for z in outs_t])


def _kl(log_p_t: Tensor, log_p_s: Tensor, on_host: bool = False) -> Tensor:
    """p_t (log p_t - log p_s), and 0 where p_t is 0 whatever the logarithms are.

    on_host: p_t may be looked at, as labels on the CPU were: the mask, a third of the time, only if needed.
    """
    p_t = log_p_t.exp()
    kl = p_t * (log_p_t - log_p_s)
    if on_host and p_t.amin().view(1).tolist()[0] > 0:  # not with NaN
        return kl
    return torch.where(p_t == 0, 0.0, kl)


def _double(x: Tensor) -> Tensor:
    """In float64, on the CPU where the device has none (Apple's)."""
    return (x.cpu() if x.device.type == 'mps' else x).double()


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
