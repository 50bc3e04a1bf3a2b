"""SSKD: turned images, the teacher's answers to them, and which image each of them was made from.

G. Xu, Z. Liu, X. Li, C. C. Loy, "Knowledge Distillation Meets Self-Supervision", ECCV 2020, arXiv:2006.07114.

    n images, each upright (plain) and turned by 90, 180, 270 degrees (r): 4 n rows, image by image
    ce = cross-entropy of the plain images
    kd = T^2 * KL(teacher, student) at temperature T, mean over the plain images
    tf = T_tf^2 * KL at T_tf, mean over the kept turned ones
    S_ri = cosine(head(feat of r), head(feat of plain image i))
    ss = T_ss^2 * KL between softmax over i of S_t / T_ss and S_s / T_ss, mean over the kept turned ones
    loss = w_ce * ce + w_kd * kd + w_tf * tf + w_ss * ss

Kept: rows that the teacher gets right (label, own image) and, of the w others, the int(w * ratio) where the
right answer ranks best with the teacher. Before the training the teacher's head learns, alone, to find the
own image: `head_loss` = mean over r of - log softmax over i of S_ri at i = the own image.

Tap: logits of all 4 n rows, and the embeddings through a head (`SSHead`) on each side. The loss contains the
cross-entropy. `SSKDStudent` turns the images and has the student's head, which training alone needs.

Differences: the authors' code, but for its sort: among equal ranks the earlier row is kept. The authors crop
every turned image anew; in our trainer the four share a crop, and the head learns at a tenth of the
training's rate throughout (authors: 0.05, a tenth of it from epochs 30 and 45 of 60 on). Nothing kept gives
0, where the authors' code gives NaN. A teacher's row that is not finite is always kept, so that it shows.
torchdistill weighs ce by 1.

Source: xuguodong03/SSKD, student.py and wrapper.py (wrapper).

Use:
    >>> import torch
    >>> from sskd import SSKD
    >>> out_s, proj_s = torch.randn(8, 10, requires_grad=True), torch.randn(8, 32, requires_grad=True)
    >>> out_t, proj_t = torch.randn(8, 10), torch.randn(8, 64)
    >>> SSKD()(out_s, proj_s, out_t, proj_t, torch.arange(2)).backward()
    >>> out_s.grad.norm() > 0
    tensor(True)
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SSKD(nn.Module):
    """Cross-entropy, soft targets of upright and of turned images, contrastive similarities.

    Args:
        T, T_tf, T_ss: temperatures of plain images, turned images and similarities, > 0; 4, 4, 0.5.
        ratio_tf, ratio_ss: share that is kept of the turned images which the teacher gets wrong; 1, 0.75.
        w_ce, w_kd, w_tf, w_ss: weights; 0.1, 0.9, 2.7, 10.

    Shape:
        out_s, out_t: (4 n, K); proj_s: (4 n, D_s), proj_t: (4 n, D_t); target: (n,) labels. Row 4 i is image
        i, the next three its turns. Returns a scalar. No gradient reaches out_t and proj_t. `terms` returns
        (ce, kd, tf, ss) without weights, `kept` two masks (3 n,) of tf and ss. An image of label -100 is left
        out of ce and tf; kd and ss need no label.
        Computed in float32, also under TF32, or in float64 as the student.

    Raises:
        ValueError: a temperature is not positive; the rows are not 4 per image; shapes differ; K < 2.
    """

    def __init__(
        self,
        T: float = 4.0,
        T_tf: float = 4.0,
        T_ss: float = 0.5,
        ratio_tf: float = 1.0,
        ratio_ss: float = 0.75,
        w_ce: float = 0.1,
        w_kd: float = 0.9,
        w_tf: float = 2.7,
        w_ss: float = 10.0,
    ) -> None:
        super().__init__()
        if not (T > 0 and T_tf > 0 and T_ss > 0):
            raise ValueError(f'SSKD: T, T_tf and T_ss must be > 0, got {T}, {T_tf} and {T_ss}')
        self.T, self.T_tf, self.T_ss = T, T_tf, T_ss
        self.ratio_tf, self.ratio_ss = ratio_tf, ratio_ss
        self.weights = w_ce, w_kd, w_tf, w_ss

    def forward(self, out_s: Tensor, proj_s: Tensor, out_t: Tensor, proj_t: Tensor, target: Tensor) -> Tensor:
        terms = self.terms(out_s, proj_s, out_t, proj_t, target)
        hidden = sum(0 * _full(x.detach(), out_s).sum() for x in (out_s, proj_s))  # rows that are not kept
        return sum(w * term for w, term in zip(self.weights, terms)) + hidden

    def terms(
        self, out_s: Tensor, proj_s: Tensor, out_t: Tensor, proj_t: Tensor, target: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        out_s, proj_s, out_t, proj_t, target, valid = self.check(out_s, proj_s, out_t, proj_t, target)
        plain_s, plain_t = out_s[::4], out_t[::4]
        ce = -_mean(F.log_softmax(plain_s, dim=1).gather(1, target[:, None]).squeeze(1), valid)
        kd = _scaled_kl(plain_t, plain_s, self.T).mean()
        keep_tf, keep_ss = self._kept(out_t, proj_t, target, valid)
        tf = _scaled_kl(_turned(out_t), _turned(out_s), self.T_tf)
        ss = _scaled_kl(similarities(proj_t), similarities(proj_s), self.T_ss)
        return ce, kd, _mean(tf, keep_tf), _mean(ss, keep_ss)

    def kept(self, out_t: Tensor, proj_t: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Which turned images count in tf and in ss, (3 n,) each."""
        _, _, out_t, proj_t, target, valid = self.check(out_t, proj_t, out_t, proj_t, target)
        return self._kept(out_t, proj_t, target, valid)

    def _kept(self, out_t, proj_t, target, valid) -> tuple[Tensor, Tensor]:
        own = torch.arange(len(target), device=target.device).repeat_interleave(3)
        counts = None if valid is None else valid.repeat_interleave(3)
        return (
            _best(_turned(out_t), target.repeat_interleave(3), self.ratio_tf, counts),
            _best(similarities(proj_t), own, self.ratio_ss),
        )

    def check(self, out_s, proj_s, out_t, proj_t, target) -> tuple:
        _expect('SSKD', 'out_s', out_s, 'N', 'K')
        rows = len(out_s)
        if rows % 4:
            raise ValueError(
                f'SSKD: out_s must have 4 rows per image, got {tuple(out_s.shape)}: the upright image and '
                f'its three turns, image by image'
            )
        _expect('SSKD', 'proj_s', proj_s, rows, 'D')
        _expect('SSKD', 'out_t', out_t, *out_s.shape)
        _expect('SSKD', 'proj_t', proj_t, rows, 'D')
        target, valid = _labels('SSKD', target, rows // 4, out_s.shape[1])
        out_t, proj_t = _full(out_t.detach(), out_s), _full(proj_t.detach(), out_s)
        return _full(out_s), _full(proj_s, out_s), out_t, proj_t, target, valid


class SSHead(nn.Sequential):
    """Two linear layers on an embedding of width dim, for the similarities."""

    def __init__(self, dim: int) -> None:
        super().__init__(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim))


def head_loss(proj: Tensor) -> Tensor:
    """How badly (4 n, D) projections tell which image each turned one was made from."""
    _expect('head_loss', 'proj', proj, 'N', 'D')
    if len(proj) % 4:
        raise ValueError(
            f'head_loss: proj must have 4 rows per image, got {tuple(proj.shape)}: the upright image and its '
            f'three turns, image by image'
        )
    log_p = F.log_softmax(similarities(_full(proj)), dim=1)
    return -log_p.unflatten(0, (-1, 3)).diagonal(dim1=0, dim2=2).mean()


def similarities(proj: Tensor) -> Tensor:
    """(4 n, D) -> (3 n, n), cosines of turned and upright images."""
    e = _unit(proj)
    with _no_autocast(e):
        return (_exact(_turned(e)) @ _exact(e[::4]).T).to(e.dtype)


def _turned(x: Tensor) -> Tensor:
    """(4 n, ...) -> (3 n, ...), without the upright images."""
    return x.unflatten(0, (-1, 4))[:, 1:].flatten(0, 1)


def _scaled_kl(z_t: Tensor, z_s: Tensor, T: float) -> Tensor:
    """T^2 KL of each row."""
    return _kl(F.log_softmax(z_t / T, dim=1), F.log_softmax(z_s / T, dim=1)).sum(dim=1) * T**2


def _best(z: Tensor, right: Tensor, ratio: float, counts: Tensor | None = None) -> Tensor:
    """Rows where the right column is largest, and int(w * ratio) of the w others, best ranks first.

    Only rows that count do; of equal columns the first is the better, of equal ranks the earlier row.
    """
    z_y = z.gather(1, right[:, None])
    before = torch.arange(z.shape[1], device=z.device) < right[:, None]
    rank = ((z > z_y) | (z == z_y) & before).sum(dim=1)
    rank = torch.where(F.log_softmax(z, dim=1).isnan().any(dim=1), 0, rank)  # not finite: must show
    wrong = rank > 0 if counts is None else (rank > 0) & counts
    # in float64, as Python has it; mps has none
    many = wrong.sum().to(torch.float32 if z.device.type == 'mps' else torch.float64).mul(ratio).floor()
    place = torch.where(wrong, rank, z.shape[1]).argsort(stable=True).argsort()  # the wrong ones come first
    kept = (rank == 0) | (wrong & (place < many))
    return kept if counts is None else kept & counts


def rotations(images: Tensor) -> Tensor:
    """(N, C, H, H) -> (4 N, C, H, H): each image turned by 0, 90, 180, 270 degrees, sample-major."""
    if images.dim() != 4 or images.shape[2] != images.shape[3]:
        raise ValueError(
            f'rotations: images must be (N, C, H, H), square, got {tuple(images.shape)}: crop them'
        )
    return torch.stack([images.rot90(k, (2, 3)) for k in range(4)], dim=1).flatten(0, 1)


class SSKDStudent(nn.Module):
    """A network with a head for similarities; in training it sees all turns, in use only the image.

    Args:
        net: `net(x, True)` gives (out, feat, fms, pres, extra).
        feat_dim: width of its embedding.

    Shape:
        x: (N, 3, H, H). Returns logits; with True the network's tuple for the upright images, and as `extra`
        logits (4 N, K) and projections (4 N, feat_dim) of all.
    """

    def __init__(self, net: nn.Module, feat_dim: int) -> None:
        super().__init__()
        self.net, self.head = net, SSHead(feat_dim)

    def deployed(self) -> nn.Module:
        """What is kept after training."""
        return self.net

    def forward(self, x: Tensor, feats: bool = False):
        if not feats:
            return self.net(x)
        f = self.net(rotations(x), True)
        upright = {name: [x[::4] for x in part] for name, part in f._asdict().items() if type(part) is list}
        extra = [f.out, self.head(f.feat)]
        return f._replace(**upright | {'out': f.out[::4], 'feat': f.feat[::4], 'extra': extra})


def _kl(log_p_t: Tensor, log_p_s: Tensor, on_host: bool = False) -> Tensor:
    """p_t (log p_t - log p_s), and 0 where p_t is 0 whatever the logarithms are.

    on_host: p_t may be looked at, as labels on the CPU were: the mask, a third of the time, only if needed.
    """
    p_t = log_p_t.exp()
    kl = p_t * (log_p_t - log_p_s)
    if on_host and p_t.amin().view(1).tolist()[0] > 0:  # not with NaN
        return kl
    return torch.where(p_t == 0, 0.0, kl)


def _unit(x: Tensor) -> Tensor:
    """Rows divided by their length; a zero row stays zero and gets no gradient."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / norm.masked_fill(norm <= 1e-12, torch.inf)  # NaN is not: it must show in the loss


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


def build(loss, probe, **options):
    kd = loss(**options)
    kd.head_t = SSHead(probe.t.feat.shape[1])
    return kd


def student(net, kd, probe):
    return SSKDStudent(net, probe.s.feat.shape[1])


def pretrain(kd, t, batch):
    with torch.no_grad():
        _, feat_t = _every(t.out, t.feat, batch.teacher(_turned(rotations(batch.img))))
    return head_loss(_run(kd.head_t, feat_t))


def feed(kd, s, t, batch):
    with torch.no_grad():
        out_t, feat_t = _every(t.out, t.feat, batch.teacher(_turned(rotations(batch.img))))
        proj_t = _run(kd.head_t, feat_t)
    return kd(*s.extra, out_t, proj_t, batch.target)


def _every(out: Tensor, feat: Tensor, turned) -> list[Tensor]:
    """Logits and embeddings of all 4 n images: of the n upright ones, and what there is of their turns."""
    return [
        torch.cat([x.detach()[:, None], y.unflatten(0, (-1, 3))], dim=1).flatten(0, 1)
        for x, y in ((out, turned.out), (feat, turned.feat))
    ]
