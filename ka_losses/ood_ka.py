"""OOD-KA: amalgamation from images of another domain, with a generator that makes better ones.

No publication was found; KamalEngine (2024) names it "Amalgamating Knowledge in the Wild". It is MosaicKD (G.
Fang et al., NeurIPS 2021, arXiv:2110.15094) with two teachers, beside the layer-wise block.

    local   = sum of BCE(d_fake, 1) / N                    patches that look real (d: patch logits)
    bn      = sum over batch norms of [||running_var - var||_2 + ||running_mean - mean||_2]
    adv   = - KL(softmax of both teachers' logits || softmax(out_s))    images the student does not know yet
    oh      = sum over teachers of cross-entropy(out_t, its own argmax)      surely some class
    balance = sum over teachers and classes of p * log2 p, p the batch mean of softmax(out_t)    all classes
    sim     = sum over levels of mean of 1 - |<a_c, b_c'>|, a, b unit channel maps of the two teachers
    loss = w_adv * adv + w_local * local + w_balance * balance + w_bn * bn + w_oh * oh + w_sim * sim
    disc_loss = [sum of BCE(d_fake, 0) + sum of BCE(d_real, 1)] / (2 * N)

Tap: for the generated batch, logits and stage maps of both teachers and the student's logits, the
discriminator's logits, and (x, running_mean, running_var) of every batch norm of both teachers. The student's
own step uses layerwise.py and concat_kd.py.

Differences: NOTHING is detached, the gradient must reach the generator through the teachers. p * log p is 0
at p = 0 in value and gradient; in KamalEngine it is NaN. Exactly two teachers, as in KamalEngine.

Source: zju-vipa/KamalEngine, kamal/amalgamation/ood_ka_amal.py.

Use:
    >>> import torch
    >>> from ood_ka import OODKAGenerator
    >>> w = torch.randn(8, 7, requires_grad=True)
    >>> fms_t, d_fake = [[torch.randn(8, 5, 4, 4)], [torch.randn(8, 6, 4, 4)]], torch.randn(8, 1, 2, 2)
    >>> bn_stats = [(torch.randn(8, 5, 4, 4), torch.zeros(5), torch.ones(5))]
    >>> OODKAGenerator()(w, [w[:, :3], w[:, 3:]], fms_t, d_fake, bn_stats).backward()
    >>> w.grad.norm() > 0
    tensor(True)
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class OODKAGenerator(nn.Module):
    """The generator's objective.

    Args:
        w_adv, w_local, w_balance, w_bn, w_oh, w_sim: weights; 1, 1, 10, 1, 1, 1.

    Shape:
        out_s: (N, K_1 + K_2); outs_t: two of (N, K_i); fms_t: two lists over levels of (N, C, H, W), equal
        sizes per level; d_fake: (N, 1, h, w) logits; bn_stats: list of (x (N, C, H, W), (C,), (C,)). Returns
        a scalar, with return_terms=True also the six terms without weights.
        Computed in float32, also under TF32, or in float64 as the student.

    Raises:
        ValueError: not two teachers; shapes that do not meet.
    """

    def __init__(
        self,
        w_adv: float = 1.0,
        w_local: float = 1.0,
        w_balance: float = 10.0,
        w_bn: float = 1.0,
        w_oh: float = 1.0,
        w_sim: float = 1.0,
    ) -> None:
        super().__init__()
        self.weights = {
            'adv': w_adv,
            'local': w_local,
            'balance': w_balance,
            'bn': w_bn,
            'oh': w_oh,
            'sim': w_sim,
        }

    def forward(
        self,
        out_s: Tensor,
        outs_t: list[Tensor],
        fms_t: list[list[Tensor]],
        d_fake: Tensor,
        bn_stats: list[tuple],
        return_terms: bool = False,
    ):
        if len(outs_t) != 2 or len(fms_t) != 2:
            raise ValueError(
                f'OODKAGenerator: outs_t and fms_t must be of two teachers, '
                f'got {len(outs_t)}, {len(fms_t)}: concat_kd takes more'
            )
        _expect('OODKAGenerator', 'out_s', out_s, 'N', 'K')
        for i, out_t in enumerate(outs_t):
            _expect('OODKAGenerator', f'outs_t[{i}]', out_t, len(out_s), 'C')
        _expect('OODKAGenerator', 'out_s', out_s, len(out_s), sum(out_t.shape[1] for out_t in outs_t))
        _expect('OODKAGenerator', 'd_fake', d_fake, len(out_s), 1, 'H', 'W')
        for i, (x, *moments) in enumerate(bn_stats):
            _expect('OODKAGenerator', f'bn_stats[{i}][0]', x, len(out_s), 'C', 'H', 'W')
            for j, moment in enumerate(moments, 1):
                _expect('OODKAGenerator', f'bn_stats[{i}][{j}]', moment, x.shape[1])
        for i, fms in enumerate(fms_t):
            for k, fm in enumerate(fms):
                _expect('OODKAGenerator', f'fms_t[{i}][{k}]', fm, len(out_s), 'C', 'H', 'W')
        shapes = [[(len(fm), *fm.shape[2:]) for fm in fms] for fms in fms_t]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f'OODKAGenerator: fms_t[1] must have the sizes of fms_t[0], {shapes[0]}, '
                f'got {shapes[1]}: average-pool them'
            )
        out_s, outs_t, d_fake = _full(out_s), [_full(x, out_s) for x in outs_t], _full(d_fake, out_s)
        with _no_autocast(out_s):
            ones = torch.ones_like(d_fake)
            terms = {
                'adv': -_kl(out_s, torch.cat(outs_t, dim=1)),
                'local': F.binary_cross_entropy_with_logits(d_fake, ones, reduction='sum') / len(out_s),
                'balance': sum(_negative_entropy(out_t) for out_t in outs_t),
                'bn': sum(
                    (_bn_distance(*(_full(x, out_s) for x in stats)) for stats in bn_stats),
                    start=out_s.new_zeros(()),
                ),
                'oh': sum(F.cross_entropy(out_t, out_t.argmax(dim=1)) for out_t in outs_t),
                'sim': sum(
                    (_unlikeness(_full(a, out_s), _full(b, out_s)) for a, b in zip(*fms_t)),
                    start=out_s.new_zeros(()),
                ),
            }
            loss = sum(self.weights[name] * term for name, term in terms.items())
        return (loss, terms) if return_terms else loss


def disc_loss(d_real: Tensor, d_fake: Tensor) -> Tensor:
    """The discriminator's objective: patch logits of N real images and N generated, detached ones."""
    _expect('disc_loss', 'd_real', d_real, 'N', *'D' * (d_real.dim() - 1))
    _expect('disc_loss', 'd_fake', d_fake, *d_real.shape)
    d_real, d_fake = _full(d_real), _full(d_fake)
    real = F.binary_cross_entropy_with_logits(d_real, torch.ones_like(d_real), reduction='sum')
    fake = F.binary_cross_entropy_with_logits(d_fake, torch.zeros_like(d_fake), reduction='sum')
    return (real + fake) / (2 * len(d_fake))


def _kl(out_s: Tensor, out_t: Tensor) -> Tensor:
    log_q, log_p = F.log_softmax(out_s, dim=1), F.log_softmax(out_t, dim=1)
    p, log_p = log_p.exp(), log_p.masked_fill(log_p == -torch.inf, 0.0)  # 0 * -inf has no gradient
    log_q = log_q.masked_fill((p == 0) & (log_q == -torch.inf), 0.0)
    return torch.where(p == 0, 0.0, p * (log_p - log_q)).sum(dim=1).mean()


def _negative_entropy(out_t: Tensor) -> Tensor:
    p = F.softmax(out_t, dim=1).mean(dim=0)
    return (p * p.clamp(min=torch.finfo(p.dtype).tiny).log2()).sum()


def _bn_distance(x: Tensor, running_mean: Tensor, running_var: Tensor) -> Tensor:
    mean = x.mean(dim=(0, 2, 3))
    var = x.var(dim=(0, 2, 3), unbiased=False)
    return torch.linalg.vector_norm(running_var - var) + torch.linalg.vector_norm(running_mean - mean)


def _unlikeness(a: Tensor, b: Tensor) -> Tensor:
    a, b = F.normalize(a.flatten(2), dim=2), F.normalize(b.flatten(2), dim=2)
    return (1 - (_exact(a) @ _exact(b).transpose(1, 2)).abs()).mean().to(a.dtype)


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
