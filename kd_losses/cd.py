"""CD, channel distillation: match how strongly each channel fires on average.

Z. Zhou, C. Zhuge, X. Guan, W. Liu, "Channel Distillation: Channel-Wise Attention for Knowledge Distillation",
2020, arXiv:2006.01683.

    c = ReLU of a batch norm of a 1x1 convolution of fm_s (the connector, trained with the student)
    loss = mean over n and channels of (average over positions of c - average of fm_t)^2

Tap: the map at the end of each stage, after its ReLU, one module per stage. Channels and sizes may differ.

The paper's other two parts are here as well. GKD, `GuidedKD`, is soft targets on the samples that the teacher
gets right, m_n = 1 for these, else 0:

    loss = T^2 * sum over n of m_n * KL(softmax(out_t / T) || softmax(out_s / T)) / sum over n of m_n

and 0 if it gets none right. EDT, `edt_weight`, is the authors' schedule: CD alone for 60 epochs of 200, then
cross-entropy (weight 1) and GKD (0.1) as well, and the weight of CD times 0.9 at epochs 60 and 160.

Differences: the authors sum four stages with weight 6; we average, so that 18 is 6 for networks of three
stages (of four: 24). Their teacher runs
with batch statistics by accident, ours does not; their GKD adds spurious terms where a teacher probability
underflows and divides by zero when no sample is right.

Source: zhouzaida/channel-distillation, losses/cd_loss.py (CDLoss), losses/kd_loss.py (KDLossv2),
utils/util.py (adjust_loss_alpha).

Use:
    >>> import torch
    >>> from cd import CD
    >>> fm_s, fm_t = torch.randn(8, 16, 8, 8, requires_grad=True), torch.randn(8, 64, 4, 4)
    >>> CD(16, 64)(fm_s, fm_t).backward()
    >>> fm_s.grad.norm() > 0
    tensor(True)
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class CD(nn.Module):
    """Squared error of channel means, for one pair of layers.

    Args:
        s_channels, t_channels: channels of the two maps; the connector is there also when they agree.
        relu: whether the connector ends in one, True; False for maps of a teacher that have negative values.

    Shape:
        fm_s: (N, s_channels, H_s, W_s), fm_t: (N, t_channels, H_t, W_t). Returns a scalar.
        No gradient reaches fm_t.
        Computed in float32, or in float64 as the student.

    Raises:
        ValueError: a map is not 4-D or has other channels than announced; the batch sizes differ.
    """

    def __init__(self, s_channels: int, t_channels: int, relu: bool = True) -> None:
        super().__init__()
        self.s_channels, self.t_channels = s_channels, t_channels
        self.connector = nn.Sequential(
            nn.Conv2d(s_channels, t_channels, kernel_size=1, bias=False),
            nn.BatchNorm2d(t_channels),
            *([nn.ReLU()] if relu else []),
        )
        if not relu:  # another key: a state of the other form would load without a word
            self.register_buffer('no_relu', torch.ones(1))

    def forward(self, fm_s: Tensor, fm_t: Tensor) -> Tensor:
        _expect('CD', 'fm_s', fm_s, 'N', self.s_channels, 'H', 'W')
        _expect('CD', 'fm_t', fm_t, len(fm_s), self.t_channels, 'H', 'W')
        with _no_autocast(fm_s):
            c = _run(self.connector, _full(fm_s)).mean(dim=(2, 3))
            return F.mse_loss(c, _full(fm_t.detach(), fm_s).mean(dim=(2, 3)))


class GuidedKD(nn.Module):
    """Soft targets from the samples that the teacher gets right; out_s, out_t (N, K), target (N,)."""

    def __init__(self, T: float = 1.0) -> None:
        super().__init__()
        if not T > 0:
            raise ValueError(f'GuidedKD: T must be > 0, got {T}')
        self.T = T

    def forward(self, out_s: Tensor, out_t: Tensor, target: Tensor) -> Tensor:
        _expect('GuidedKD', 'out_s', out_s, 'N', 'K')
        _expect('GuidedKD', 'out_t', out_t, *out_s.shape)
        target, valid = _labels('GuidedKD', target, *out_s.shape)
        out_s, out_t = _full(out_s), _full(out_t.detach(), out_s)
        log_p, log_q = F.log_softmax(out_s / self.T, dim=1), F.log_softmax(out_t / self.T, dim=1)
        kl = _kl(log_q, log_p, valid is None).sum(dim=1)
        # a NaN is never the right answer, but must show
        right = (out_t.argmax(dim=1) == target) | kl.isnan()
        right = right if valid is None else right & valid
        return _mean(kl, right) * self.T**2


GKD = GuidedKD  # the paper's name for it; kd_losses.GKD is the loss for language models


def edt_weight(
    base: float,
    epoch: int,
    factor: float,
    is_feature_loss: bool,
    milestones: tuple = (60, 160),
    off_until: int = 60,
) -> float:
    """The authors' early-decay schedule, epochs counted from 1: base * factor^(milestones reached), and 0 up
    to off_until for losses that are not on features (cross-entropy, GKD)."""
    if not is_feature_loss and epoch <= off_until:
        return 0.0
    return base * factor ** sum(epoch >= m for m in milestones)


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


def _no_autocast(x: Tensor) -> torch.autocast:
    """Matrix products and convolutions in the precision of their tensors; there is no autocast on meta."""
    return torch.autocast('cpu' if x.is_meta else x.device.type, enabled=False)


def _full(x: Tensor, like: Tensor | None = None) -> Tensor:
    """In float32, or float64 if the student (like) is. Inference tensors are copied, to serve backward."""
    x = x.double() if (x if like is None else like).dtype == torch.float64 else x.float()
    compiling = getattr(torch.compiler, 'is_compiling', bool)()  # torch 2.2 cannot tell: False
    return x.clone() if not compiling and x.is_inference() else x


# ------------------------------------------ how the training scripts use it; a copied file may drop this


def build(loss, probe, **options):
    """One per stage; without the ReLU where the teacher's map has negative values, as in wide networks."""
    stages = zip(probe.s.fms[1:], probe.t.fms[1:])
    return nn.ModuleList(
        loss(x.shape[1], y.shape[1], **{'relu': not bool((y < 0).any()), **options}) for x, y in stages
    )
