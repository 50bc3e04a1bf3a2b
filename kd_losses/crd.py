"""CRD, contrastive representation distillation: tell the teacher's embedding of an image from all others.

Y. Tian, D. Krishnan, P. Isola, "Contrastive Representation Distillation", ICLR 2020, arXiv:1910.10699.

    e = linear map of feat to 128 numbers, length 1 (embed_s and embed_t are trained with the student)
    memory_s, memory_t: one such vector per training image;  S[n] = the image's own index, then n_neg others
    x[n, j] = exp(memory_t[S[n, j]].e_s[n] / nce_t) / Z_s,   c = n_neg / n_data
    NCE(x) = - mean over n of [log(x_0 / (x_0 + c + 1e-7)) + sum over j > 0 of log(c / (x_j + c + 1e-7))]
    loss = NCE(student against memory_t) + NCE(teacher against memory_s)
    Z is n_data times the mean of the exponentials of the first training batch, kept for ever
    afterwards  memory[index] = normalised nce_mom memory[index] + (1 - nce_mom) e

Tap: the pooled embeddings before the classifier, and each image's index in the training set (unique in a
batch).

Differences: the authors' computation; Z and the memory are buffers, so a resumed run goes on exactly.
Negatives come from other classes when `targets` is given, drawn here, on the device, without replacement if
there are enough.
Cost: all scores by one matrix product, and the gradient with them, since the memory changes
right afterwards; the (N, n_neg, 128) gathered vectors are never stored.
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
        targets: (n_data,) its labels; negatives then are of other classes. None: any image, with replacement.
        feat_dim: common width, 128.
        nce_n: negatives per image, 16384.
        nce_t: temperature, > 0; 0.07 (Knowledge-Distillation-Zoo 0.1).
        nce_mom: momentum of the memory, 0.5.

    Shape:
        feat_s: (N, s_dim), feat_t: (N, t_dim); further axes are flattened. index: (N,) int64. sample_idx:
        (N, 1 + n) int64 instead of drawn ones, the positive first. generator: where to draw from. Returns a
        scalar. No gradient reaches feat_t. In eval mode and without gradients nothing is remembered.

    Raises:
        ValueError: nce_t is not positive; targets is not (n_data,); a feature, index or sample_idx of a wrong
        shape.
    """

    def __init__(
        self,
        s_dim: int,
        t_dim: int,
        n_data: int,
        targets: Tensor | None = None,
        feat_dim: int = 128,
        nce_n: int = 16384,
        nce_t: float = 0.07,
        nce_mom: float = 0.5,
    ) -> None:
        super().__init__()
        if not nce_t > 0:
            raise ValueError(f'CRD: nce_t must be > 0, got {nce_t}')
        if targets is not None and tuple(targets.shape) != (n_data,):
            raise ValueError(f'CRD: targets must be ({n_data},), got {tuple(targets.shape)}')
        self.s_dim, self.t_dim, self.n_data = s_dim, t_dim, n_data
        self.nce_n, self.nce_t, self.nce_mom = nce_n, nce_t, nce_mom
        self.embed_s, self.embed_t = nn.Linear(s_dim, feat_dim), nn.Linear(t_dim, feat_dim)
        bound = 1 / math.sqrt(feat_dim / 3)
        for side in ('s', 't'):
            self.register_buffer(f'memory_{side}', torch.empty(n_data, feat_dim).uniform_(-bound, bound))
            self.register_buffer(f'z_{side}', torch.tensor(-1.0))
        self.register_buffer(
            'targets', None if targets is None else targets.detach().clone(), persistent=False
        )
        # enough images of other classes to draw without replacement?
        self.enough = targets is not None and n_data - int(torch.bincount(targets).max()) >= nce_n

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
        if len(feat_t) != n:
            raise ValueError(f'CRD: feat_t must be ({n}, {self.t_dim}) as feat_s, got {tuple(feat_t.shape)}')
        if index.shape != (n,):
            raise ValueError(
                f'CRD: index must be ({n},) as feat_s {tuple(feat_s.shape)}, got {tuple(index.shape)}'
            )
        if sample_idx is None:
            sample_idx = self._draw(index, generator)
        elif sample_idx.dim() != 2 or len(sample_idx) != n or sample_idx.shape[1] < 2:
            raise ValueError(f'CRD: sample_idx must be ({n}, 1 + n_neg), got {tuple(sample_idx.shape)}')
        with torch.autocast(feat_s.device.type, enabled=False):
            e_s, e_t = _unit(self.embed_s(_full(feat_s))), _unit(self.embed_t(_full(feat_t.detach())))
            loss_s, z_s = _NCE.apply(e_s, self.memory_t, sample_idx, self.z_s, self.nce_t)
            loss_t, z_t = _NCE.apply(e_t, self.memory_s, sample_idx, self.z_t, self.nce_t)
        if self.training and torch.is_grad_enabled():
            with torch.no_grad():
                self.z_s.copy_(z_s)
                self.z_t.copy_(z_t)
                for memory, e in ((self.memory_s, e_s), (self.memory_t, e_t)):
                    rows = self.nce_mom * memory[index] + (1 - self.nce_mom) * e.detach()
                    memory.index_copy_(0, index, _unit(rows))
        return loss_s, loss_t

    def _flat(self, name: str, feat: Tensor, dim: int) -> Tensor:
        if feat.dim() < 2 or feat[0].numel() != dim:
            raise ValueError(f'CRD: {name} must be (N, {dim}), got {tuple(feat.shape)}')
        return feat.flatten(1)

    def _draw(self, index: Tensor, generator: torch.Generator | None) -> Tensor:
        """(N, 1 + nce_n): the image itself, then its negatives."""
        n, device = len(index), index.device
        if self.targets is None:
            negatives = torch.randint(self.n_data, (n, self.nce_n), device=device, generator=generator)
        else:
            other = self.targets[None, :] != self.targets[index][:, None]  # (N, n_data)
            if self.enough:  # the largest of random keys: uniform, without replacement
                keys = torch.rand(n, self.n_data, device=device, generator=generator).masked_fill(
                    ~other, -1.0
                )
                negatives = keys.topk(self.nce_n, dim=1, sorted=False).indices
            else:
                negatives = torch.multinomial(
                    other.float(), self.nce_n, replacement=True, generator=generator
                )
        return torch.cat([index[:, None], negatives], dim=1)


class _NCE(torch.autograd.Function):
    """The loss of anchors e (N, D) against memory rows S (N, 1 + n), its gradient, and Z if it was unset."""

    @staticmethod
    def forward(ctx, e: Tensor, memory: Tensor, S: Tensor, z: Tensor, T: float):
        n, n_data, negatives = len(e), len(memory), S.shape[1] - 1
        c, eps = negatives / n_data, 1e-7
        # a chunk of anchors at a time when gathering rows is cheaper than scoring the whole memory
        whole = n_data < 32 * negatives
        score = (e @ memory.T).gather(1, S) if whole else _by_rows(lambda i: memory[S[i]] @ e[i], n)
        score = score / T
        z = torch.where(z < 0, score.exp().mean() * n_data, z)
        x = score.exp() / z
        total = x + c + eps
        positive = (score[:, 0] - z.log() - total[:, 0].log()).sum()
        loss = -(positive + (c / total[:, 1:]).log().sum()) / n
        grad = x / total
        grad[:, 0] -= 1
        grad = grad / (n * T)
        if whole:
            grad = torch.zeros(n, n_data, dtype=e.dtype, device=e.device).scatter_add_(1, S, grad) @ memory
        else:
            grad = _by_rows(lambda i: grad[i] @ memory[S[i]], n)
        ctx.save_for_backward(grad)
        ctx.mark_non_differentiable(z)
        return loss, z

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out: Tensor, _):
        return grad_out * ctx.saved_tensors[0], None, None, None, None


def _by_rows(f, n: int) -> Tensor:
    return torch.stack([f(i) for i in range(n)])


def _unit(x: Tensor) -> Tensor:
    """Rows divided by their length; a zero row stays zero and gets no gradient."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    alive = norm > 1e-12
    return torch.where(alive, x / torch.where(alive, norm, 1.0), 0.0)


def _full(x: Tensor) -> Tensor:
    """Half precision to float32; float64 stays."""
    return x if x.dtype == torch.float64 else x.float()


# ------------------------------------------ how the training scripts use it; a copied file may drop this


def feed(kd, s, t, batch):
    return kd(s.feat, t.feat, batch.index, generator=batch.generator)


def build(loss, probe, **options):
    data = probe.train_set
    return loss(probe.s.feat.shape[1], probe.t.feat.shape[1], len(data), data.targets, **options)
