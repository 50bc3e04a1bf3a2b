"""DKL, KL divergence taken apart: IKL and GKL, differences of logits weighed by the teacher, cross-entropy.

J. Cui, Z. Tian, Z. Zhong, X. Qi, B. Yu, H. Zhang, "Decoupled Kullback-Leibler Divergence Loss", NeurIPS 2024,
arXiv:2305.13948 (IKL); J. Cui, B. Zhu, Q. Xu, Z. Tian, X. Qi, B. Yu, H. Zhang, R. Hong, "Generalized
Kullback-Leibler Divergence Loss", TPAMI 2026, arXiv:2503.08038 (GKL).

    d = out_t - out_s,  w = softmax(out_t / T2)^gamma, or prior[target]^gamma
    M_n = sum over j and k of w_nj * w_nk * (d_nj - d_nk)^2
    wmse = 1/4 * mean over n of M_n                                     reduction 'batch' (IKL)
    wmse = 1/4 * sum over n of M_n / sum over n of (sum over j of w_nj)^2       'weights' (GKL)
    sce = - mean over n of sum over k of softmax(out_t / T)_k * log softmax(out_s / T)_k
    loss = beta * wmse + alpha * sce

KL's gradient is that of sce and, to the teacher, that of wmse, which a frozen teacher wastes: here it acts on
the student. The prior is the teacher's mean probabilities per class in the epoch before (`ClassPrior`).

Tap: the logits; labels only with a prior. GKL = DKL(gamma=0.05, T2=4, reduction='weights'); our trainer's
dkl_gkl has a prior, too. The authors raise the loss's weight linearly over the first 20 of 240 epochs; our
trainer does the same, scaled to the run.

Differences: the values of the authors' code. M is computed as 2 * S * sum over j of w_j * (d_j - mu)^2, S and
mu = sum over j of w_j * d_j / S per sample, instead of K^2 differences. A class without an image in an epoch
keeps its row of the prior, where the authors' becomes NaN. sce has no T^2; GKL's division by the weights
makes its beta another one than IKL's.

Source: jiequancui/DKL, DKLv1/KD-dkl/mdistiller/distillers/IKL_KD.py and DKLv2/.../GKL_KD.py (dkl_loss).

Use:
    >>> import torch
    >>> from dkl import DKL
    >>> out_s, out_t = torch.randn(8, 10, requires_grad=True), torch.randn(8, 10)
    >>> DKL()(out_s, out_t).backward()
    >>> out_s.grad.norm() > 0
    tensor(True)
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DKL(nn.Module):
    """Weighted mean squared error of logit differences, and soft cross-entropy.

    Args:
        alpha, beta: weights of the soft cross-entropy and of the squared error; 1 and 8.
        T: temperature of the cross-entropy, > 0; 4 on CIFAR, 1 on ImageNet.
        T2: temperature of the weights, > 0; IKL 100 on CIFAR, GKL 4; 1 on ImageNet.
        gamma: exponent of the weights, 1; GKL 0.05.
        reduction: 'batch', over the samples; 'weights', over the products of the weights.

    Shape:
        out_s, out_t: (N, K), equal. prior: (K, K), row y the weights of class y, with target: (N,) labels,
        which are read with a prior only; rows of label -100 are left out then. Returns a scalar.
        No gradient reaches out_t. `terms` returns (wmse, sce) without beta and alpha.
        Computed in float32, or in float64 as the student.

    Raises:
        ValueError: T or T2 is not positive; reduction is another word; shapes differ; K < 2; a prior without
            target.
    """

    def __init__(
        self,
        alpha: float = 1.0,
        beta: float = 8.0,
        T: float = 4.0,
        T2: float = 100.0,
        gamma: float = 1.0,
        reduction: str = 'batch',
    ) -> None:
        super().__init__()
        if not (T > 0 and T2 > 0):
            raise ValueError(f'DKL: T and T2 must be > 0, got {T} and {T2}')
        if reduction not in ('batch', 'weights'):
            raise ValueError(f"DKL: reduction must be 'batch' or 'weights', got {reduction!r}")
        self.alpha, self.beta, self.T, self.T2 = alpha, beta, T, T2
        self.gamma, self.reduction = gamma, reduction

    def forward(
        self, out_s: Tensor, out_t: Tensor, target: Tensor | None = None, prior: Tensor | None = None
    ) -> Tensor:
        wmse, sce = self.terms(out_s, out_t, target, prior)
        return self.beta * wmse + self.alpha * sce

    def terms(
        self, out_s: Tensor, out_t: Tensor, target: Tensor | None = None, prior: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        _expect('DKL', 'out_s', out_s, 'N', 'K')
        _expect('DKL', 'out_t', out_t, *out_s.shape)
        N, K = out_s.shape
        out_s, out_t, valid = _full(out_s), _full(out_t.detach(), out_s), None
        if prior is None:
            # not softmax, then its power: a probability of 1e-60 is 0 in float32, its power of 0.05 is not
            w = (self.gamma * F.log_softmax(out_t / self.T2, dim=1)).exp()
        elif target is None:
            raise ValueError('DKL: target must be given with a prior, got None: the labels choose its rows')
        else:
            _expect('DKL', 'prior', prior, K, K)
            target, valid = _labels('DKL', target, N, K)
            w = _full(prior.detach(), out_s)[target].pow(self.gamma)
        masked = out_t == -torch.inf  # classes that the teacher rules out count nothing
        w = w.masked_fill(masked, 0)
        d = torch.where(masked, 0.0, out_t - out_s)
        S = w.sum(dim=1)
        mu = (w * d).sum(dim=1) / torch.where(S == 0, 1.0, S)
        M = 2 * S * (w * (d - mu[:, None]).square()).sum(dim=1)

        p_t, log_p_s = F.softmax(out_t / self.T, dim=1), F.log_softmax(out_s / self.T, dim=1)
        sce = -_mean(torch.where(p_t == 0, 0.0, p_t * log_p_s).sum(dim=1), valid)
        if self.reduction == 'batch':
            return 0.25 * _mean(M, valid), sce
        whole = _mean(S.square(), valid)
        return 0.25 * _mean(M, valid) / torch.where(whole == 0, 1.0, whole), sce


class ClassPrior(nn.Module):
    """The teacher's mean probabilities for the images of each class, of the epoch before; 1 / K at first.

    Args:
        num_classes: K.

    Shape:
        update(out_t, target, T2): adds softmax(out_t / T2), (N, K), to the rows of the labels (N,), -100
        excepted. close(): at the end of an epoch, makes the sums, of all processes, the new prior (K, K) and
        returns it; a class without an image keeps its row. Both are buffers: save them with the checkpoint.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.register_buffer('prior', torch.full((num_classes, num_classes), 1 / num_classes))
        self.register_buffer('sums', torch.zeros(num_classes, num_classes))

    def _apply(self, fn, *args, **kwargs):
        """Rows that no class has filled yet are 1 / K in the new precision, too."""
        first = self.prior == torch.full_like(self.prior, 1 / len(self.prior))
        super()._apply(fn, *args, **kwargs)
        if not self.prior.is_meta and not first.is_meta:
            self.prior.masked_fill_(first.to(self.prior.device), 1 / len(self.prior))
        return self

    @torch.no_grad()
    def update(self, out_t: Tensor, target: Tensor, T2: float) -> None:
        _expect('ClassPrior', 'out_t', out_t, 'N', len(self.sums))
        target, valid = _labels('ClassPrior', target, *out_t.shape)
        p = F.softmax(_full(out_t) / T2, dim=1)
        is_y = torch.zeros_like(p).scatter_(1, target[:, None], 1)
        if valid is not None:
            is_y, p = (torch.where(valid[:, None], x, 0.0) for x in (is_y, p))
        # a product: index_add_ sums in any order on a GPU, and two runs would differ in their last bits
        with _no_autocast(p):
            self.sums += (_exact(is_y).T @ _exact(p)).to(self.sums.dtype)

    @torch.no_grad()
    def close(self) -> Tensor:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(self.sums)
        self.prior.copy_(self.following())
        self.sums.zero_()
        return self.prior

    def following(self) -> Tensor:
        """What the prior would be after this epoch."""
        whole = self.sums.sum(dim=1, keepdim=True)
        return torch.where(whole == 0, self.prior, self.sums / torch.where(whole == 0, 1.0, whole))


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


def _mean(rows: Tensor, valid: Tensor | None) -> Tensor:
    """Over the rows (N, ...) that count; 0 if none does."""
    if valid is None:
        return rows.mean(dim=0)
    counts = valid.reshape(-1, *[1] * (rows.dim() - 1))
    return torch.where(counts, rows, 0.0).sum(dim=0) / valid.sum().clamp(min=1)


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


class _Table(ClassPrior):
    """A prior that sees by itself, and without waiting for a GPU, that another epoch has begun."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.register_buffer('epoch', torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def at(self, epoch: int) -> Tensor:
        over = self.epoch != epoch
        self.prior.copy_(torch.where(over, self.following(), self.prior))
        self.sums.copy_(torch.where(over, 0.0, self.sums))
        self.epoch.fill_(epoch)
        return self.prior.clone()


def build_gkl(loss, probe, **options):
    kd = loss(**{'gamma': 0.05, 'T2': 4.0, 'reduction': 'weights'} | options)
    kd.table = _Table(probe.num_classes)
    return kd


def feed_gkl(kd, s, t, batch):
    prior = kd.table.at(batch.epoch)
    kd.table.update(t.out, batch.target, kd.T2)
    return kd(s.out, t.out, batch.target, prior)
