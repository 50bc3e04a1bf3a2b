"""KegNet: a generator makes images of a wanted class, from which a decoder must find the noise again.

J. Yoo, M. Cho, T. Kim, U. Kang, "Knowledge Extraction with No Observable Data", NeurIPS 2019.

    cls = mean over n of KL(label_n || softmax(out_t_n))       for a one-hot label the cross-entropy
    dec = mean over n and entries of (z_hat - z)^2
    dz_ij = mean over entries of (z_i - z_j)^2,  dx_ij = mean over pixels of |x_i - x_j|
    div = exp(- mean over all pairs i, j (also i = j) of dz_ij * dx_ij)
    loss = cls + alpha * dec + beta * div

Tap: the teacher's logits on the generated images, the images themselves, the noise they are made of and what
the decoder makes of the images. Generator and decoder are trained together; a student then learns from a
fixed set of images.

Differences: NOTHING is detached, the gradient reaches the generator through the teacher and the decoder. The
authors leave the teacher in training mode while the generator learns, so that its statistics drift; ours is
in evaluation mode. The pairwise distances come without an array of all differences of all pairs.

Source: snudatalab/KegNet, src/kegnet/generator/loss.py.

Use:
    >>> import torch
    >>> from kegnet import KegNet
    >>> z, z_hat, out_t = torch.randn(8, 4), torch.randn(8, 4), torch.randn(8, 10)
    >>> images = torch.randn(8, 3, 6, 6, requires_grad=True)
    >>> KegNet()(out_t, torch.arange(8), z_hat, z, images).backward()
    >>> images.grad.norm() > 0
    tensor(True)
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class KegNet(nn.Module):
    """The loss of generator and decoder.

    Args:
        alpha: weight of the reconstruction, 1.
        beta: weight of the diversity, 1 (authors: SVHN 1, Fashion-MNIST 10, MNIST 0).
        metric: of images: 'l1', 'l2' (squared), or 'cosine'.

    Shape:
        out_t: (N, K); label: (N,) labels, or (N, K) rows of probabilities; z, z_hat: (N, nz); images:
        (N, ...). Returns a scalar; `terms` returns {'cls', 'dec', 'div'} without weights. Rows of label -100
        are left out. Computed in float32, also under TF32, or in float64 as the logits.

    Raises:
        ValueError: an unknown metric; shapes that do not meet; labels out of range.
    """

    def __init__(self, alpha: float = 1.0, beta: float = 1.0, metric: str = 'l1') -> None:
        super().__init__()
        if metric not in ('l1', 'l2', 'cosine'):
            raise ValueError(f"KegNet: metric must be 'l1', 'l2' or 'cosine', got {metric!r}")
        self.alpha, self.beta, self.metric = alpha, beta, metric

    def forward(self, out_t: Tensor, label: Tensor, z_hat: Tensor, z: Tensor, images: Tensor) -> Tensor:
        terms = self.terms(out_t, label, z_hat, z, images)
        return terms['cls'] + self.alpha * terms['dec'] + self.beta * terms['div']

    def terms(
        self, out_t: Tensor, label: Tensor, z_hat: Tensor, z: Tensor, images: Tensor
    ) -> dict[str, Tensor]:
        _expect('KegNet', 'out_t', out_t, 'N', 'K')
        n = len(out_t)
        _expect('KegNet', 'z', z, n, 'D')
        _expect('KegNet', 'z_hat', z_hat, *z.shape)
        if images.dim() < 2 or len(images) != n:
            raise ValueError(
                f'KegNet: images must be ({n}, C, H, W), got {tuple(images.shape)}: all of one batch'
            )
        out_t, z, z_hat = _full(out_t), _full(z, out_t), _full(z_hat, out_t)
        images, log_p, valid = _full(images, out_t).flatten(1), F.log_softmax(out_t, dim=1), None
        if label.is_floating_point() or label.dim() == 2:
            _expect('KegNet', 'label', label, *out_t.shape)
            label = _full(label, out_t)
            cls = (torch.xlogy(label, label) - torch.where(label == 0, 0.0, label * log_p)).sum(dim=1)
        else:
            label, valid = _labels('KegNet', label, *out_t.shape, 'label')
            cls = F.nll_loss(log_p, label, reduction='none')
        with _no_autocast(out_t):
            pairs = (z[:, None] - z[None]).square().mean(dim=2) * _distances(images, self.metric)
        closeness = _mean(_mean(pairs, valid), valid)
        return {
            'cls': _mean(cls, valid),
            'dec': _mean((z_hat - z).square().mean(dim=1), valid),
            'div': (-closeness).exp(),
        }


def _distances(x: Tensor, metric: str) -> Tensor:
    """(N, D) -> (N, N)"""
    if metric == 'l1':
        return torch.cdist(x, x, p=1.0) / x.shape[1]
    if metric == 'l2':
        products = (_exact(x) @ _exact(x).T).to(x.dtype)
        lengths = x.square().sum(dim=1)
        return (lengths[:, None] + lengths[None] - 2 * products).clamp(min=0) / x.shape[1]
    length = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    # an image of zeros stays, and has no gradient
    unit = x / length.clamp(min=1e-8).masked_fill(length <= 1e-12, torch.inf)
    return 1 - (_exact(unit) @ _exact(unit).T).to(x.dtype)


def _mean(rows: Tensor, valid: Tensor | None) -> Tensor:
    """Over the rows (N, ...) that count; 0 if none does."""
    if valid is None:
        return rows.mean(dim=0)
    counts = valid.reshape(-1, *[1] * (rows.dim() - 1))
    return torch.where(counts, rows, 0.0).sum(dim=0) / valid.sum().clamp(min=1)


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


def feed(kd, made):
    return kd.terms(made.t.out, made.target, made.z_hat, made.z, made.x)
