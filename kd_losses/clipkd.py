"""CLIP-KD: distil a model of image-text pairs by its embeddings, their relations and contrasts.

C. Yang, Z. An, L. Huang, J. Bi, X. Yu, H. Yang, B. Diao, Y. Xu, "CLIP-KD: An Empirical Study of CLIP Model
Distillation", CVPR 2024 (authors and venue unverified), arXiv:2307.12732.

    a0, b0 = student image and text embeddings divided by their length; u, v = the teacher's, of length 1
    a, b = a0, b0, or unit(proj_img(img_s)), unit(proj_txt(txt_s)) where the widths differ
    CE(Z) = mean over n of - log softmax(Z[n])[n]
    KL(S, T) = mean over n of KL(softmax(T[n]) || softmax(S[n])), T a constant
    task = (CE(scale_s * a0 * b0^T) + CE(scale_s * b0 * a0^T)) / 2
    crd = (KL(scale_s * a0 * b0^T, scale_t * u * v^T) + KL(scale_s * b0 * a0^T, scale_t * v * u^T)) / 2
    icl = (CE(cross_scale * a * v^T) + CE(cross_scale * b * u^T)) / 2
    fd = mean over n and d of (a - u)^2 + mean over n and d of (b - v)^2
    cross_kd = (KL(c * a * v^T, scale_t * u * v^T) + KL(c * b * u^T, scale_t * v * u^T)) / 2, c = cross_scale
    gd = squared differences of the gradients of CE in the embeddings, see `gd`
    afd = (CE(fusion_scale * x * y^T) + CE(fusion_scale * y * x^T)) / 2
    x, y = unit(fuse_img([a, u])), unit(fuse_txt([b, v]))
    loss = task + sum of the weights times these terms

Tap: both models' embeddings of image and text; row n of each is a pair. Every term but afd is a function.

Differences: the authors' code. cross_scale and fusion_scale start at log(1 / 0.07) and are used without exp;
gd divides by the logit scale where a temperature is meant (`gd(..., exact=True)` mends it, its weight then is
1 to 100, not 1e8); both as they have it. Their fusion layer fits equal widths only, here any. Their masked
feature distillation computes masked features and does not use them; `keep_patches` is what it needs. The
script for afd sets another weight, so no weight of it is published.

Source: winycg/CLIP-KD, src/open_clip/loss.py (KDClipLoss, get_grad).

Use:
    >>> import torch
    >>> from clipkd import CLIPKD
    >>> img_s, txt_s = (torch.randn(8, 32, requires_grad=True) for _ in range(2))
    >>> img_t, txt_t = torch.nn.functional.normalize(torch.randn(2, 8, 64), dim=2)
    >>> CLIPKD(32, 64)(img_s, txt_s, 14.3, img_t, txt_t, 100.0).backward()
    >>> img_s.grad.norm() > 0
    tensor(True)
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class CLIPKD(nn.Module):
    """The contrastive task loss and the weighted terms of distillation.

    Args:
        s_dim, t_dim: widths of the embeddings.
        w_crd, w_icl, w_fd: weights of relations, interactive contrast, feature mimicry; 1, 1, 2000.
        w_cross_kd, w_gd, w_afd: weights of interactive relations, gradients (authors: 1e8), augmented
            features; 0. A weight of 0 builds and computes nothing.

    Shape:
        img_s, txt_s: (N, s_dim), raw. img_t, txt_t: (N, t_dim), rows of length 1. scale_s, scale_t: logit
        scales after exp, numbers or scalar tensors. Returns a scalar. No gradient reaches the teacher's.
        `terms` returns {'task': ..., 'crd': ..., ...} without weights.
        Computed in float32, also under TF32, or in float64 as the student.

    Raises:
        ValueError: embeddings of other widths or of different numbers of pairs.
    """

    def __init__(
        self,
        s_dim: int,
        t_dim: int,
        w_crd: float = 1.0,
        w_icl: float = 1.0,
        w_fd: float = 2000.0,
        w_cross_kd: float = 0.0,
        w_gd: float = 0.0,
        w_afd: float = 0.0,
    ) -> None:
        super().__init__()
        weights = {'crd': w_crd, 'icl': w_icl, 'fd': w_fd, 'cross_kd': w_cross_kd, 'gd': w_gd, 'afd': w_afd}
        self.s_dim, self.t_dim, self.weights = s_dim, t_dim, {k: w for k, w in weights.items() if w}
        self.projected = s_dim != t_dim and bool(self.weights.keys() - {'crd'})
        start = math.log(1 / 0.07)
        if self.projected:
            self.proj_img, self.proj_txt = nn.Linear(s_dim, t_dim), nn.Linear(s_dim, t_dim)
        if w_icl or w_cross_kd:
            self.cross_scale = nn.Parameter(torch.tensor(start))
        if w_afd:
            self.fuse_img, self.fuse_txt = nn.Linear(2 * t_dim, s_dim), nn.Linear(2 * t_dim, s_dim)
            self.fusion_scale = nn.Parameter(torch.tensor(start))

    def forward(
        self,
        img_s: Tensor,
        txt_s: Tensor,
        scale_s: Tensor | float,
        img_t: Tensor,
        txt_t: Tensor,
        scale_t: Tensor | float,
    ) -> Tensor:
        terms = self.terms(img_s, txt_s, scale_s, img_t, txt_t, scale_t)
        return terms.pop('task') + sum(self.weights[name] * term for name, term in terms.items())

    def terms(self, img_s, txt_s, scale_s, img_t, txt_t, scale_t) -> dict[str, Tensor]:
        _expect('CLIPKD', 'img_s', img_s, 'N', self.s_dim)
        _expect('CLIPKD', 'txt_s', txt_s, *img_s.shape)
        _expect('CLIPKD', 'img_t', img_t, len(img_s), self.t_dim)
        _expect('CLIPKD', 'txt_t', txt_t, *img_t.shape)
        img_s, txt_s = _full(img_s), _full(txt_s, img_s)
        u, v = (_full(x.detach(), img_s) for x in (img_t, txt_t))
        scale_s, scale_t = _number(scale_s, img_s), _number(scale_t, img_s, constant=True)
        with _no_autocast(img_s):
            a0, b0 = _unit(img_s), _unit(txt_s)
            a, b = a0, b0
            if self.projected:
                a, b = _unit(_run(self.proj_img, img_s)), _unit(_run(self.proj_txt, txt_s))
            own = _cosines(a0, b0)
            wanted = self.weights.keys()
            if wanted & {'crd', 'cross_kd', 'gd'}:
                theirs = _cosines(u, v)
            if wanted & {'icl', 'cross_kd'}:
                c = _full(self.cross_scale, img_s)
                to_txt, to_img = c * _cosines(a, v), c * _cosines(b, u)
            terms = {'task': _contrast(scale_s * own, scale_s * own.T)}
            if 'crd' in wanted:
                terms['crd'] = _relations(scale_s * own, scale_s * own.T, scale_t * theirs)
            if 'icl' in wanted:
                terms['icl'] = _contrast(to_txt, to_img)
            if 'fd' in wanted:
                terms['fd'] = F.mse_loss(a, u) + F.mse_loss(b, v)
            if 'cross_kd' in wanted:
                terms['cross_kd'] = _relations(to_txt, to_img, scale_t * theirs)
            if 'gd' in wanted:
                cosines = _cosines(a, b) if self.projected else own
                terms['gd'] = _gradient_distance((a, b, cosines, scale_s), (u, v, theirs, scale_t))
            if 'afd' in wanted:
                x = _unit(_run(self.fuse_img, torch.cat([a, u], dim=1)))
                y = _unit(_run(self.fuse_txt, torch.cat([b, v], dim=1)))
                Z = _full(self.fusion_scale, img_s) * _cosines(x, y)
                terms['afd'] = _contrast(Z, Z.T)
            return terms


# the terms as functions of embeddings of length 1; scales are numbers or scalar tensors


def clip_loss(img: Tensor, txt: Tensor, scale: Tensor | float) -> Tensor:
    """CLIP's own loss: tell the pairs (n, n) of img, txt (N, D) from all others, both ways."""
    img, txt = _equal('clip_loss', img=img, txt=txt)
    Z = _number(scale, img) * _cosines(img, txt)
    return _contrast(Z, Z.T)


def crd(img_s, txt_s, scale_s, img_t, txt_t, scale_t) -> Tensor:
    """Contrastive relations: the student's distributions over the batch are the teacher's."""
    a, b = _equal('crd', img_s=img_s, txt_s=txt_s)
    u, v = _equal('crd', a, img_t=img_t, txt_t=txt_t)
    Z, theirs = _number(scale_s, a) * _cosines(a, b), _number(scale_t, a, constant=True) * _cosines(u, v)
    return _relations(Z, Z.T, theirs)


def icl(img_s, txt_s, img_t, txt_t, scale) -> Tensor:
    """Interactive contrast: student images find the teacher's texts, student texts its images."""
    a, b, u, v = _four('icl', img_s, txt_s, img_t, txt_t)
    scale = _number(scale, a)
    return _contrast(scale * _cosines(a, v), scale * _cosines(b, u))


def cross_kd(img_s, txt_s, img_t, txt_t, scale, scale_t) -> Tensor:
    """Interactive relations: what icl compares, with the teacher's distributions as targets."""
    a, b, u, v = _four('cross_kd', img_s, txt_s, img_t, txt_t)
    scale, scale_t = _number(scale, a), _number(scale_t, a, constant=True)
    return _relations(scale * _cosines(a, v), scale * _cosines(b, u), scale_t * _cosines(u, v))


def fd(img_s, txt_s, img_t, txt_t) -> Tensor:
    """Feature mimicry: mean squared difference, of images and of texts."""
    a, b, u, v = _four('fd', img_s, txt_s, img_t, txt_t)
    return F.mse_loss(a, u) + F.mse_loss(b, v)


def gd(img_s, txt_s, scale_s, img_t, txt_t, scale_t, exact: bool = False) -> Tensor:
    """Gradients of the contrastive loss in the embeddings, mean squared difference, summed over four.

    With Z = p * k^T / tau and E = softmax(Z) - I: E * k / (tau * N) in p and E^T * p / (tau * N) in k, for
    p, k = image, text and the other way round. tau is the scale, as the authors have it; exact: 1 / scale.
    """
    a, b, u, v = _four('gd', img_s, txt_s, img_t, txt_t)
    scales = _number(scale_s, a), _number(scale_t, a, constant=True)
    tau_s, tau_t = (1 / scale if exact else scale for scale in scales)
    return _gradient_distance((a, b, _cosines(a, b), tau_s), (u, v, _cosines(u, v), tau_t))


def keep_patches(
    x: Tensor, r: float = 0.75, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Drop a share r of the patches x (N, L, D) of each image, for masked feature distillation.

    Positional codes are added before, the class token is kept aside. Returns kept (N, int(L (1 - r)), D),
    mask (N, L), True where a patch was dropped, and restore (N, L): gathering along L by it undoes the order.
    """
    _expect('keep_patches', 'x', x, 'N', 'L', 'D')
    n, patches, width = x.shape
    left = int(patches * (1 - r))
    if not 0 <= r < 1 or left < 1:
        raise ValueError(f'keep_patches: r must be a share that leaves a patch of {patches}, got {r}')
    order = torch.rand(n, patches, device=x.device, **_by(generator)).argsort(dim=1)
    restore = order.argsort(dim=1)
    return x.gather(1, order[:, :left, None].expand(-1, -1, width)), restore >= left, restore


def _contrast(to_txt: Tensor, to_img: Tensor) -> Tensor:
    return -sum(F.log_softmax(Z, dim=1).diagonal().mean() for Z in (to_txt, to_img)) / 2


def _relations(to_txt: Tensor, to_img: Tensor, theirs: Tensor) -> Tensor:
    total = 0.0
    for Z, T in ((to_txt, theirs), (to_img, theirs.T)):
        log_t = F.log_softmax(T, dim=1)
        total = total + (log_t.exp() * (log_t - F.log_softmax(Z, dim=1))).sum(dim=1).mean()
    return total / 2


def _gradient_distance(student: tuple, teacher: tuple) -> Tensor:
    pairs = zip(_gradients(*student), _gradients(*teacher))
    return sum(F.mse_loss(mine, aim) for mine, aim in pairs)


def _gradients(p: Tensor, k: Tensor, cosines: Tensor, tau: Tensor | float) -> list[Tensor]:
    found = []
    for first, second, Z in ((p, k, cosines / tau), (k, p, cosines.T / tau)):
        E = F.softmax(Z, dim=1) - torch.eye(len(Z), dtype=Z.dtype, device=Z.device)
        found += [_times(E, second) / (tau * len(Z)), _times(E.T, first) / (tau * len(Z))]
    return found


def _cosines(a: Tensor, b: Tensor) -> Tensor:
    return _times(a, b.T)


def _times(a: Tensor, b: Tensor) -> Tensor:
    with _no_autocast(a):
        return (_exact(a) @ _exact(b)).to(a.dtype)


def _equal(who: str, like: Tensor | None = None, **pair: Tensor) -> list[Tensor]:
    """Two embeddings of one shape, of as many pairs as those of like, in full precision; a teacher's as
    constants."""
    (first, x), (second, y) = pair.items()
    _expect(who, first, x, 'N' if like is None else len(like), 'D')
    _expect(who, second, y, *x.shape)
    return [_full(z, x) if like is None else _full(z.detach(), like) for z in (x, y)]


def _four(who: str, img_s: Tensor, txt_s: Tensor, img_t: Tensor, txt_t: Tensor) -> list[Tensor]:
    """All of one width."""
    a, b = _equal(who, img_s=img_s, txt_s=txt_s)
    _expect(who, 'img_t', img_t, *a.shape)
    return [a, b, *_equal(who, a, img_t=img_t, txt_t=txt_t)]


def _number(scale: Tensor | float, like: Tensor, constant: bool = False) -> Tensor | float:
    if not isinstance(scale, Tensor):
        return scale
    return _full(scale.detach() if constant else scale, like)


def _by(generator: torch.Generator | None) -> dict:
    """Left out where there is none: torch.compile cannot pass None for a batch of another size."""
    return {} if generator is None else {'generator': generator}


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
    """Two crops of an image stand for image and text; the scales are CLIP's at the start."""
    img, scale = batch.views['second'], 1 / 0.07
    other = batch.student(img).feat
    with torch.no_grad():
        other_t = batch.teacher(img).feat
    u, v = (_unit(_full(feat.detach(), s.feat)) for feat in (t.feat, other_t))
    return kd(s.feat, other, scale, u, v, scale)
