"""CRD, contrastive representation distillation: tell the teacher's embedding of an image from all others.

Y. Tian, D. Krishnan, P. Isola, "Contrastive Representation Distillation", ICLR 2020, arXiv:1910.10699.

    e = linear map of feat to 128 numbers, length 1 (embed_s and embed_t are trained with the student)
    memory_s, memory_t: one such vector per training image;  S[n] = the image's own index, then n_neg others
    x[n, j] = exp(memory_t[S[n, j]].e_s[n] / nce_t) / Z_s
    c = n_neg / n_data
    NCE(x) = - mean over n of [log(x_0 / (x_0 + c + 1e-7)) + sum over j > 0 of log(c / (x_j + c + 1e-7))]
    loss = NCE(student against memory_t) + NCE(teacher against memory_s)
    Z = n_data * mean of the exponentials of the first training batch, kept from then on
    then memory[index] = unit(nce_mom * memory[index] + (1 - nce_mom) * e),  unit(v) = v / ||v||

Tap: the pooled embeddings before the classifier, and each image's index in the training set (unique in a
batch). In three lines, for one side and given indices S (N, 1 + n_neg):

    x = (memory_t[S] @ e_s[:, :, None]).squeeze(2).div(nce_t).exp() / Z_s
    right, wrong = x[:, 0] / (x[:, 0] + c + 1e-7), c / (x[:, 1:] + c + 1e-7)
    loss = -(right.log() + wrong.log().sum(1)).mean()

Differences: the authors' computation; Z and the memory are buffers, so a resumed run goes on exactly.
Negatives come from other classes when `targets` is given; they are drawn here, on the device, without
replacement if there are enough.

Cost: all scores are made by one matrix product, and the gradient with them, since the memory changes right
afterwards; the gathered vectors (N, n_neg, 128) are never stored.

Source: HobbitLong/RepDistiller, crd/criterion.py and crd/memory.py. Temperature 0.1 is
AberHu/Knowledge-Distillation-Zoo's, train_crd.py.

Use:
    >>> import torch
    >>> from crd import CRD
    >>> feat_s, feat_t = torch.randn(8, 64, requires_grad=True), torch.randn(8, 128)
    >>> CRD(64, 128, n_data=100, nce_n=32)(feat_s, feat_t, index=torch.arange(8)).backward()
    >>> feat_s.grad.norm() > 0
    tensor(True)
"""

import math

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class CRD(nn.Module):
    """Noise-contrastive estimation with a memory bank on both sides.

    Args:
        s_dim, t_dim: widths of the two embeddings.
        n_data: size of the training set.
        targets: (n_data,) its labels, also as list or array; negatives then are of other classes. An image of
            label -100 is no negative and left out of the loss. None: any image, with replacement.
        feat_dim: common width, 128.
        nce_n: negatives per image, 16384.
        nce_t: temperature, > 0; 0.07 (Knowledge-Distillation-Zoo 0.1).
        nce_mom: momentum of the memory, 0.5.

    Shape:
        feat_s: (N, s_dim), feat_t: (N, t_dim); further axes are flattened. index: (N,) int64. sample_idx:
        (N, 1 + n) int64 instead of drawn ones, the positive first. generator: where to draw from. Returns a
        scalar. No gradient reaches feat_t. Nothing is remembered in eval mode, nor without gradients.
        Computed in float32, also under TF32, or in float64 as the student.

    Raises:
        ValueError: nce_t is not positive; targets is not (n_data,) or of one class; a feature,
            index or sample_idx of a wrong shape.
    """

    def __init__(
        self,
        s_dim: int,
        t_dim: int,
        n_data: int,
        targets: Tensor | list | None = None,
        feat_dim: int = 128,
        nce_n: int = 16384,
        nce_t: float = 0.07,
        nce_mom: float = 0.5,
    ) -> None:
        super().__init__()
        if not nce_t > 0:
            raise ValueError(f'CRD: nce_t must be > 0, got {nce_t}')
        counts = torch.zeros(1, dtype=torch.int64)
        if targets is not None:
            targets = torch.as_tensor(targets).detach().long().clone()
            _expect('CRD', 'targets', targets, n_data)
            classes, counts = targets[targets != -100].unique(return_counts=True)
            if len(classes) < 2 or classes[0] < 0:
                raise ValueError(
                    'CRD: targets must be of two classes or more, from 0 on, or -100 (unknown), '
                    f'got {classes[:5].tolist()}: leave targets out to draw from all images'
                )
        self.s_dim, self.t_dim, self.n_data = s_dim, t_dim, n_data
        self.nce_n, self.nce_t, self.nce_mom = nce_n, nce_t, nce_mom
        self.embed_s, self.embed_t = nn.Linear(s_dim, feat_dim), nn.Linear(t_dim, feat_dim)
        bound = 1 / math.sqrt(feat_dim / 3)
        for side in ('s', 't'):
            self.register_buffer(f'memory_{side}', torch.empty(n_data, feat_dim).uniform_(-bound, bound))
            self.register_buffer(f'z_{side}', torch.tensor(-1.0))
        self.register_buffer('targets', targets, persistent=False)
        # enough images of other classes to draw without replacement?
        self.enough = int(counts.sum() - counts.max()) >= nce_n

    def forward(
        self,
        feat_s: Tensor,
        feat_t: Tensor,
        index: Tensor,
        sample_idx: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        return sum(self.terms(feat_s, feat_t, index, sample_idx, generator))

    def terms(self, feat_s, feat_t, index, sample_idx=None, generator=None) -> tuple[Tensor, Tensor]:
        """The student's and the teacher's NCE; the memory is updated as by forward."""
        feat_s, feat_t = self._flat('feat_s', feat_s, self.s_dim), self._flat('feat_t', feat_t, self.t_dim)
        n = len(feat_s)
        _expect('CRD', 'feat_t', feat_t, n, self.t_dim)
        index = _positions_in('CRD', index, n, self.n_data)
        if sample_idx is None:
            sample_idx = self._draw(index, generator)
        else:
            _expect('CRD', 'sample_idx', sample_idx, n, 'D')
            if sample_idx.shape[1] < 2:
                raise ValueError(
                    f'CRD: sample_idx must be ({n}, 1 + n), got {tuple(sample_idx.shape)}: '
                    'the image itself, then its negatives'
                )
        counts = index >= 0 if self.targets is None else self.targets[index] != -100
        with _no_autocast(feat_s):
            e_s = _unit(_run(self.embed_s, _full(feat_s)))
            e_t = _unit(_run(self.embed_t, _full(feat_t.detach(), feat_s)))
            share = counts.to(e_s.dtype) / counts.sum().clamp(min=1)
            loss_s, z_s, _ = _NCE.apply(e_s, self.memory_t, sample_idx.long(), self.z_s, share, self.nce_t)
            loss_t, z_t, _ = _NCE.apply(e_t, self.memory_s, sample_idx.long(), self.z_t, share, self.nce_t)
        if self.training and torch.is_grad_enabled():
            with torch.no_grad():
                self.z_s.copy_(z_s)
                self.z_t.copy_(z_t)
                for memory, e in ((self.memory_s, e_s), (self.memory_t, e_t)):
                    old = memory[index].to(e.dtype)
                    rows = _unit(self.nce_mom * old + (1 - self.nce_mom) * e.detach())
                    memory.index_copy_(0, index, torch.where(counts[:, None], rows, old).to(memory.dtype))
        return loss_s, loss_t

    def _flat(self, name: str, feat: Tensor, dim: int) -> Tensor:
        feat = feat.flatten(1) if feat.dim() > 2 else feat
        _expect('CRD', name, feat, 'N', dim)
        return feat

    def _apply(self, fn, *args, **kwargs):
        """half() leaves the memory and Z alone: Z is too large for it."""
        kept = dict(self._buffers)
        super()._apply(fn, *args, **kwargs)
        for name, buffer in kept.items():
            if buffer is not None and self._buffers[name].dtype in (torch.float16, torch.bfloat16):
                self._buffers[name] = buffer.to(self._buffers[name].device)
        return self

    def _draw(self, index: Tensor, generator: torch.Generator | None) -> Tensor:
        """(N, 1 + nce_n): the image itself, then its negatives."""
        n, device = len(index), index.device
        if self.targets is None:
            negatives = torch.randint(self.n_data, (n, self.nce_n), device=device, **_by(generator))
        else:
            other = self.targets != self.targets[index][:, None]  # (N, n_data)
            other = other & (self.targets != -100)
            if self.enough:  # the largest of random keys: uniform, without replacement
                keys = torch.rand(n, self.n_data, device=device, **_by(generator)).masked_fill(~other, -1.0)
                negatives = keys.topk(self.nce_n, dim=1, sorted=False).indices
            else:
                negatives = torch.multinomial(other.float(), self.nce_n, replacement=True, **_by(generator))
        return torch.cat([index[:, None], negatives], dim=1)


class _NCE(torch.autograd.Function):
    """The loss of anchors e (N, D), weighed by share (N,), against memory rows S (N, 1 + n); Z, if it was
    unset; the gradient."""

    @staticmethod
    def forward(e: Tensor, memory: Tensor, S: Tensor, z: Tensor, share: Tensor, T: float):
        memory, z, counts = memory.to(e.dtype), z.to(e.dtype), share > 0
        n, n_data, negatives = len(e), len(memory), S.shape[1] - 1
        c, eps = negatives / n_data, 1e-7
        # a chunk of anchors at a time when gathering rows is cheaper than scoring the whole memory
        whole = n_data < 32 * negatives
        score = _product(e, memory.T).gather(1, S) if whole else _by_rows(lambda i: memory[S[i]] @ e[i], n)
        score = score / T
        mean = (torch.where(counts, score.exp().mean(dim=1), 0.0) * share).sum()
        z = torch.where((z < 0) & counts.any(), mean * n_data, z)
        x = score.exp() / z
        total = x + c + eps
        rows = score[:, 0] - z.log() - total[:, 0].log() + (c / total[:, 1:]).log().sum(dim=1)
        loss = -(torch.where(counts, rows, 0.0) * share).sum()
        grad = x / total
        grad[:, 0] -= 1
        grad = grad * (share / T)[:, None]
        if whole:
            grad = torch.zeros(n, n_data, dtype=e.dtype, device=e.device).scatter_add_(1, S, grad)
            grad = _product(grad, memory)
        else:
            grad = _by_rows(lambda i: grad[i] @ memory[S[i]], n)
        return loss, z, grad

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(output[2])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out: Tensor, *_):
        return grad_out * ctx.saved_tensors[0], None, None, None, None, None


def _product(a: Tensor, b: Tensor) -> Tensor:
    return (_exact(a) @ _exact(b)).to(a.dtype)


def _by_rows(f, n: int) -> Tensor:
    return torch.stack([f(i) for i in range(n)])


def _by(generator: torch.Generator | None) -> dict:
    """Left out where there is none: torch.compile cannot pass None for a batch of another size."""
    return {} if generator is None else {'generator': generator}


def _positions_in(who: str, index: Tensor, n: int, size: int) -> Tensor:
    """n positions in the training set as int64. Only on the CPU are they looked at, a GPU would wait."""
    _expect(who, 'index', index, n)
    seen = index.device.type == 'cpu' and not getattr(torch.compiler, 'is_compiling', bool)()
    wrong = [i for i in index.tolist() if not 0 <= i < size] if seen else []
    if wrong or index.is_floating_point():
        got = index.dtype if index.is_floating_point() else wrong[0]
        raise ValueError(
            f'{who}: index must be integers in 0..{size - 1}, positions in the training set, got {got}: '
            "number the samples from 0 (those of a Subset have the whole set's numbers)"
        )
    return index.long()


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


def feed(kd, s, t, batch):
    return kd(s.feat, t.feat, batch.index, generator=batch.generator)


def build(loss, probe, **options):
    data = probe.train_set
    return loss(probe.s.feat.shape[1], probe.t.feat.shape[1], len(data), data.targets, **options)
