"""TeKAP, teacher knowledge augmentation by perturbation: noisy copies of one teacher beside itself.

M. I. Hossain, S. Akhter, C. S. Hong, E.-N. Huh, "Single Teacher, Multiple Perspectives: Teacher Knowledge
Augmentation for Enhanced Knowledge Distillation", ICLR 2025.

    KL(y) = T^2 * mean over n of KL(softmax(y / T) || softmax(out_s / T))
    y_m = (1 - noise) * out_t + noise * e_m, e_m ~ N(0, 1), drawn anew in every step, m = 1 .. copies
    loss = KL(out_t) + w_noisy * sum over m of KL(y_m)

Tap: the logits. The sum makes the divergence weigh 1 + w_noisy * copies, 3.4. For embeddings `perturb` gives
the copies: with CRD's parts s(feat_t) + t(feat_t) the authors' loss is 2 s(feat_t) + t(feat_t) + t(copy),
copy = perturb(feat_t, 0.1, 0.1), from two complete calls of CRD.

Differences: none from the authors' code for logits, which writes the copies out by hand. What a copy changes
is mostly the factor 1 - noise, a higher temperature; more diversity needs a larger noise.

Cost: the gradient needs the student's log-softmax once and the sum of the copies' probabilities.

Source: mdimtiazh/TeKAP, distiller_zoo/Ours_TeKAP_L.py (DistillKL).

Use:
    >>> import torch
    >>> from tekap import TeKAP
    >>> out_s, out_t = torch.randn(8, 10, requires_grad=True), torch.randn(8, 10)
    >>> TeKAP()(out_s, out_t).backward()
    >>> out_s.grad.norm() > 0
    tensor(True)
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def perturb(
    x: Tensor,
    mix: float,
    scale: float = 1.0,
    sample: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """(1 - mix) * x + mix * scale * e, e = sample, or drawn from N(0, 1)."""
    if sample is None:
        sample = torch.randn(x.shape, dtype=x.dtype, device=x.device, **_by(generator))
    return (1 - mix) * x + mix * scale * sample


class TeKAP(nn.Module):
    """Soft targets from the teacher and from noisy copies of it.

    Args:
        T: temperature, > 0; 4.
        copies: number of noisy copies, at least 1; 3.
        noise: share of noise in a copy, in [0, 1); 0.1.
        w_noisy: weight of each copy; 0.8.

    Shape:
        out_s, out_t: (N, K), equal, K >= 2; noise_t: (copies, N, K) standard normal numbers instead of drawn
        ones; generator: where to draw from. Returns a scalar. No gradient reaches out_t. A teacher logit of
        -inf is probability 0, also in the copies. `terms` returns (KL of the teacher, sum of the copies').
        Computed in float32, or in float64 as the student.

    Raises:
        ValueError: an argument is not legal; the shapes differ or are not (N, K).
    """

    def __init__(self, T: float = 4.0, copies: int = 3, noise: float = 0.1, w_noisy: float = 0.8) -> None:
        super().__init__()
        if not T > 0 or copies < 1 or not 0 <= noise < 1:
            raise ValueError(
                f'TeKAP: T > 0, copies >= 1 and 0 <= noise < 1 are needed, got {T}, {copies} and {noise}'
            )
        self.T, self.copies, self.noise, self.w_noisy = T, copies, noise, w_noisy

    def forward(
        self,
        out_s: Tensor,
        out_t: Tensor,
        noise_t: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        plain, noisy = self.terms(out_s, out_t, noise_t, generator)
        return plain + self.w_noisy * noisy

    def terms(self, out_s, out_t, noise_t=None, generator=None) -> tuple[Tensor, Tensor]:
        _expect('TeKAP', 'out_s', out_s, 'N', 'K')
        _expect('TeKAP', 'out_t', out_t, *out_s.shape)
        log_p_s = F.log_softmax(_full(out_s) / self.T, dim=1)
        out_t = _full(out_t.detach(), out_s)
        if noise_t is not None:
            _expect('TeKAP', 'noise_t', noise_t, self.copies, *out_s.shape)
            noise_t = _full(noise_t.detach(), out_s)
        copies = perturb(out_t.expand(self.copies, -1, -1), self.noise, 1.0, noise_t, generator)
        return tuple(self._divergences(y, log_p_s) * self.T**2 for y in (out_t[None], copies))

    def _divergences(self, y: Tensor, log_p_s: Tensor) -> Tensor:
        """Sum over the copies y (M, N, K) of KL: their negative entropies, and one cross-entropy with the
        sum of their probabilities."""
        log_p = F.log_softmax(y / self.T, dim=2)
        p = log_p.exp()
        negentropy = torch.where(p == 0, 0.0, p * log_p).sum(dim=(0, 2))
        p = p.sum(dim=0)
        return (negentropy - torch.where(p == 0, 0.0, p * log_p_s).sum(dim=1)).mean()


def _by(generator: torch.Generator | None) -> dict:
    """Left out where there is none: torch.compile cannot pass None for a batch of another size."""
    return {} if generator is None else {'generator': generator}


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
    return kd(s.out, t.out, generator=batch.generator)
