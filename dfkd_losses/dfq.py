"""DFQ, data-free adversarial distillation for quantisation: sure, balanced, like the training data, unknown.

Y. Choi, J. Choi, M. El-Khamy, J. Lee, "Data-Free Network Quantization With Adversarial Knowledge
Distillation", CVPR Workshops 2020, arXiv:2005.04136.

    p = softmax(out_t), pbar = mean over n of p
    oh_loss = mean over n of cross-entropy(out_t, its own argmax)
    balance_loss = sum over k of pbar * log(pbar)
    adv_loss = - mean over n of KL(p || softmax(out_s))
    bn_loss = sum over batch norms of [||running_var - var||_2 + ||running_mean - mean||_2]
    loss = bn * bn_loss + oh * oh_loss + balance * balance_loss + adv * adv_loss

Tap: on the generated batch the logits of both networks, and what enters each batch norm of the teacher
(BatchNormDistance hooks it; any nn.BatchNorm2d with running statistics).

Differences: NOTHING is detached, the gradient reaches the images through both networks. Weights and schedule
are those of a later comparison, not of the paper, whose code is not public.

Source: zju-vipa/CMI, datafree/synthesis/generative.py.

Use:
    >>> import torch
    >>> from dfq import DFQ
    >>> out_s, out_t = torch.randn(8, 10), torch.randn(8, 10, requires_grad=True)
    >>> DFQ()(out_s, out_t, bn_loss=out_t.square().mean()).backward()
    >>> out_t.grad.norm() > 0
    tensor(True)
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DFQ(nn.Module):
    """The generator's loss.

    Args:
        adv, bn, oh, balance: weights, 1, 1, 1, 20.

    Shape:
        out_s, out_t: (N, K), equal; bn_loss: scalar, of BatchNormDistance. Returns a scalar; `terms` returns
        the four without weights. Computed in float32, or in float64 as the student.

    Raises:
        ValueError: shapes that do not meet.
    """

    def __init__(self, adv: float = 1.0, bn: float = 1.0, oh: float = 1.0, balance: float = 20.0) -> None:
        super().__init__()
        self.adv, self.bn, self.oh, self.balance = adv, bn, oh, balance

    def forward(self, out_s: Tensor, out_t: Tensor, bn_loss: Tensor) -> Tensor:
        terms = self.terms(out_s, out_t, bn_loss)
        return sum(getattr(self, name) * term for name, term in terms.items())

    def terms(self, out_s: Tensor, out_t: Tensor, bn_loss: Tensor) -> dict[str, Tensor]:
        _expect('DFQ', 'out_s', out_s, 'N', 'K')
        _expect('DFQ', 'out_t', out_t, *out_s.shape)
        _expect('DFQ', 'bn_loss', bn_loss)
        out_s, out_t = _full(out_s), _full(out_t, out_s)
        pbar = F.softmax(out_t, dim=1).mean(dim=0)
        return {
            'adv': -_kl(out_s, out_t),
            'bn': _full(bn_loss, out_s),
            'oh': F.cross_entropy(out_t, out_t.argmax(dim=1)),
            'balance': (pbar * pbar.clamp(min=torch.finfo(pbar.dtype).tiny).log()).sum(),
        }


class BatchNormDistance:
    """After each forward pass of a network, loss() says how far its batch norms are from their statistics.

    Raises:
        ValueError: the network has no nn.BatchNorm2d with running statistics.
    """

    def __init__(self, net: nn.Module) -> None:
        self.norms, self.seen = _batch_norms('BatchNormDistance', net), {}
        self.hooks = [m.register_forward_pre_hook(self._see) for m in self.norms]

    def _see(self, norm: nn.Module, inputs: tuple) -> None:
        self.seen[norm] = inputs[0], torch.is_grad_enabled()

    def __getstate__(self) -> dict:
        return {**vars(self), 'seen': {}}  # neither copied nor pickled: a graph cannot be

    def loss(self) -> Tensor:
        seen, self.seen = _seen('BatchNormDistance', self.norms, self.seen), {}
        return sum(
            _bn_distance(x, _full(m.running_mean, x), _full(m.running_var, x))
            for m, x in zip(self.norms, seen)
        )

    def remove(self) -> None:
        for hook in self.hooks:
            hook.remove()


def _kl(out_s: Tensor, out_t: Tensor) -> Tensor:
    log_q, log_p = F.log_softmax(out_s, dim=1), F.log_softmax(out_t, dim=1)
    p, log_p = log_p.exp(), log_p.masked_fill(log_p == -torch.inf, 0.0)  # 0 * -inf has no gradient
    log_q = log_q.masked_fill((p == 0) & (log_q == -torch.inf), 0.0)
    return torch.where(p == 0, 0.0, p * (log_p - log_q)).sum(dim=1).mean()


def _seen(who: str, norms: list[nn.BatchNorm2d], inputs: dict) -> list[Tensor]:
    """What entered the batch norms in the last forward pass, in full precision."""
    if len(inputs) < len(norms) or any(m not in inputs for m in norms):
        raise ValueError(
            f'{who}: loss() needs a forward pass of the teacher, got {sum(m in inputs for m in norms)} of '
            f'{len(norms)} batch norms: call the teacher first, and not in nn.DataParallel, whose copies are '
            'other modules'
        )
    if torch.is_grad_enabled() and not all(with_grad for _, with_grad in inputs.values()):
        raise ValueError(
            f'{who}: loss() must have a gradient, got a forward pass without one: activation checkpointing '
            'around the teacher needs use_reentrant=False; where no gradient is meant, call loss() in '
            'torch.no_grad(), too'
        )
    return [_full(inputs[m][0]) for m in norms]


def _batch_norms(who: str, net: nn.Module) -> list[nn.BatchNorm2d]:
    """Those with running statistics, in the order of named_modules."""
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    tracked = [m for m in norms if m.running_mean is not None]
    if not norms or len(tracked) < len(norms):
        raise ValueError(
            f'{who}: needs a teacher whose nn.BatchNorm2d have running statistics, got {len(norms)} of them, '
            f'{len(tracked)} with statistics: take a method that needs none, such as DAFL or DFAD'
        )
    return norms


def _bn_distance(x: Tensor, running_mean: Tensor, running_var: Tensor) -> Tensor:
    mean = x.mean(dim=(0, 2, 3))
    var = x.var(dim=(0, 2, 3), unbiased=False)
    return torch.linalg.vector_norm(running_var - var) + torch.linalg.vector_norm(running_mean - mean)


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


def build(loss, probe, weights, options):
    kd = loss(**weights, **options)
    kd.distance = BatchNormDistance(probe.net_t)
    return kd


def feed(kd, made):
    return kd.terms(made.s.out, made.t.out, kd.distance.loss())
