"""ZSKT, zero-shot knowledge transfer: a generator raises the divergence of student and teacher.

P. Micaelli, A. Storkey, "Zero-shot Knowledge Transfer via Adversarial Belief Matching", NeurIPS 2019,
arXiv:1905.09768.

    KL = mean over n, k of p_t * (log p_t - log p_s), p = softmax(out)
    a(fm) = mean over channels of fm^2, flattened, divided by its length
    AT = sum over stages of mean over n and positions of (a(fm_s) - a(fm_t))^2
    loss = KL + at * AT                                                     the student's
    generator_loss = - KL

Tap: the logits, and for the student the maps at the end of the stages. One update of the generator, then ten
of the student on the same noise.

Differences: KL is the mean over all N * K entries, which is what F.kl_div does by default and what the
authors have: the sum over the classes divided by K. In generator_loss NOTHING is detached.

Source: polo5/ZeroShotKnowledgeTransfer, solver.py and utils/helpers.py; formula only where that is not clear.

Use:
    >>> import torch
    >>> from zskt import ZSKT
    >>> out_s, out_t = torch.randn(8, 10, requires_grad=True), torch.randn(8, 10)
    >>> fms_s, fms_t = [torch.randn(8, 4, 6, 6)], [torch.randn(8, 5, 6, 6)]
    >>> ZSKT()(out_s, out_t, fms_s, fms_t).backward()
    >>> out_s.grad.norm() > 0
    tensor(True)
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ZSKT(nn.Module):
    """Divergence of predictions, and of spatial attention for the student.

    Args:
        at: weight of the attention maps, 250.

    Shape:
        out_s, out_t: (N, K), equal; fms_s, fms_t: lists over stages of (N, C, H, W), channels may differ.
        Returns a scalar. forward: no gradient reaches the teacher; generator_loss(out_s, out_t): gradients
        reach both. Computed in float32, or in float64 as the student.

    Raises:
        ValueError: shapes that do not meet.
    """

    def __init__(self, at: float = 250.0) -> None:
        super().__init__()
        self.at = at

    def forward(self, out_s: Tensor, out_t: Tensor, fms_s: list[Tensor], fms_t: list[Tensor]) -> Tensor:
        if len(fms_s) != len(fms_t) or not len(fms_s):
            raise ValueError(
                f'ZSKT: fms_s and fms_t must be of the same stages, got {len(fms_s)} and {len(fms_t)}: '
                'leave stages out'
            )
        kl, attention = self._divergence(out_s, out_t.detach()), 0
        for k, (fm_s, fm_t) in enumerate(zip(fms_s, fms_t)):
            _expect('ZSKT', f'fms_s[{k}]', fm_s, len(out_s), 'C', 'H', 'W')
            _expect('ZSKT', f'fms_t[{k}]', fm_t, len(out_s), 'C', *fm_s.shape[2:])
            difference = _attention(_full(fm_s, out_s)) - _attention(_full(fm_t.detach(), out_s))
            attention = attention + difference.square().mean()
        return kl + self.at * attention

    def generator_loss(self, out_s: Tensor, out_t: Tensor) -> Tensor:
        return -self._divergence(out_s, out_t)

    def _divergence(self, out_s: Tensor, out_t: Tensor) -> Tensor:
        _expect('ZSKT', 'out_s', out_s, 'N', 'K')
        _expect('ZSKT', 'out_t', out_t, *out_s.shape)
        return _kl(_full(out_s), _full(out_t, out_s)) / out_s.shape[1]


def _attention(fm: Tensor) -> Tensor:
    # divided by its largest entry first: the square of a tiny map would be 0, of a huge one inf
    scale = fm.detach().abs().amax(dim=(1, 2, 3), keepdim=True)
    return _unit((fm / torch.where(scale == 0, 1.0, scale)).square().mean(dim=1).flatten(1))


def _kl(out_s: Tensor, out_t: Tensor) -> Tensor:
    log_q, log_p = F.log_softmax(out_s, dim=1), F.log_softmax(out_t, dim=1)
    p, log_p = log_p.exp(), log_p.masked_fill(log_p == -torch.inf, 0.0)  # 0 * -inf has no gradient
    log_q = log_q.masked_fill((p == 0) & (log_q == -torch.inf), 0.0)
    return torch.where(p == 0, 0.0, p * (log_p - log_q)).sum(dim=1).mean()


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


def _unit(x: Tensor) -> Tensor:
    """Rows divided by their length; a zero row stays zero and gets no gradient."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / norm.masked_fill(norm <= 1e-12, torch.inf)  # NaN is not: it must show in the loss


def _full(x: Tensor, like: Tensor | None = None) -> Tensor:
    """In float32, or float64 if the student (like) is. Inference tensors are copied, to serve backward."""
    x = x.double() if (x if like is None else like).dtype == torch.float64 else x.float()
    compiling = getattr(torch.compiler, 'is_compiling', bool)()  # torch 2.2 cannot tell: False
    return x.clone() if not compiling and x.is_inference() else x


# ------------------------------------------ how the training scripts use it; a copied file may drop this


def feed(kd, made):
    return {'adv': kd.generator_loss(made.s.out, made.t.out)}


def student(kd, s, t, T):
    if len(s.fms) != len(t.fms):
        raise ValueError(
            f'zskt: compares the maps of every stage, got a student with {len(s.fms) - 1} and a teacher with '
            f'{len(t.fms) - 1}: take networks of as many stages, or dfad, which has no maps'
        )
    sizes = [fm.shape[2:] for fm in s.fms[1:]]
    fms_t = [F.adaptive_avg_pool2d(fm, size) for fm, size in zip(t.fms[1:], sizes)]
    return kd(s.out, t.out, s.fms[1:], fms_t)
