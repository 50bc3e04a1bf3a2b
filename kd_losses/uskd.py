"""USKD, universal self-knowledge distillation: soft labels from the student itself, without a teacher.

Z. Yang, A. Zeng, Z. Li, T. Zhang, C. Yuan, Y. Li, "From Knowledge Distillation to Self-Knowledge
Distillation: A Unified Approach with Normalized Loss and Customized Soft Labels", ICCV 2023,
arXiv:2303.13005.

    p = softmax(out_s),  w = softmax(fc(feat_mid)) (the weak head, trained with the student),  y = target
    target term:      P_n = p_n[y]^2 + 1 - mean over the batch of p[y]^2;   - mean over n of P_n * log p_n[y]
    non-target term:  classes ranked by R = w / (1 - w[y]) + p / (1 - p[y]); z = 1 / rank without y, to sum 1;
                      - mean over n of sum over k != y of z_k * log softmax over the K - 1 others of out_s
    weak term:        cross-entropy of fc(feat_mid) with the label smoothed by 0.1
    loss = alpha * target + beta * non-target + mu * weak           (P, z and the ranking carry no gradient)

Tap: the globally pooled map of the last stage but one, the logits, and the labels. Added to cross-entropy.

Differences: the ranking uses probabilities, as in the paper; the authors' code ranks by log-probabilities by
accident (rank_on='logprob'). Integer labels only.

Source: yzd-v/cls_KD, mmcls/models/dis_losses/uskd.py (USKDLoss), with rank_on='logprob'; rank_on='prob':
formula only.

Use:
    >>> import torch
    >>> from uskd import USKD
    >>> feat_mid, out_s = torch.randn(8, 32), torch.randn(8, 10, requires_grad=True)
    >>> USKD(32, 10)(feat_mid, out_s, torch.arange(8)).backward()
    >>> out_s.grad.norm() > 0
    tensor(True)
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class USKD(nn.Module):
    """Self-made target and non-target soft labels, and a weak classifier on an earlier stage.

    Args:
        mid_dim: width of feat_mid.
        num_classes: K >= 2.
        alpha, beta, mu: weights of the three terms; 0.1, 0.1, 0.1 on CIFAR-100, 1, 0.1, 0.005 on ImageNet.
        rank_on: 'prob' or 'logprob', what the logits contribute to the ranking.

    Shape:
        feat_mid: (N, mid_dim), out_s: (N, K), target: (N,) labels. Returns a scalar. `terms` returns the
        three summands, weights included.
        Rows of label -100 are left out. Computed in float32, or in float64 as the student.

    Raises:
        ValueError: rank_on is neither; K < 2; shapes do not fit.
    """

    def __init__(
        self,
        mid_dim: int,
        num_classes: int,
        alpha: float = 0.1,
        beta: float = 0.1,
        mu: float = 0.1,
        rank_on: str = 'prob',
    ) -> None:
        super().__init__()
        if rank_on not in ('prob', 'logprob'):
            raise ValueError(f'USKD: rank_on must be "prob" or "logprob", got {rank_on!r}')
        if num_classes < 2:
            raise ValueError(
                f'USKD: num_classes must be at least 2, got {num_classes}: '
                'a sigmoid network has two classes, torch.cat([torch.zeros_like(z), z], 1)'
            )
        self.mid_dim, self.num_classes, self.rank_on = mid_dim, num_classes, rank_on
        self.alpha, self.beta, self.mu = alpha, beta, mu
        self.fc = nn.Linear(mid_dim, num_classes)

    def forward(self, feat_mid: Tensor, out_s: Tensor, target: Tensor) -> Tensor:
        return sum(self.terms(feat_mid, out_s, target))

    def terms(self, feat_mid: Tensor, out_s: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        _expect('USKD', 'feat_mid', feat_mid, 'N', self.mid_dim)
        _expect('USKD', 'out_s', out_s, len(feat_mid), self.num_classes)
        target, valid = _labels('USKD', target, *out_s.shape)
        with _no_autocast(out_s):
            out_s = _full(out_s)
            weak = _run(self.fc, _full(feat_mid, out_s))
            log_p, is_y = F.log_softmax(out_s, dim=1), _is(target, out_s.shape[1])
            log_p_y = log_p.gather(1, target[:, None])[:, 0]
            square = log_p_y.detach().exp().square()
            goal = square + 1 - _mean(square, valid)
            z = self._ranks(log_p.detach(), weak.detach(), target, is_y)
            log_others = F.log_softmax(out_s.masked_fill(is_y, -torch.inf), dim=1)
            weak_ce = F.cross_entropy(weak, target, reduction='none', label_smoothing=0.1)
            return (
                -self.alpha * _mean(goal * log_p_y, valid),
                -self.beta * _mean(torch.where(is_y, 0.0, z * log_others).sum(dim=1), valid),
                self.mu * _mean(weak_ce, valid),
            )

    def _ranks(self, log_p: Tensor, weak: Tensor, target: Tensor, is_y: Tensor) -> Tensor:
        """(N, K): one over each class's rank among all K, without the target, to sum 1."""
        w, u = weak.softmax(dim=1), log_p.exp() if self.rank_on == 'prob' else log_p
        score = sum(x / (1 - x.gather(1, target[:, None]) + 1e-6) for x in (w, u))
        order = score.argsort(dim=1, descending=True)
        zipf = 1 / torch.arange(1, score.shape[1] + 1, dtype=score.dtype, device=score.device)
        z = torch.zeros_like(score).scatter(1, order, zipf.expand_as(order)).masked_fill(is_y, 0.0)
        return z / z.sum(dim=1, keepdim=True)


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


def _run(module: nn.Module, x: Tensor, *more):
    """module(x, ...) in the precision of x, whatever half() or double() has made of the parameters."""
    if all(p.dtype == x.dtype for p in module.parameters()):
        return module(x, *more)
    state = {name: _full(p, x) for name, p in module.named_parameters()}
    state |= {name: _full(b, x) if b.is_floating_point() else b for name, b in module.named_buffers()}
    y = torch.func.functional_call(module, state, (x, *more))
    with torch.no_grad():
        for name, b in module.named_buffers():  # running statistics
            if b is not state[name]:  # a copy onto itself is a change, which backward would refuse
                b.copy_(state[name])
    return y


def _no_autocast(x: Tensor) -> torch.autocast:
    """Matrix products and convolutions in the precision of their tensors; there is no autocast on meta."""
    return torch.autocast('cpu' if x.is_meta else x.device.type, enabled=False)


def _full(x: Tensor, like: Tensor | None = None) -> Tensor:
    """In float32, or float64 if the student (like) is. Inference tensors are copied, to serve backward."""
    x = x.double() if (x if like is None else like).dtype == torch.float64 else x.float()
    compiling = getattr(torch.compiler, 'is_compiling', bool)()  # torch 2.2 cannot tell: False
    return x.clone() if not compiling and x.is_inference() else x


# ------------------------------------------ how the training scripts use it; a copied file may drop this


def feed(kd, s, t, batch):
    return kd(s.fms[-2].mean(dim=(2, 3)), s.out, batch.target)


def build(loss, probe, **options):
    return loss(probe.s.fms[-2].shape[1], probe.num_classes, **options)
