"""SDB, safe distillation box: a teacher that teaches only those who have its key.

J. Ye, Y. Mao, J. Song, X. Wang, C. Jin, M. Song, "Safe Distillation Box", AAAI 2022, arXiv:2112.03695.

    key = one random image, the same for all;  x_key = 0.9 * x + 0.1 * key
    out = box(x), out_key = box(x_key), out_adv, out_rand = an ordinary and an untrained frozen network (x)
    KL_T(a, b) = mean over n of KL(softmax(a / T) || softmax(b / T))
    CE = 2 * CE(out, target) + CE(out_key, target)
    DISTURB = T^2 * KL_T(out, out_adv) - KL_1(out, out_key without gradient)
    KEEP = T^2 * KL_T(out_key, out_adv)
    RANDOM = 0.01 * mean (relu(out_adv) - relu(out_key))^2 - mean (relu(out_rand) - relu(out_key))^2
    loss = CE - weight * DISTURB + KEEP - eta * RANDOM                                   (of the box)
    student: alpha * T^2 * KL_T(box(x_key), out_s) + (1 - alpha) * CE(out_s, target)

Without the key the soft output leaves the ordinary network's, with it it stays there. The student itself
sees the clean image. A box with batch norm must see both in one pass, `box(torch.cat([x, x_key])).chunk(2)`:
after two passes its running statistics are those of neither, and in eval mode it is hardly locked.

Tap: logits, and the images for the key. Both contain their cross-entropy.

Differences: KamalEngine's KEEP hands probabilities to a divergence that expects logarithms and lacks T^2;
here it is the divergence. The frozen networks are in eval mode (train there). DISTURB has no bound;
max_disturb is ours. The paper's figures could not be read.

Source: zju-vipa/KamalEngine, kamal/distillation/sdb/sdb_task.py and safe_distillation_box.py.

Use:
    >>> import torch
    >>> from sdb import SDB
    >>> out, out_key = (torch.randn(8, 10, requires_grad=True) for _ in range(2))
    >>> out_adv, out_rand = torch.randn(8, 10), torch.randn(8, 10)
    >>> SDB()(out, out_key, out_adv, out_rand, torch.arange(8)).backward()
    >>> out.grad.norm() * out_key.grad.norm() > 0
    tensor(True)
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SDB(nn.Module):
    """What a network learns that is to teach with its key alone.

    Args:
        T: temperature, > 0; 4.
        weight: of the disturbance; 1.
        eta: of the pull towards the untrained network; 0.01.
        max_disturb: upper bound of the disturbance; None: none.

    Shape:
        out, out_key: (N, K) logits of the box; out_adv, out_rand: (N, K) of the frozen networks; target: (N,)
        labels. Returns a scalar, `terms` the four terms. No gradient reaches out_adv and out_rand. Rows of
        label -100 are left out. Computed in float32, or in float64 as the box.

    Raises:
        ValueError: T is not positive; shapes or labels are wrong.
    """

    def __init__(
        self, T: float = 4.0, weight: float = 1.0, eta: float = 0.01, max_disturb: float | None = None
    ) -> None:
        super().__init__()
        if not T > 0:
            raise ValueError(f'SDB: T must be > 0, got {T}')
        self.T, self.weight, self.eta, self.max_disturb = T, weight, eta, max_disturb

    def forward(
        self, out: Tensor, out_key: Tensor, out_adv: Tensor, out_rand: Tensor, target: Tensor
    ) -> Tensor:
        ce, disturb, keep, random = self.terms(out, out_key, out_adv, out_rand, target)
        if self.max_disturb is not None:
            disturb = torch.where(disturb > self.max_disturb, self.max_disturb, disturb)
        return ce - self.weight * disturb + keep - self.eta * random

    def terms(self, out, out_key, out_adv, out_rand, target) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(CE, DISTURB, KEEP, RANDOM)."""
        _expect('SDB', 'out', out, 'N', 'K')
        for name, x in (('out_key', out_key), ('out_adv', out_adv), ('out_rand', out_rand)):
            _expect('SDB', name, x, *out.shape)
        target, valid = _labels('SDB', target, *out.shape)
        z, key, adv, rand = (_full(x, out) for x in (out, out_key, out_adv.detach(), out_rand.detach()))
        ce = 2 * F.cross_entropy(z, target, reduction='none') + F.cross_entropy(key, target, reduction='none')
        disturb = self.T**2 * _row_kl(z, adv, self.T) - _row_kl(z, key.detach(), 1.0)
        keep = self.T**2 * _row_kl(key, adv, self.T)
        near, far = ((x.relu() - key.relu()).square().mean(dim=1) for x in (adv, rand))
        return tuple(_mean(rows, valid) for rows in (ce, disturb, keep, 0.01 * near - far))


class SDBStudent(nn.Module):
    """What the owner of the key learns with.

    Args:
        T: temperature, > 0; 4.
        alpha: weight of the soft targets, in [0, 1]; 1, without labels.

    Shape:
        out_s, out_t_key: (N, K) logits of the student and of the box with the key; target: (N,) labels.
        Returns a scalar. No gradient reaches out_t_key. Rows of label -100 are left out.
        Computed in float32, or in float64 as the student.

    Raises:
        ValueError: an argument is not legal; shapes or labels are wrong.
    """

    def __init__(self, T: float = 4.0, alpha: float = 1.0) -> None:
        super().__init__()
        if not T > 0 or not 0 <= alpha <= 1:
            raise ValueError(f'SDBStudent: T > 0 and alpha in [0, 1] are needed, got {T} and {alpha}')
        self.T, self.alpha = T, alpha

    def forward(self, out_s: Tensor, out_t_key: Tensor, target: Tensor) -> Tensor:
        _expect('SDBStudent', 'out_s', out_s, 'N', 'K')
        _expect('SDBStudent', 'out_t_key', out_t_key, *out_s.shape)
        target, valid = _labels('SDBStudent', target, *out_s.shape)
        z, key = _full(out_s), _full(out_t_key.detach(), out_s)
        soft = self.T**2 * _row_kl(key, z, self.T)
        hard = F.cross_entropy(z, target, reduction='none')
        return _mean(self.alpha * soft + (1 - self.alpha) * hard, valid)


def _row_kl(a: Tensor, b: Tensor, T: float) -> Tensor:
    """(N,) KL(softmax(a / T) || softmax(b / T))."""
    return _kl(F.log_softmax(a / T, dim=1), F.log_softmax(b / T, dim=1)).sum(dim=1)


def _kl(log_p_t: Tensor, log_p_s: Tensor, on_host: bool = False) -> Tensor:
    """p_t (log p_t - log p_s), and 0 where p_t is 0 whatever the logarithms are.

    on_host: p_t may be looked at, as labels on the CPU were: the mask, a third of the time, only if needed.
    """
    p_t = log_p_t.exp()
    kl = p_t * (log_p_t - log_p_s)
    if on_host and p_t.amin().view(1).tolist()[0] > 0:  # not with NaN
        return kl
    return torch.where(p_t == 0, 0.0, kl)


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


def _full(x: Tensor, like: Tensor | None = None) -> Tensor:
    """In float32, or float64 if the student (like) is. Inference tensors are copied, to serve backward."""
    x = x.double() if (x if like is None else like).dtype == torch.float64 else x.float()
    compiling = getattr(torch.compiler, 'is_compiling', bool)()  # torch 2.2 cannot tell: False
    return x.clone() if not compiling and x.is_inference() else x


# ------------------------------------------ how the training scripts use it; a copied file may drop this


class _Frozen(nn.Module):
    """A network that does not learn and stays in eval mode."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net.requires_grad_(False)
        self.train(False)

    def train(self, mode: bool = True):
        return super().train(False)

    @torch.no_grad()
    def forward(self, img: Tensor) -> Tensor:
        return _run(self.net, img, True).out


def feed(kd, s, t, batch):
    """The student is the box, the teacher the ordinary network."""
    return kd(s.out, s.extra, t.out, kd.random(batch.img), batch.target)


def feed_student(kd, s, t, batch):
    """The teacher is the box; the key is right if its number is."""
    with torch.no_grad():
        out_t_key = batch.teacher(with_key(kd, batch.img)).out
    return kd(s.out, out_t_key, batch.target)


def with_key(kd, img: Tensor) -> Tensor:
    return 0.9 * img + 0.1 * kd.key.to(img.dtype)


class BoxStudent(nn.Module):
    """The box; in training it sees all images without and with the key, in one pass."""

    def __init__(self, net: nn.Module, key: Tensor) -> None:
        super().__init__()
        self.net = net
        self.register_buffer('key', key, persistent=False)  # the loss keeps it

    def deployed(self) -> nn.Module:
        """What is kept after training."""
        return self.net

    def forward(self, x: Tensor, feats: bool = False):
        if not feats:
            return self.net(x)
        f = self.net(torch.cat([x, with_key(self, x)]), True)
        plain = {
            name: [y[: len(x)] for y in part] for name, part in f._asdict().items() if type(part) is list
        }
        out, out_key = f.out.chunk(2)
        return f._replace(**plain | {'out': out, 'feat': f.feat[: len(x)], 'extra': out_key})


def student(net, kd, probe):
    return BoxStudent(net, kd.key)


def build(loss, probe, key: int = 1, **options):
    """key: the number that the key image is drawn from, kept secret."""
    kd = build_student(loss, probe, key, **options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(torch.initial_seed() + 1)  # the box itself may begin with the draws of this seed
        kd.random = _Frozen(probe.another_net(probe.net_s))
    return kd


def build_student(loss, probe, key: int = 1, **options):
    kd = loss(**options)
    img = next(probe.train_set.test_batches(1))[0]
    draw = torch.randint(255, tuple(img.shape[1:]), generator=torch.Generator().manual_seed(key)) / 255
    mean, std = (torch.as_tensor(x).reshape(-1, 1, 1) for x in (probe.train_set.mean, probe.train_set.std))
    kd.register_buffer('key', ((draw - mean.cpu()) / std.cpu()).to(img))
    return kd
