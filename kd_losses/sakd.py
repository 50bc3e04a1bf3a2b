"""SAKD, spot-adaptive distillation: a policy says for every image at which layers it is distilled.

J. Song, Y. Chen, J. Ye, M. Song, "Spot-adaptive Knowledge Distillation", IEEE Transactions on Image
Processing 2022, arXiv:2205.02399.

    spots: the stages and, last, the logits.  logits of the policy = linear map of [feat_t, feat_s], (N, L, 2)
    y = softmax((logits + Gumbel noise) / tau), a[n, l] = 1 where y[n, l, 0] is the larger, gradient of y
    SPOT_l = 1 / N * sum over n of a[n, l] * base(fms_s[l], fms_t[l])[n]
    SOFT = T^2 / N * sum over n of a[n, L] * KL(softmax(out_t / T) || softmax(out_s / T))
    loss = alpha * SOFT + beta * sum over l of SPOT_l                     (of the student; a is a constant)
    base = mean over positions of (unit(mean over channels of fm_s^2) - that of fm_t)^2         (attention)

The policy learns from a forward pass in which the images take the teacher's stage where a = 1, the student's
where a = 0 (adapters between them): c = cross-entropy of its logits, s = the student's own;
c > s: c becomes gamma * c; c < s then: c / gamma; policy = c + relu(N / 2 - sum over n of a[n, L]).

Tap: maps of the stages, embeddings (detached), logits, and networks that run from any stage to the end.

Differences: one optimiser for both; the policy's part is halved, which for SGD is the authors' half learning
rate and for Adam nothing (their weight decay of 1e-3 is not here). The routed pass starts from the stem of
the usual one. Adapters between maps of unlike size resize and then apply the 1x1 convolution. The authors'
initial bias fails on today's PyTorch. The value of the row is the student's loss and half of the policy's.

Source: zju-vipa/spot-adaptive-pytorch, train.py, models/gs.py and models/classifier.py.

Use:
    >>> import torch
    >>> from sakd import SAKD
    >>> fms_s, fms_t = [torch.randn(8, 4, 6, 6, requires_grad=True)], [torch.randn(8, 9, 6, 6)]
    >>> out_s, out_t = torch.randn(8, 10, requires_grad=True), torch.randn(8, 10)
    >>> SAKD(4, 9, [4], [9])(fms_s, out_s, fms_t, out_t, mask=torch.ones(8, 2)).backward()
    >>> fms_s[0].grad.norm() * out_s.grad.norm() > 0
    tensor(True)
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SAKD(nn.Module):
    """Attention maps and soft targets at the spots that a mask chooses, and what chooses it.

    Args:
        s_dim, t_dim: widths of the embeddings that the policy reads.
        s_channels, t_channels: lists, of the maps of the stages.
        T: temperature, > 0; 4.
        alpha: weight of the soft targets; 1.
        beta: weight of the maps; 1000, the authors' for attention maps.
        gamma: factor of the policy's cross-entropy where the student is better; 2.
        homo: networks of one family: the policy begins with distilling everywhere; False.

    Shape:
        fms_s: list of maps (N, C_l, H, W), fms_t: of the teacher's, out_s, out_t: (N, K), mask: (N, stages +
        1) of 0 and 1, from `policy`. Returns a scalar. No gradient reaches the teacher's side or the mask.
        Computed in float32, or in float64 as the student.

    Raises:
        ValueError: T is not positive; the lists differ in length; shapes are wrong.
    """

    def __init__(
        self,
        s_dim: int,
        t_dim: int,
        s_channels: list[int],
        t_channels: list[int],
        T: float = 4.0,
        alpha: float = 1.0,
        beta: float = 1000.0,
        gamma: float = 2.0,
        homo: bool = False,
    ) -> None:
        super().__init__()
        if not T > 0 or not gamma > 0:
            raise ValueError(f'SAKD: T > 0 and gamma > 0 are needed, got {T} and {gamma}')
        if len(s_channels) != len(t_channels):
            raise ValueError(
                f'SAKD: s_channels and t_channels must pair the stages, got {len(s_channels)} and '
                f'{len(t_channels)}: give one number per stage'
            )
        self.T, self.alpha, self.beta, self.gamma = T, alpha, beta, gamma
        self.policy = SpotPolicy(s_dim, t_dim, len(s_channels) + 1, homo)
        self.hints = nn.ModuleList(_adapter(s, t) for s, t in zip(s_channels, t_channels))
        self.anti_hints = nn.ModuleList(_adapter(t, s) for s, t in zip(s_channels, t_channels))

    def forward(
        self, fms_s: list[Tensor], out_s: Tensor, fms_t: list[Tensor], out_t: Tensor, mask: Tensor
    ) -> Tensor:
        _expect('SAKD', 'out_s', out_s, 'N', 'K')
        _expect('SAKD', 'out_t', out_t, *out_s.shape)
        _expect('SAKD', 'mask', mask, len(out_s), len(self.hints) + 1)
        for name, fms in (('fms_s', fms_s), ('fms_t', fms_t)):
            if len(fms) != len(self.hints):
                raise ValueError(
                    f'SAKD: {name} must hold {len(self.hints)} maps, got {len(fms)}: a list, one per stage'
                )
            for i, fm in enumerate(fms):
                _expect('SAKD', f'{name}[{i}]', fm, len(out_s), 'C', 'H', 'W')
        mask = _full(mask.detach(), out_s)
        chosen = (mask > 0.5).to(mask.dtype) + 0 * mask  # a comparison hides what is not finite
        log_p = F.log_softmax(_full(out_t.detach(), out_s) / self.T, dim=1)
        log_q = F.log_softmax(_full(out_s) / self.T, dim=1)
        soft = (chosen[:, -1] * _kl(log_p, log_q).sum(dim=1)).mean() * self.T**2
        spots = sum(
            (a * attention_distance(_full(x, out_s), _full(y.detach(), out_s))).mean()
            for a, x, y in zip(chosen.T, fms_s, fms_t)
        )
        return self.alpha * soft + self.beta * spots

    @staticmethod
    def policy_objective(
        graft_logit: Tensor, target: Tensor, student_ce: Tensor, action_last: Tensor, gamma: float
    ) -> Tensor:
        """What policy and adapters minimise. student_ce: the student's own loss; action_last: (N,)."""
        target, valid = _labels('SAKD', target, *graft_logit.shape)
        c = _mean(F.cross_entropy(_full(graft_logit), target, reduction='none'), valid)
        c = torch.where(c > student_ce, gamma * c, c)
        c = torch.where(c < student_ce, c / gamma, c)
        return c + (len(target) / 2 - action_last.sum()).relu()


class SpotPolicy(nn.Module):
    """Chooses the spots of every image from both embeddings.

    Args:
        s_dim, t_dim: widths of the embeddings.
        num_spots: L.
        homo: begin with choosing all; False.

    Shape:
        feat_s: (N, s_dim), feat_t: (N, t_dim); no gradient reaches them. Returns (N, L) of 0 and 1, with the
        gradient of the softened choice.
    """

    def __init__(self, s_dim: int, t_dim: int, num_spots: int, homo: bool = False) -> None:
        super().__init__()
        self.s_dim, self.t_dim, self.num_spots = s_dim, t_dim, num_spots
        self.linear = nn.Linear(t_dim + s_dim, 2 * num_spots)
        if homo:
            with torch.no_grad():
                self.linear.bias.view(num_spots, 2)[:, 0] += 10

    def forward(
        self, feat_s: Tensor, feat_t: Tensor, tau: float = 5.0, generator: torch.Generator | None = None
    ) -> Tensor:
        _expect('SpotPolicy', 'feat_s', feat_s, 'N', self.s_dim)
        _expect('SpotPolicy', 'feat_t', feat_t, len(feat_s), self.t_dim)
        both = torch.cat([_full(feat_t.detach(), feat_s), _full(feat_s.detach())], dim=1)
        with _no_autocast(feat_s):
            logits = _run(self.linear, both).unflatten(1, (self.num_spots, 2))
        u = torch.rand(logits.shape, dtype=logits.dtype, device=logits.device, **_by(generator))
        action = choose(logits, -torch.log(-torch.log(u + 1e-20) + 1e-20), tau)[0][:, :, 0]
        return action + 0 * logits.detach().sum(dim=2)  # a choice hides what is not finite


def choose(logits: Tensor, noise: Tensor, tau: float = 5.0) -> tuple[Tensor, Tensor]:
    """(N, L, 2): the larger of both as 1, the other as 0, with the gradient of the softmax; the softmax."""
    soft = ((logits + noise) / tau).softmax(dim=2)
    hard = torch.zeros_like(soft).scatter_(2, soft.argmax(dim=2, keepdim=True), 1.0)
    return hard + soft - soft.detach(), soft


def select_and_scale(loss_fn, action_l: Tensor, f_s: Tensor, f_t: Tensor) -> Tensor:
    """Any loss at a spot, also one that relates samples: of the chosen, times their share. A GPU waits."""
    hidden = 0 * _full(action_l.detach(), f_s).sum()  # a comparison hides what is not finite
    rows = (action_l.detach() > 0.5).nonzero()[:, 0]
    if not len(rows):
        return 0 * f_s.sum() + hidden
    return hidden + len(rows) / len(f_s) * loss_fn(f_s[rows], f_t.detach()[rows])


def attention_distance(fm_s: Tensor, fm_t: Tensor) -> Tensor:
    """(N,) mean squared difference of the attention maps, of length 1, of both pooled to the smaller size."""
    size = [min(a, b) for a, b in zip(fm_s.shape[2:], fm_t.shape[2:])]
    s, t = (F.adaptive_avg_pool2d(x, size).square().mean(dim=1).flatten(1) for x in (fm_s, fm_t))
    return (_unit(s) - _unit(t)).square().mean(dim=1)


def _adapter(c_in: int, c_out: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(c_in, c_out, 1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU())


def _kl(log_p_t: Tensor, log_p_s: Tensor, on_host: bool = False) -> Tensor:
    """p_t (log p_t - log p_s), and 0 where p_t is 0 whatever the logarithms are.

    on_host: p_t may be looked at, as labels on the CPU were: the mask, a third of the time, only if needed.
    """
    p_t = log_p_t.exp()
    kl = p_t * (log_p_t - log_p_s)
    if on_host and p_t.amin().view(1).tolist()[0] > 0:  # not with NaN
        return kl
    return torch.where(p_t == 0, 0.0, kl)


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


def _unit(x: Tensor) -> Tensor:
    """Rows divided by their length; a zero row stays zero and gets no gradient."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / norm.masked_fill(norm <= 1e-12, torch.inf)  # NaN is not: it must show in the loss


def _full(x: Tensor, like: Tensor | None = None) -> Tensor:
    """In float32, or float64 if the student (like) is. Inference tensors are copied, to serve backward."""
    x = x.double() if (x if like is None else like).dtype == torch.float64 else x.float()
    compiling = getattr(torch.compiler, 'is_compiling', bool)()  # torch 2.2 cannot tell: False
    return x.clone() if not compiling and x.is_inference() else x


def _resized(fm: Tensor, size: tuple[int, int]) -> Tensor:
    """Averaged if it is larger, interpolated if it is smaller."""
    if fm.shape[2:] == size:
        return fm
    if fm.shape[2] > size[0] or fm.shape[3] > size[1]:
        return F.adaptive_avg_pool2d(fm, size)
    return F.interpolate(fm, size=size, mode='bilinear', align_corners=False)


# ------------------------------------------ how the training scripts use it; a copied file may drop this


class _Rest(nn.Module):
    """A network from a stage on, as a module."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, k: int, fm: Tensor):
        return self.net.after(k, fm)


def _still(net: nn.Module):
    """net.after whose weights and statistics are constants."""
    rest = _Rest(net)
    state = {name: p.detach() for name, p in [*rest.named_parameters(), *rest.named_buffers()]}
    dtype = next(iter(state.values())).dtype
    return lambda k, fm: torch.func.functional_call(rest, state, (k, fm.to(dtype)))


def routed(kd, s, t, batch, action: Tensor) -> Tensor:
    """Logits of the pass in which every image takes the stages that its actions say."""
    after_s, after_t = _still(batch.net_s), _still(batch.net_t)
    to_s, to_t = _full(s.fms[0].detach()), _full(t.fms[0].detach(), s.fms[0])
    for k, (hint, anti_hint) in enumerate(zip(kd.hints, kd.anti_hints)):
        fs, ft = after_s(k, to_s).fms[0], after_t(k, to_t).fms[0]
        a = action[:, k, None, None, None]
        to_t = (1 - a) * _run(hint, _resized(fs, tuple(ft.shape[2:]))) + a * ft
        to_s = (1 - a) * fs + a * _run(anti_hint, _resized(ft, tuple(fs.shape[2:])))
    last = action[:, -1, None]
    out_t = after_t(len(kd.hints), to_t).out
    out_t = out_t.masked_fill(out_t == -torch.inf, torch.finfo(out_t.dtype).min / 2)  # 0 times -inf is NaN
    return (1 - last) * after_s(len(kd.hints), to_s).out + last * out_t


def feed(kd, s, t, batch):
    """The student's loss, and half of the policy's: their gradients reach different parameters."""
    stages = len(kd.hints)
    action = kd.policy(s.feat, t.feat, generator=batch.generator)
    loss = kd(s.fms[1 : stages + 1], s.out, t.fms[1 : stages + 1], t.out, action)
    training = batch.net_s.training
    batch.net_s.eval()
    with _no_autocast(s.feat):
        graft = routed(kd, s, t, batch, action)
    batch.net_s.train(training)
    graft = graft + 0 * (s.fms[0].detach().sum() + t.fms[0].detach().sum())  # a network may hide infinity
    target, valid = _labels('SAKD', batch.target, *s.out.shape)
    own = _mean(F.cross_entropy(_full(s.out.detach()), target, reduction='none'), valid)
    return loss + 0.5 * kd.policy_objective(graft, batch.target, own, action[:, -1], kd.gamma)


def build(loss, probe, **options):
    s, t = probe.s, probe.t
    pairs = list(zip(s.fms[1:], t.fms[1:]))
    options = {'homo': type(probe.net_s) is type(probe.net_t), **options}
    return loss(
        s.feat.shape[1],
        t.feat.shape[1],
        [x.shape[1] for x, _ in pairs],
        [y.shape[1] for _, y in pairs],
        **options,
    )
