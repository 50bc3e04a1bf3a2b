"""QuEST: say of every position which word of a learned teacher vocabulary the teacher sees there.

H. Jain, S. Gidaris, N. Komodakis, P. Perez, M. Cord, "QuEST: Quantized Embedding Space for Transferring
Knowledge", ECCV 2020, arXiv:1912.01540.

    c_m: num_words centroids of k-means over the teacher's vectors at all positions (made before training)
    p[i, m] = softmax over m of -tau * ||t_i - c_m||^2            i: every position of every sample
    q[i, m] = softmax over m of scale * cos(s_i, w_m)           w, scale: trained with the student
    loss = mean over i of sum over m of p * (log p - log q)

Tap: the last stage's maps, before the final ReLU; equal sizes, any channels. A larger teacher map is
average-pooled, 2x2 where that gives the student's size (so the authors), else by the factor of the sizes.

Differences: the authors' formula, on one stage. Their code book comes from all vectors of the training set,
`fit_centroids` takes as many as it is given. |t|^2 is left out of the distance: the softmax does not see it.
The trainer taps wide networks before the ReLU, too (the authors after it), and averages the larger map, the
student's as well, over equal shares of it.

Source: valeoai/QuEST, distillation/algorithms/classification/classification_quest.py
(quest_dense_prediction).

Use:
    >>> import torch
    >>> from quest import QuEST
    >>> fm_s, fm_t = torch.randn(8, 16, 8, 8, requires_grad=True), torch.randn(8, 32, 8, 8)
    >>> QuEST(16, 32, centroids=torch.randn(64, 32))(fm_s, fm_t).backward()
    >>> fm_s.grad.norm() > 0
    tensor(True)
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class QuEST(nn.Module):
    """KL divergence from the teacher's to the student's distribution over visual words.

    Args:
        s_channels, t_channels: channels of the two maps.
        num_words: size of the vocabulary; None: as many as centroids has, or 4096.
        tau: sharpness of the teacher's assignment (called temperature in the authors' settings); 5.
        scale: initial factor on the cosines, learned; 3.
        centroids: (num_words, t_channels), the vocabulary; None: zeros, to be filled by `fit`.

    Shape:
        fm_s: (N, s_channels, H, W), fm_t: (N, t_channels, H', W'). H' and W' are H and W, the same multiple
        of them, or one more than twice as much: then the last row or column counts nothing. Returns a
        scalar. No gradient reaches fm_t.
        Computed in float32, also under TF32, or in float64 as the student.

    Raises:
        ValueError: centroids has another shape, or is zeros still; a map has other channels or sizes than
            allowed.
    """

    def __init__(
        self,
        s_channels: int,
        t_channels: int,
        num_words: int | None = None,
        tau: float = 5.0,
        scale: float = 3.0,
        centroids: Tensor | None = None,
    ) -> None:
        super().__init__()
        if num_words is None and centroids is not None:
            _expect('QuEST', 'centroids', centroids, 'V', t_channels)
            num_words = len(centroids)
        num_words = 4096 if num_words is None else num_words
        self.known = centroids is not None  # else forward looks, once, whether they are zeros still
        if centroids is None:
            centroids = torch.zeros(num_words, t_channels)
        _expect('QuEST', 'centroids', centroids, num_words, t_channels)
        self.s_channels, self.t_channels, self.tau = s_channels, t_channels, tau
        self.register_buffer('centroids', centroids.detach().clone())
        self.weight = nn.Parameter(torch.randn(num_words, s_channels) * (2 / s_channels) ** 0.5)
        self.scale = nn.Parameter(torch.full((1,), float(scale)))

    def forward(self, fm_s: Tensor, fm_t: Tensor) -> Tensor:
        _expect('QuEST', 'fm_s', fm_s, 'N', self.s_channels, 'H', 'W')
        fm_t = self._teacher_map(fm_t, fm_s.shape)
        compiling = getattr(torch.compiler, 'is_compiling', bool)()
        if not self.known and not compiling and not self.centroids.is_meta:  # a GPU waits once
            self.known = bool((self.centroids != 0).any())
            if not self.known:
                raise ValueError(
                    'QuEST: centroids must be known, got zeros: call fit with maps of the teacher'
                )
        with _no_autocast(fm_s):
            s, t = _positions(_full(fm_s)), _positions(_full(fm_t.detach(), fm_s))
            with torch.no_grad():
                c, t = _exact(_full(self.centroids, s)), _exact(t)
                # -tau (||t - c||^2 - |t|^2)
                nearness = torch.addmm(c.square().sum(dim=1), t, c.T, beta=-self.tau, alpha=2 * self.tau)
                log_p = F.log_softmax(nearness.to(s.dtype), dim=1)
                p = log_p.exp().flatten()
                negative_entropy = torch.dot(p, log_p.flatten())
            words, scale = _exact(_unit(_full(self.weight, s))), _full(self.scale, s)
            log_q = F.log_softmax((scale * _exact(_unit(s)) @ words.T).to(s.dtype), dim=1)
            # dot products: positions x words is the largest tensor here, a product would be one more
            return (negative_entropy - torch.dot(p, log_q.flatten())) / len(s)

    def _teacher_map(self, fm_t: Tensor, shape_s) -> Tensor:
        n, _, h, w = shape_s
        _expect('QuEST', 'fm_t', fm_t, n, self.t_channels, 'H', 'W')
        if fm_t.shape[2:] != shape_s[2:] and (fm_t.shape[2] // 2, fm_t.shape[3] // 2) == (h, w):
            return F.avg_pool2d(fm_t, 2)  # the authors' pooling: of an odd size the last row counts nothing
        if fm_t.shape[2] % h or fm_t.shape[3] % w or fm_t.shape[2] // h != fm_t.shape[3] // w:
            raise ValueError(
                f'QuEST: fm_t must be {(n, self.t_channels, h, w)} as fm_s, or a multiple of its size, '
                f'got {tuple(fm_t.shape)}: bring maps to one size, F.adaptive_avg_pool2d'
            )
        factor = fm_t.shape[2] // h
        return fm_t if factor == 1 else F.avg_pool2d(fm_t, factor)

    @torch.no_grad()
    def fit(self, maps: Tensor, iters: int = 20, generator: torch.Generator | None = None) -> None:
        """Make the vocabulary from teacher maps (N, t_channels, H, W) of the size that training will see."""
        words = fit_centroids(_positions(_full(maps)), len(self.centroids), iters, generator)
        self.centroids.copy_(words)
        self.known = True


@torch.no_grad()
def fit_centroids(
    features: Tensor, num_words: int, iters: int = 20, generator: torch.Generator | None = None
) -> Tensor:
    """(num_words, D) centroids of features (N, D): Lloyd's k-means from random samples.

    An empty cluster starts again from a random sample. Works in chunks of 65536 vectors.

    Raises:
        ValueError: there are fewer features than words.
    """
    n, d = features.shape
    if n < num_words:
        raise ValueError(f'fit_centroids: {num_words} words need as many features, got {n}')

    def some(count):
        return torch.randperm(n, generator=generator, device=generator.device if generator else 'cpu')[:count]

    c = features[some(num_words).to(features.device)]
    for _ in range(iters):
        total = torch.zeros(num_words, d, dtype=features.dtype, device=features.device)
        count = torch.zeros(num_words, dtype=features.dtype, device=features.device)
        for x in features.split(65536):
            nearest = torch.addmm(c.square().sum(dim=1), x, c.T, alpha=-2).argmin(dim=1)
            total.index_add_(0, nearest, x)
            count.index_add_(0, nearest, torch.ones(len(x), dtype=x.dtype, device=x.device))
        fresh = features[some(num_words).to(features.device)]
        c = torch.where(count[:, None] > 0, total / count.clamp(min=1)[:, None], fresh)
    return c


def _positions(fm: Tensor) -> Tensor:
    """(N, C, H, W) -> (N H W, C)."""
    return fm.permute(0, 2, 3, 1).flatten(0, 2)


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


def build(loss, probe, num_words=4096, **options):
    kd = loss(probe.s.fms[-1].shape[1], probe.t.fms[-1].shape[1], num_words, **options)
    kd.known = True  # a step is tried before the script makes the vocabulary
    return kd
