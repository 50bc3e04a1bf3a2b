"""OKDDip, diverse peers: every peer has its own, attention-weighted view of the others; a leader sees all.

D. Chen, J.-P. Mei, C. Wang, Y. Feng, C. Chen, "Online Knowledge Distillation with Diverse Peers", AAAI 2020,
arXiv:1912.00350.

    att[a, b] = softmax over b of (W_q * feats_a).(W_k * feats_b), per sample, b = a included
    t_a = sum over b of att[a, b] * outs_b
    KL(s, t) = T^2 * mean over n of sum over k of p * (log p - log softmax(s / T)),  p = softmax(t / T) + 1e-7
    loss = sum over a of CE(outs_a) + CE(out_leader)
           + kd_weight * (sum over a of KL(outs_a, t_a) + KL(out_leader, mean over a of outs_a))

Tap: logits and pooled embeddings of the peers, logits of the group leader, which is the network that is kept:
branches of one network, or separate networks. Contains its cross-entropy. kd_weight rises over the first 80
of 300 epochs as exp(-5 * (1 - epoch / 80)^2).

Differences: the authors' code, which lets gradients flow into the targets (that is how W_q and W_k learn);
the paper's plain targets are detach=True.

Source: DefangChen/OKDDip-AAAI2020, train_GL.py and utils.py (KL_Loss).

Use:
    >>> import torch
    >>> from okddip import OKDDip
    >>> outs = [torch.randn(8, 10, requires_grad=True) for _ in range(3)]
    >>> feats, leader = [torch.randn(8, 64) for _ in outs], torch.randn(8, 10)
    >>> OKDDip(64)(outs, feats, leader, torch.arange(8)).backward()
    >>> outs[0].grad.norm() > 0
    tensor(True)
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class OKDDip(nn.Module):
    """Cross-entropy, attention-weighted soft targets for the peers, averaged ones for the leader.

    Args:
        feat_dim: width of the peers' embeddings.
        T: temperature, > 0; 3.
        factor: the attention width is max(1, feat_dim // factor); 8.
        detach: no gradient into the targets; False.

    Shape:
        outs: list of M tensors (N, K), feats: list of M tensors (N, feat_dim), or both stacked; out_leader:
        (N, K); target: (N,) labels; kd_weight: of this epoch. Returns a scalar. `terms` returns
        (cross-entropies, peers' KL, leader's KL); `attention` and `targets` the (N, M, M) weights and (N, K,
        M) targets.
        Rows of label -100 are left out. Computed in float32, also under TF32, or in float64 as the student.

    Raises:
        ValueError: T is not positive; shapes do not fit.
    """

    def __init__(self, feat_dim: int, T: float = 3.0, factor: int = 8, detach: bool = False) -> None:
        super().__init__()
        if not T > 0:
            raise ValueError(f'OKDDip: T must be > 0, got {T}')
        self.feat_dim, self.T, self.detach = feat_dim, T, detach
        width = max(1, feat_dim // factor)
        self.query = nn.Linear(feat_dim, width, bias=False)
        self.key = nn.Linear(feat_dim, width, bias=False)

    def forward(
        self,
        outs: list[Tensor],
        feats: list[Tensor],
        out_leader: Tensor,
        target: Tensor,
        kd_weight: float = 1.0,
    ) -> Tensor:
        hard, peers, leader = self.terms(outs, feats, out_leader, target)
        return hard + kd_weight * (peers + leader)

    def terms(self, outs, feats, out_leader, target) -> tuple[Tensor, Tensor, Tensor]:
        _expect('OKDDip', 'out_leader', out_leader, 'N', 'K')
        if not len(outs) or len(feats) != len(outs):
            raise ValueError(
                f'OKDDip: outs and feats must hold equally many tensors, got {len(outs)} and {len(feats)}: '
                'one per peer'
            )
        for i, (z, feat) in enumerate(zip(outs, feats)):
            _expect('OKDDip', f'outs[{i}]', z, *out_leader.shape)
            _expect('OKDDip', f'feats[{i}]', feat, len(z), self.feat_dim)
        target, valid = _labels('OKDDip', target, *out_leader.shape)
        with _no_autocast(out_leader):
            logits = torch.stack([_full(z, outs[0]) for z in (*outs, out_leader)])
            hard = _ce_sum(logits, target, valid)
            logits = logits / self.T
            peers = logits[:-1]
            goals = torch.cat([self.targets(peers, feats).permute(2, 0, 1), peers.mean(dim=0, keepdim=True)])
            kl = self._kl(logits, goals.detach() if self.detach else goals, valid)
            return hard, kl[:-1].sum(), kl[-1]

    def attention(self, feats: list[Tensor]) -> Tensor:
        """(N, M, M): sample, learning peer, peer it listens to."""
        feats = torch.stack([_full(f, feats[0]) for f in feats], dim=1)
        q, k = (_exact(_run(layer, feats)) for layer in (self.query, self.key))
        return F.softmax((q @ k.mT).to(feats.dtype), dim=2)

    def targets(self, outs: Tensor, feats: list[Tensor]) -> Tensor:
        """(N, K, M): the logits that each peer learns from."""
        return (self.attention(feats).to(outs.dtype) @ outs.transpose(0, 1)).mT

    def _kl(self, outs: Tensor, goals: Tensor, valid: Tensor | None) -> Tensor:
        """Of each network, both sides over T already: (M, N, K) -> (M,)."""
        p = goals.softmax(dim=2) + 1e-7
        kl = (p * (p.log() - F.log_softmax(outs, dim=2))).sum(dim=2)
        return _mean(kl.T, valid) * self.T**2


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


def _ce_sum(outs: Tensor, target: Tensor, valid: Tensor | None) -> Tensor:
    """Cross-entropies of M networks, logits (M, N, K), summed: all their rows in one call."""
    m = len(outs)
    valid = valid if valid is None else valid.repeat(m)
    return m * _ce(outs.flatten(0, 1), target.repeat(m), valid)


def _ce(out: Tensor, target: Tensor, valid: Tensor | None) -> Tensor:
    """Cross-entropy, the mean over the rows that count."""
    if valid is None:
        return F.cross_entropy(out, target)
    return _mean(F.cross_entropy(out, target, reduction='none'), valid)


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


def feed(kd, s, t, batch):
    *peers, leader = s
    return kd([f.out for f in peers], [f.feat for f in peers], leader.out, batch.target, batch.inner)


def build(loss, probe, **options):
    return loss(probe.s[0].feat.shape[1], **options)
