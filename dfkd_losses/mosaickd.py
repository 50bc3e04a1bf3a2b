"""MosaicKD: images of another domain lend their patches, the teacher says how to put them together.

G. Fang, Y. Bao, J. Song, X. Wang, D. Xie, C. Shen, M. Song, "Mosaicking to Distill: Knowledge Distillation
from Out-of-Domain Data", NeurIPS 2021, arXiv:2110.15094.

    p = softmax(out_t), pbar = mean over n of p, BCE = binary cross-entropy with logits
    align_loss = mean over n of the entropy of p_n                         surely some class
    local_loss = sum over n and patches of BCE(d_fake, 1), / N             patches that look real
    adv_loss = - mean over n of KL(p_n || softmax(out_s))                  unknown to the student
    balance_loss = sum over k of pbar * log2(pbar)                         all classes
    loss = adv * adv_loss + align * align_loss + local * local_loss + balance * balance_loss
    discriminator_loss = local * (sum of BCE(d_fake, 0) + sum of BCE(d_real, 1)) / (2 N)

Tap: on the generated batch the logits of both networks and the discriminator's logits per patch; for the
discriminator those of detached generated images and of real ones of the other domain. The student learns from
N generated and N real ones.

Differences: NOTHING is detached in the generator's loss. The entropies are 0 at p = 0, in value and gradient.
The sum over patches is divided by N only, as the authors do: 64 patches per 32x32 image.

Source: zju-vipa/MosaicKD, kd_mosaic.py.

Use:
    >>> import torch
    >>> from mosaickd import MosaicKD
    >>> out_t, d_fake = torch.randn(8, 10, requires_grad=True), torch.randn(8, 1, 4, 4)
    >>> MosaicKD()(torch.randn(8, 10), out_t, d_fake).backward()
    >>> out_t.grad.norm() > 0
    tensor(True)
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MosaicKD(nn.Module):
    """The generator's loss, and the discriminator's.

    Args:
        adv, align, local, balance: weights, 1, 1, 1, 10 (CIFAR-100 from CIFAR-10).

    Shape:
        out_s, out_t: (N, K), equal; d_fake, d_real: (N, 1, h, w) logits. Returns a scalar; `terms` returns
        the four without weights. Computed in float32, or in float64 as the logits.

    Raises:
        ValueError: shapes that do not meet.
    """

    def __init__(
        self, adv: float = 1.0, align: float = 1.0, local: float = 1.0, balance: float = 10.0
    ) -> None:
        super().__init__()
        self.weights = {'adv': adv, 'align': align, 'local': local, 'balance': balance}

    def forward(self, out_s: Tensor, out_t: Tensor, d_fake: Tensor) -> Tensor:
        terms = self.terms(out_s, out_t, d_fake)
        return sum(self.weights[name] * term for name, term in terms.items())

    def terms(self, out_s: Tensor, out_t: Tensor, d_fake: Tensor) -> dict[str, Tensor]:
        _expect('MosaicKD', 'out_s', out_s, 'N', 'K')
        _expect('MosaicKD', 'out_t', out_t, *out_s.shape)
        _expect('MosaicKD', 'd_fake', d_fake, len(out_s), 1, 'H', 'W')
        out_s, out_t, d_fake = _full(out_s), _full(out_t, out_s), _full(d_fake, out_s)
        log_p = F.log_softmax(out_t, dim=1)
        p, log_p = log_p.exp(), log_p.masked_fill(log_p == -torch.inf, 0.0)  # 0 * -inf has no gradient
        return {
            'adv': -_kl(out_s, out_t),
            'align': -torch.where(p == 0, 0.0, p * log_p).sum(dim=1).mean(),
            'local': _patches(d_fake, 1.0) / len(d_fake),
            'balance': _negative_entropy(out_t),
        }

    def discriminator_loss(self, d_fake: Tensor, d_real: Tensor) -> Tensor:
        _expect('MosaicKD', 'd_fake', d_fake, 'N', 1, 'H', 'W')
        _expect('MosaicKD', 'd_real', d_real, *d_fake.shape)
        d_fake, d_real = _full(d_fake), _full(d_real, d_fake)
        return self.weights['local'] * (_patches(d_fake, 0.0) + _patches(d_real, 1.0)) / (2 * len(d_fake))


def _patches(d: Tensor, wanted: float) -> Tensor:
    return F.binary_cross_entropy_with_logits(d, torch.full_like(d, wanted), reduction='sum')


def _kl(out_s: Tensor, out_t: Tensor) -> Tensor:
    log_q, log_p = F.log_softmax(out_s, dim=1), F.log_softmax(out_t, dim=1)
    p, log_p = log_p.exp(), log_p.masked_fill(log_p == -torch.inf, 0.0)  # 0 * -inf has no gradient
    log_q = log_q.masked_fill((p == 0) & (log_q == -torch.inf), 0.0)
    return torch.where(p == 0, 0.0, p * (log_p - log_q)).sum(dim=1).mean()


def _negative_entropy(out_t: Tensor) -> Tensor:
    p = F.softmax(out_t, dim=1).mean(dim=0)
    return (p * p.clamp(min=torch.finfo(p.dtype).tiny).log2()).sum()


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


def feed(kd, made):
    return kd.terms(made.s.out, made.t.out, made.d_fake)
