"""CMI, contrastive model inversion: an inverted image must differ from all that were inverted before.

G. Fang, J. Song, X. Wang, C. Shen, X. Wang, M. Song, "Contrastive Model Inversion for Data-Free Knowledge
Distillation", IJCAI 2021, arXiv:2105.08584.

    h = Linear(D, D), ReLU, Linear(D, P), divided by its length
    A = h([local; bank's local half]),  B = h([global_; bank's global half]), a constant
    ce_i = cross-entropy of row i of A B^T / T, whose right answer is i
    loss = mean of ce_i over the batch + mean of ce_i over the bank
    masked_adversarial = - sum of KL(softmax(out_t) || softmax(out_s)) where both say the same class, / N

Tap: local, global_: of two views of the same images, the mean over positions of what enters each batch norm
of the teacher, joined (Embedding hooks it); bank: such rows [local, global] of earlier images. The trainer
adds bn * (distance of batch norms) + oh * CE(out_t, target) + adv * masked_adversarial, of the global view.

Differences: none in value. The gradient reaches images through `local` only, as in the authors' code; in
masked_adversarial nothing is detached. The bank wraps row by row, so its size need not be a multiple of the
batch, and it hands out rows that were written only. A zero row of h stays zero.

Source: zju-vipa/CMI, datafree/synthesis/contrastive.py.

Use:
    >>> import torch
    >>> from cmi import CMI
    >>> local, global_ = torch.randn(8, 20, requires_grad=True), torch.randn(8, 20)
    >>> CMI(20)(local, global_).backward()
    >>> local.grad.norm() > 0
    tensor(True)
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class CMI(nn.Module):
    """The contrastive loss, with its projection head.

    Args:
        feat_dim: D, width of local and global_.
        proj_dim: P, 256.
        T: temperature, > 0; 0.1.

    Shape:
        local, global_: (N, D); bank: (M, 2 D) or None. Returns a scalar. No gradient reaches global_
        and bank. Computed in float32, also under TF32 (but for the head's layers), or in float64 as local.

    Raises:
        ValueError: T is not positive; shapes that do not meet.
    """

    def __init__(self, feat_dim: int, proj_dim: int = 256, T: float = 0.1) -> None:
        super().__init__()
        if not T > 0:
            raise ValueError(f'CMI: T must be > 0, got {T}')
        self.feat_dim, self.T = feat_dim, T
        self.fc1, self.fc2 = nn.Linear(feat_dim, feat_dim), nn.Linear(feat_dim, proj_dim)

    def forward(self, local: Tensor, global_: Tensor, bank: Tensor | None = None) -> Tensor:
        n, D = len(local), self.feat_dim
        _expect('CMI', 'local', local, 'N', D)
        _expect('CMI', 'global_', global_, n, D)
        a, b = _full(local), _full(global_.detach(), local)
        if bank is not None and len(bank):
            _expect('CMI', 'bank', bank, 'M', 2 * D)
            bank = _full(bank.detach(), local)
            a, b = torch.cat([a, bank[:, :D]]), torch.cat([b, bank[:, D:]])
        with _no_autocast(a):
            a = self._project(a)
            with torch.no_grad():
                b = self._project(b)
            scores = (_exact(a) @ _exact(b).T).to(a.dtype) / self.T
        ce = F.cross_entropy(scores, torch.arange(len(a), device=a.device), reduction='none')
        return ce[:n].mean() + (ce[n:].mean() if len(a) > n else 0)

    def _project(self, x: Tensor) -> Tensor:
        return _unit(_run(self.fc2, _run(self.fc1, x).relu()))


class MemoryBank(nn.Module):
    """A ring of rows.

    Args:
        size: how many rows it keeps, 40960.
        dim: their length.
    """

    def __init__(self, size: int = 40960, dim: int = 2) -> None:
        super().__init__()
        self.size, self.dim = size, dim
        self.register_buffer('rows', torch.zeros(0, dim))  # grows until it is full
        self.written = 0

    def add(self, rows: Tensor) -> None:
        _expect('MemoryBank', 'rows', rows, 'N', self.dim)
        rows = rows.detach().to(self.rows)[-self.size :]
        room = min(self.size - len(self.rows), len(rows))
        self.rows = torch.cat([self.rows, rows[:room]])
        place = torch.arange(len(rows) - room, device=rows.device) + self.written
        self.rows[place % self.size] = rows[room:]
        self.written = (self.written + len(rows) - room) % self.size

    def draw(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Up to n rows, without replacement."""
        order = torch.randperm(len(self.rows), generator=generator)[:n]
        return self.rows[order.to(self.rows.device)]

    def get_extra_state(self) -> int:
        return self.written

    def set_extra_state(self, written: int) -> None:
        self.written = written

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        self.rows = self.rows.new_zeros(state_dict[f'{prefix}rows'].shape)
        super()._load_from_state_dict(state_dict, prefix, *args)


class Embedding:
    """After each forward pass of the teacher: what entered its batch norms.

    Args:
        teacher: a network with nn.BatchNorm2d.

    Raises:
        ValueError: the network has no nn.BatchNorm2d with running statistics.
    """

    def __init__(self, teacher: nn.Module) -> None:
        self.norms, self.seen = _batch_norms('Embedding', teacher), {}
        self.dim = sum(m.num_features for m in self.norms)
        self.hooks = [m.register_forward_pre_hook(self._see) for m in self.norms]

    def _see(self, norm: nn.Module, inputs: tuple) -> None:
        self.seen[norm] = inputs[0], torch.is_grad_enabled()

    def __getstate__(self) -> dict:
        return {**vars(self), 'seen': {}}  # neither copied nor pickled: a graph cannot be

    def instances(self) -> Tensor:
        """(N, D) means over positions."""
        return torch.cat([x.mean(dim=(2, 3)) for x in _seen('Embedding', self.norms, self.seen)], dim=1)

    def loss(self) -> Tensor:
        """Distance to the running statistics."""
        seen, self.seen = _seen('Embedding', self.norms, self.seen), {}
        return sum(
            _bn_distance(x, _full(m.running_mean, x), _full(m.running_var, x))
            for m, x in zip(self.norms, seen)
        )

    def remove(self) -> None:
        for hook in self.hooks:
            hook.remove()


def masked_adversarial(out_s: Tensor, out_t: Tensor) -> Tensor:
    """- sum of KL(teacher || student) over the images on which both say the same class, / N."""
    _expect('masked_adversarial', 'out_s', out_s, 'N', 'K')
    _expect('masked_adversarial', 'out_t', out_t, *out_s.shape)
    out_s, out_t = _full(out_s), _full(out_t, out_s)
    log_q, log_p = F.log_softmax(out_s, dim=1), F.log_softmax(out_t, dim=1)
    p, log_p = log_p.exp(), log_p.masked_fill(log_p == -torch.inf, 0.0)  # 0 * -inf has no gradient
    log_q = log_q.masked_fill((p == 0) & (log_q == -torch.inf), 0.0)
    kl = torch.where(p == 0, 0.0, p * (log_p - log_q)).sum(dim=1)
    return -((out_s.argmax(dim=1) == out_t.argmax(dim=1)) * kl).mean()


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


def build(loss, probe, weights, options):
    """The head, the bank, and the teacher's hooks."""
    seen = Embedding(probe.net_t)
    kd = loss(seen.dim, options['head_dim'], options['cr_T'])
    kd.seen, kd.bank, kd.n_neg = seen, MemoryBank(options['bank_size'], 2 * seen.dim), options['n_neg']
    return kd


def feed(kd, made):
    global_ = kd.seen.instances()
    terms = {'bn': kd.seen.loss(), 'oh': F.cross_entropy(made.t.out, made.target)}
    if made.weights['adv']:
        terms['adv'] = masked_adversarial(made.s.out, made.t.out)
    if made.weights['cr']:
        made.teacher(made.another_view())
        local, kd.seen.seen = kd.seen.instances(), {}
        terms['cr'] = kd(local, global_, kd.bank.draw(kd.n_neg, made.rng))
        made.keep = torch.cat([local, global_], dim=1).detach()
    return terms


def begin(kd, source, rng):
    """Every batch is made by a generator that knows nothing yet."""
    for m in source.generator.modules():
        if isinstance(m, (nn.Conv2d, nn.Linear, nn.BatchNorm2d)) and m.weight is not None:
            centre = float(isinstance(m, nn.BatchNorm2d))
            m.weight.data.copy_(centre + 0.02 * torch.randn(m.weight.shape, generator=rng))
            if m.bias is not None:
                nn.init.zeros_(m.bias)
        if isinstance(m, nn.BatchNorm2d):
            m.reset_running_stats()
    return source.generator


def end(kd, source, net, kept):
    if kept is not None:
        kd.bank.add(kept)
