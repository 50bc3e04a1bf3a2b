"""WKD: Wasserstein distances, between class probabilities with a cost per pair of classes, and between maps.

J. Lv, H. Yang, P. Li, "Wasserstein Distance Rivals Kullback-Leibler Divergence for Knowledge Distillation",
NeurIPS 2024, arXiv:2412.08139.

    WKDLogit     y = target;  p, q = softmax of out_s / T, out_t / T over the classes other than y
    target = - mean over n of softmax(out_t)_y * log softmax(out_s)_y
    D = max(cost, 0) + 1e-8,  G = exp(-D / reg),  u = 1 / (K - 1)
    repeat iters times:  v = q / (G^T u + 1e-8),  u = p / (G v + 1e-8)
    wasserstein = mean over n of sum over j and k of u_j * G_jk * v_k * D_jk
    loss = target + gamma * wasserstein
    WKDFeature   z = relu(BN(convolution of fm_s)); mean and deviation of each channel in grid x grid cells
    loss = [mean_ratio * sum of (mean_z - mean_t)^2 + sum of (std_z - std_t)^2] / (grid^2 * N)

The cost between two classes is 1 - CKA of the teacher's features of their images (`cka_cost`), or 1 - cosine
of their rows in the teacher's classifier (`prototype_cost`), sharpened: 1 - exp(-sharpen * cost).

Tap: the logits and labels; the maps of the last stage, whose convolution learns with the student. From epoch
150 of 240 on the authors lower gamma and the weight of WKDFeature to 0 by half a cosine; so does our trainer.

Differences: the authors' values. They gather K - 1 classes per sample, N * K^2 numbers; here all samples
share G, and u_y = v_y = 0 does the same. Their projector cannot enlarge maps (its code fails): a teacher map
of another size is averaged to the student's. A class without variance, or a zero row, has cost 1 to all.

Source: JiamingLv/WKD, mdistiller/distillers/WKD.py (sinkhorn, wkd_logit_loss_with_speration,
wkd_feature_loss), tools/generate_cost_matrix.py.

Use:
    >>> import torch
    >>> from wkd import WKDLogit, cka_cost
    >>> out_s, out_t = torch.randn(8, 10, requires_grad=True), torch.randn(8, 10)
    >>> WKDLogit(cka_cost(torch.randn(10, 20, 5)))(out_s, out_t, torch.arange(8)).backward()
    >>> out_s.grad.norm() > 0
    tensor(True)
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class WKDLogit(nn.Module):
    """Entropic transport between the non-target classes, and cross-entropy of the target class.

    Args:
        cost: (K, K), of moving probability from class to class, see cka_cost; kept as a buffer.
        gamma: weight of the transport, 30 on ImageNet; CIFAR-100: 600 (resnet32x4 to 8x4, T 8).
        T: temperature of the transport, > 0; 2 on ImageNet.
        reg: weight of the entropy, > 0; 0.05. Below 0.012 exp(-1 / reg) is 0 in float32.
        iters: iterations, 10.

    Shape:
        out_s, out_t: (N, K), equal; target: (N,) labels, or (N, K) probabilities of which the largest counts.
        Returns a scalar. No gradient reaches out_t. `terms` returns (target, wasserstein) without gamma.
        Rows of label -100 are left out. Computed in float32, also under TF32, or in float64 as the student.

    Raises:
        ValueError: cost is not (K, K), K >= 2; T or reg is not positive; shapes differ.
    """

    def __init__(
        self, cost: Tensor, gamma: float = 30.0, T: float = 2.0, reg: float = 0.05, iters: int = 10
    ) -> None:
        super().__init__()
        _expect('WKDLogit', 'cost', cost, 'K', len(cost))
        if not (T > 0 and reg > 0):
            raise ValueError(f'WKDLogit: T and reg must be > 0, got {T} and {reg}')
        self.gamma, self.T, self.reg, self.iters = gamma, T, reg, iters
        self.register_buffer('cost', cost.detach().clone())

    def forward(self, out_s: Tensor, out_t: Tensor, target: Tensor) -> Tensor:
        target_term, wasserstein = self.terms(out_s, out_t, target)
        return target_term + self.gamma * wasserstein

    def terms(self, out_s: Tensor, out_t: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        _expect('WKDLogit', 'out_s', out_s, 'N', 'K')
        _expect('WKDLogit', 'out_s', out_s, len(out_s), len(self.cost))
        _expect('WKDLogit', 'out_t', out_t, *out_s.shape)
        if target.dim() == 2:
            _expect('WKDLogit', 'target', target, *out_s.shape)
            target = target.argmax(dim=1)
        target, valid = _labels('WKDLogit', target, *out_s.shape)
        K, y = out_s.shape[1], target[:, None]
        out_s, out_t = _full(out_s), _full(out_t.detach(), out_s)
        right = F.softmax(out_t, dim=1).gather(1, y) * F.log_softmax(out_s, dim=1).gather(1, y)

        is_y, D = _is(target, K), _full(self.cost, out_s).clamp(min=0) + 1e-8
        p, q = ((z / self.T).masked_fill(is_y, -torch.inf) for z in (out_s, out_t))
        nothing = (q == -torch.inf).all(dim=1, keepdim=True)  # the teacher masks every other class
        p, q = (F.softmax(z.masked_fill(nothing, 0.0), dim=1).masked_fill(nothing, 0.0) for z in (p, q))
        u = torch.full_like(p, 1 / (K - 1)).masked_fill(is_y, 0)  # 0 at the label, and stays 0
        u, v = sinkhorn(p, q, u, D, self.reg, self.iters)
        moved = (u * _matmul(v, (D * (-D / self.reg).exp()).T)).sum(dim=1)
        return -_mean(right.squeeze(1), valid), _mean(moved, valid)


def sinkhorn(p: Tensor, q: Tensor, u: Tensor, D: Tensor, reg: float, iters: int) -> tuple[Tensor, Tensor]:
    """Scalings u, v (N, K) of the plan u_j * exp(-D_jk / reg) * v_k between p and q (N, K); u: the first."""
    G, v = (-D / reg).exp(), u
    for _ in range(iters):
        v = q / (_matmul(u, G) + 1e-8)
        u = p / (_matmul(v, G.T) + 1e-8)
    return u, v


class WKDFeature(nn.Module):
    """Means and deviations of a projected student map and a teacher map.

    Args:
        s_channels, t_channels: channels of the two maps.
        grid: cells per side, 1; ImageNet 4.
        mean_ratio: weight of the means, 2; CIFAR-100: 4.
        eps: added to the variances, 1e-5.
        bottleneck: width of three convolutions (1x1, 3x3, 1x1; the authors' 256) in place of one 1x1; None.

    Shape:
        fm_s: (N, s_channels, H, W), fm_t: (N, t_channels, H_t, W_t), brought to (H, W). Returns a scalar.
        No gradient reaches fm_t. `terms` returns (mean, std) without mean_ratio.
        Computed in float32, or in float64 as the student.

    Raises:
        ValueError: a map has another shape; a cell has fewer than two positions.
    """

    def __init__(
        self,
        s_channels: int,
        t_channels: int,
        grid: int = 1,
        mean_ratio: float = 2.0,
        eps: float = 1e-5,
        bottleneck: int | None = None,
    ) -> None:
        super().__init__()
        self.s_channels, self.t_channels = s_channels, t_channels
        self.grid, self.mean_ratio, self.eps = grid, mean_ratio, eps
        convolutions = (
            [nn.Conv2d(s_channels, t_channels, 1)]
            if bottleneck is None
            else [
                nn.Conv2d(s_channels, bottleneck, 1),
                nn.Conv2d(bottleneck, bottleneck, 3, padding=1),
                nn.Conv2d(bottleneck, t_channels, 1),
            ]
        )
        self.projector = nn.Sequential(*convolutions, nn.BatchNorm2d(t_channels), nn.ReLU())

    def forward(self, fm_s: Tensor, fm_t: Tensor) -> Tensor:
        mean, std = self.terms(fm_s, fm_t)
        return self.mean_ratio * mean + std

    def terms(self, fm_s: Tensor, fm_t: Tensor) -> tuple[Tensor, Tensor]:
        _expect('WKDFeature', 'fm_s', fm_s, 'N', self.s_channels, 'H', 'W')
        _expect('WKDFeature', 'fm_t', fm_t, len(fm_s), self.t_channels, 'H', 'W')
        size = tuple(fm_s.shape[2:])
        if (
            min(b - a for a, b in _limits(size[0], self.grid))
            * min(b - a for a, b in _limits(size[1], self.grid))
            < 2
        ):
            raise ValueError(
                f'WKDFeature: fm_s must have 2 positions or more in each of {self.grid} x {self.grid} cells, '
                f'got {tuple(fm_s.shape)}: take a larger map or a smaller grid'
            )
        fm_s, fm_t = _full(fm_s), _full(fm_t.detach(), fm_s)
        with _no_autocast(fm_s):
            z = _run(self.projector, fm_s)
        if fm_t.shape[2:] != size:
            fm_t = F.adaptive_avg_pool2d(fm_t, size)
        (mean_s, std_s), (mean_t, std_t) = self.statistics(z), self.statistics(fm_t)
        many = self.grid**2 * len(fm_s)
        hidden = 0 * fm_s.detach().sum()  # a ReLU may swallow an inf, which must show
        return (mean_s - mean_t).square().sum() / many + hidden, (std_s - std_t).square().sum() / many

    def statistics(self, fm: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation of the cells, each (N, C, cells)."""
        (h, w), g = fm.shape[2:], self.grid
        if h % g == 0 and w % g == 0:  # cells of one size
            cells = fm.unflatten(3, (g, -1)).unflatten(2, (g, -1)).transpose(3, 4)  # (N, C, g, g, h, w)
            mean, var = cells.mean(dim=(4, 5)), cells.var(dim=(4, 5))
            return mean, (var + self.eps).sqrt()
        cells = [fm[:, :, a:b, c:d] for a, b in _limits(h, g) for c, d in _limits(w, g)]
        mean, var = (torch.stack([f(cell, dim=(2, 3)) for cell in cells], 2) for f in (torch.mean, torch.var))
        return mean, (var + self.eps).sqrt()


def _limits(n: int, grid: int) -> list[tuple[int, int]]:
    """First and last of each cell, as adaptive pooling cuts them."""
    return [(i * n // grid, -(-(i + 1) * n // grid)) for i in range(grid)]


def cka_cost(class_feats: Tensor, sharpen: float = 1.0) -> Tensor:
    """(K, M, D), M samples of each class -> (K, K), 1 - centred kernel alignment, sharpened.

    sharpen: 0 leaves the cost as it is.
    """
    _expect('cka_cost', 'class_feats', class_feats, 'C', 'M', 'D')
    x = _full(class_feats.detach())
    size = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True)
    x = x - x.mean(dim=1, keepdim=True)
    # of equal samples the mean is off by a rounding, and what is left is no direction
    equal = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True) <= 8 * torch.finfo(x.dtype).eps * size
    x = torch.where(equal, 0.0, x)
    K, M, D = x.shape
    if M <= D:  # ||Y^T X||^2 is the product of the Gram matrices X X^T and Y Y^T
        grams = _unit(_matmul(x, x.mT).flatten(1))
        alike = _matmul(grams, grams.T)
        dead = torch.linalg.vector_norm(grams, dim=1) == 0
    else:
        alike = torch.stack([_matmul(x.mT, y).square().sum(dim=(1, 2)) for y in x])
        own = alike.diagonal().sqrt()
        dead = own <= 1e-12
        own = torch.where(dead, 1.0, own)
        alike = torch.where(dead[:, None] | dead, 0.0, alike / (own[:, None] * own))
    return _cost(alike, dead, sharpen)


def prototype_cost(weight: Tensor, sharpen: float = 1.0) -> Tensor:
    """(K, D), weight of a classifier -> (K, K), 1 - cosine of its rows, sharpened as in cka_cost."""
    _expect('prototype_cost', 'weight', weight, 'K', 'D')
    rows = _unit(_full(weight.detach()))
    return _cost(_matmul(rows, rows.T), torch.linalg.vector_norm(rows, dim=1) == 0, sharpen)


def _cost(alike: Tensor, dead: Tensor, sharpen: float) -> Tensor:
    cost = torch.where(dead.diag(), 0.0, 1 - alike)
    return 1 - (-sharpen * cost).exp() if sharpen else cost


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    with _no_autocast(a):
        return (_exact(a) @ _exact(b)).to(a.dtype)


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


def _is(target: Tensor, K: int) -> Tensor:
    """(N,) -> (N, K), True at the label."""
    return torch.zeros(len(target), K, dtype=torch.bool, device=target.device).scatter_(
        1, target[:, None], True
    )


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
    return loss(torch.zeros(probe.num_classes, probe.num_classes), **options)  # see before


def before(kd, teacher, probe, per_class=100):
    """The cost from the teacher's logits of the training images, not augmented, up to 100 of each class.

    A class with fewer has its images several times; one with none, or with one, is as far from all as can be.
    """
    data, K = probe.train_set, len(kd.cost)
    if len(data) > K * per_class:  # a folder would decode all of its images until the rarest class is full
        first = [(data.targets == y).nonzero()[:per_class, 0] for y in range(K)]
        data = data.subset(torch.cat(first).sort().values)
    found = [[] for _ in range(K)]
    with torch.no_grad():
        for img, target, _ in data.test_batches(probe.batch_size):
            for out, y in zip(teacher(img).out, target.tolist()):
                if 0 <= y < K and len(found[y]) < per_class:
                    found[y].append(out)
            if min(map(len, found)) == per_class:
                break
        many = max(map(len, found))
        if not many:
            raise ValueError('wkd: the training set has no labels: the cost compares images of each class')
        nothing = torch.zeros(many, K, device=kd.cost.device)
        feats = [torch.stack((many * outs)[:many]) if outs else nothing for outs in found]
        kd.cost.copy_(cka_cost(torch.stack(feats)))


def feed(kd, s, t, batch):
    target_term, wasserstein = kd.terms(s.out, t.out, batch.target)
    return target_term + kd.gamma * batch.inner * wasserstein


def build_feature(loss, probe, **options):
    """Of the authors' CIFAR-100 recipe."""
    channels = probe.s.fms[-1].shape[1], probe.t.fms[-1].shape[1]
    return loss(*channels, **{'mean_ratio': 4.0} | options)
