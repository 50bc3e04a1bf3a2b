"""ONE, on-the-fly native ensemble: branches of one network learn from their own gated ensemble.

X. Lan, X. Zhu, S. Gong, "Knowledge Distillation by On-the-Fly Native Ensemble", NeurIPS 2018,
arXiv:1806.04606.

    g = softmax over branches of ReLU(batch norm of a linear map of feat)             the gate, learned
    z = sum over m of g_m * outs_m                                                      the ensemble
    q = softmax(z / T) + 1e-7, no gradient
    q_m = softmax(outs_m / T)
    loss = sum over m of CE(outs_m) + CE(z)
           + kd_weight * T^2 * sum over m of mean over n of sum over k of q * (log q - log q_m)

Tap: a network with a shared trunk and M last stages: their logits, and the trunk's pooled map. No teacher.
Contains its cross-entropy. kd_weight rises over the first 80 of 300 epochs as exp(-5 * (1 - epoch / 80)^2).
In use: one branch (ONE) or the ensemble (ONE-E).

Differences: the authors' code (the ReLU keeps gate logits at or above 0). In training mode a batch of one is
normalised with the running statistics.

Source: Lan1991Xu/ONE_NeurIPS2018, cifar_one.py, loss/kl_loss.py (KLLoss), models/cifar/resnet.py
(ONE_ResNet).

Use:
    >>> import torch
    >>> from one import ONE
    >>> outs, feat = [torch.randn(8, 10, requires_grad=True) for _ in range(3)], torch.randn(8, 64)
    >>> ONE(64)(outs, feat, torch.arange(8)).backward()
    >>> outs[0].grad.norm() > 0
    tensor(True)
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ONE(nn.Module):
    """Cross-entropy of branches and ensemble, and soft targets from the ensemble to the branches.

    Args:
        feat_dim: width of feat.
        num_branches: M; 3.
        T: temperature, > 0; 3.

    Shape:
        outs: list of M tensors (N, K), or stacked (M, N, K); feat: (N, feat_dim); target: (N,) labels;
        kd_weight: of this epoch. Returns a scalar. `terms` returns (cross-entropies, KD); `ensemble` is z of
        the last call, detached.
        Rows of label -100 are left out. Computed in float32, or in float64 as the student.

    Raises:
        ValueError: T is not positive; shapes do not fit.
    """

    def __init__(self, feat_dim: int, num_branches: int = 3, T: float = 3.0) -> None:
        super().__init__()
        if not T > 0:
            raise ValueError(f'ONE: T must be > 0, got {T}')
        self.feat_dim, self.num_branches, self.T = feat_dim, num_branches, T
        self.gate = nn.Linear(feat_dim, num_branches)
        self.norm = nn.BatchNorm1d(num_branches)
        self.ensemble = None

    def forward(self, outs: list[Tensor], feat: Tensor, target: Tensor, kd_weight: float = 1.0) -> Tensor:
        hard, kd = self.terms(outs, feat, target)
        return hard + kd_weight * kd

    def terms(self, outs: list[Tensor], feat: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        if len(outs) != self.num_branches:
            raise ValueError(
                f'ONE: outs must hold {self.num_branches} tensors, got {len(outs)}: one per branch'
            )
        for i, z in enumerate(outs):
            _expect('ONE', f'outs[{i}]', z, *(('N', 'K') if i == 0 else outs[0].shape))
        _expect('ONE', 'feat', feat, len(outs[0]), self.feat_dim)
        target, valid = _labels('ONE', target, *outs[0].shape)
        with _no_autocast(feat):
            outs = torch.stack([_full(z, outs[0]) for z in outs])
            z = self.combine(outs, feat)
            self.ensemble = z.detach()
            hard = _ce_sum(outs, target, valid) + _ce(z, target, valid)
            # one target for all branches, so their logarithms can be summed
            q = (z.detach() / self.T).softmax(dim=1) + 1e-7
            log_p = F.log_softmax(outs / self.T, dim=2).sum(dim=0)
            return hard, _per_sample(q * (len(outs) * q.log() - log_p), valid) * self.T**2

    def combine(self, outs: Tensor, feat: Tensor) -> Tensor:
        """Branches' logits (M, N, K) and trunk features (N, feat_dim) -> the ensemble's logits (N, K)."""
        with _no_autocast(feat):
            outs = _full(outs)
            x = _run(self.gate, _full(feat, outs[0]))
            if self.training and len(x) == 1:
                n = self.norm
                known = (_full(t, x) for t in (n.running_mean, n.running_var, n.weight, n.bias))
                x = F.batch_norm(x, *known, eps=n.eps)
            else:
                x = _run(self.norm, x)
            return (F.softmax(x.relu(), dim=1).T[..., None] * outs).sum(dim=0)


class Branches(nn.Module):
    """One trunk, several last stages and classifiers.

    Args:
        nets: fresh networks of one architecture; the first gives the trunk and a branch, the others a branch.
            `net(x, True)` gives (out, feat, fms, pres, extra), `net.after(k, fm)` goes on from its k-th map.
        f: what `nets[0](x, True)` gives for a few images, to tell the branch from the trunk.

    Shape:
        x: (N, 3, H, W). Returns a list of the networks' tuples, one per branch.
    """

    def __init__(self, nets: list, f) -> None:
        super().__init__()
        self.nets = nn.ModuleList(nets)
        ran = _modules_after(nets[0], f)
        inside = tuple(f'{name}.' for name in ran)  # parts that a module uses without calling them, too
        self.of_branch = {key for key in nets[0].state_dict() if key.startswith(inside)}
        for net in nets[1:]:  # what comes before the last stage is never used
            for name, _ in list(net.named_children()):
                if not any(part == name or part.startswith(f'{name}.') for part in ran):
                    setattr(net, name, nn.Identity())
            for name, p in net.named_parameters():
                if name not in self.of_branch:
                    p.requires_grad_(False)

    def weights(self, k: int) -> dict:
        """State dict of the k-th branch with the trunk, as one network."""
        branch = self.nets[k].state_dict()
        return {**self.nets[0].state_dict(), **{key: branch[key] for key in self.of_branch}}

    def forward(self, x: Tensor) -> list:
        first, *others = self.nets
        f = first(x, True)
        k = len(f.fms) - 2
        ends = [net.after(k, f.fms[k]) for net in others]
        return [f, *(e._replace(fms=f.fms[:-1] + e.fms, pres=f.pres[:-1] + e.pres) for e in ends)]


@torch.no_grad()
def _modules_after(net, f) -> set[str]:
    """Names of the modules that run from the last map but one to the logits."""
    ran, was, k = set(), net.training, len(f.fms) - 2
    hooks = [m.register_forward_hook(lambda *_, name=name: ran.add(name)) for name, m in net.named_modules()]
    net.eval().after(k, f.fms[k])
    net.train(was)
    for hook in hooks:
        hook.remove()
    return ran


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


def _per_sample(x: Tensor, valid: Tensor | None, axis: int = 0) -> Tensor:
    """The sum over all axes but that of the samples, and the mean over the samples that count."""
    if valid is None:
        return x.sum() / x.shape[axis]
    return _mean(x.movedim(axis, 0).flatten(1).sum(dim=1), valid)


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
    return kd([f.out for f in s], s[0].fms[-2].mean(dim=(2, 3)), batch.target, batch.inner)


def build(loss, probe, **options):
    return loss(probe.s[0].fms[-2].shape[1], len(probe.s), **options)


def peers(nets, probe):
    """Branches of one trunk."""
    if len({str(net) for net in nets}) > 1:
        raise ValueError('ONE: branches of one trunk need networks of one architecture')
    return Branches(nets, probe.s[0])


def ensemble(kd, s):
    return kd.combine(torch.stack([f.out for f in s]), s[0].fms[-2].mean(dim=(2, 3)))
