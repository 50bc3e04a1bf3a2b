"""AdaIN-KD: the teacher, given its own map with the student's statistics, should not notice the difference.

J. Yang, B. Martinez, A. Bulat, G. Tzimiropoulos, "Knowledge Distillation via Adaptive Instance
Normalization", 2020, arXiv:2003.04289.

    mu, sigma: mean and deviation over positions, per sample and channel, sigma = sqrt(variance + eps)
    stat = mean over n, c of (mu_s - mu_t)^2 + mean over n, c of (sigma_s - sigma_t)^2
    y = sigma_s * (fm_t - mu_t) / sigma_t + mu_s
    adain = mean over n, k of (teacher_tail(y) - out_t)^2    teacher_tail: the teacher from here on
    loss = stat_weight * stat + adain                       the student is reached through mu_s and sigma_s

Tap: maps of the same depth, by default the last before its ReLU (the tail is then ReLU, average, classifier),
and the teacher's logits. Sizes may differ; channels through a connector (1x1 convolution, batch norm, ReLU).

Differences: a reconstruction. The authors' code for this paper is not public and only the abstract could be
read; the formula is from secondary sources, the weights are guesses.

Source: formula only. jingyang2017/KD_SRRL cites the paper but holds another loss.

Use:
    >>> import torch
    >>> from adain import AdaINKD
    >>> fm_s, fm_t = torch.randn(8, 16, 4, 4, requires_grad=True), torch.randn(8, 16, 4, 4)
    >>> tail = torch.nn.Sequential(torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(256, 10))
    >>> AdaINKD()(fm_s, fm_t, tail(fm_t), tail).backward()
    >>> fm_s.grad.norm() > 0
    tensor(True)
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class AdaINKD(nn.Module):
    """Squared errors of channel statistics, and of the teacher's logits under the student's statistics.

    Args:
        s_channels, t_channels: channels of the two maps; a connector is built where they differ. None: equal.
        stat_weight: weight of the statistics; 1.
        eps: added to the variance, > 0; 1e-5.

    Shape:
        fm_s: (N, s_channels, H_s, W_s), fm_t: (N, t_channels, H_t, W_t), each of more than one position;
        out_t: (N, K); teacher_tail: (N, t_channels, H_t, W_t) -> (N, K), frozen; a module of any precision or
        a function of maps in the student's full one. Returns a scalar. No gradient reaches fm_t and out_t.
        `terms` returns (stat, adain). Computed in float32, or in float64 as the student.

    Raises:
        ValueError: only one of the channels is given; eps is not positive; shapes do not fit.
    """

    def __init__(
        self,
        s_channels: int | None = None,
        t_channels: int | None = None,
        stat_weight: float = 1.0,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        if (s_channels is None) != (t_channels is None):
            raise ValueError(
                f'AdaINKD: give s_channels and t_channels or neither, got {s_channels}, {t_channels}'
            )
        if not eps > 0:
            raise ValueError(f'AdaINKD: eps must be > 0, got {eps}')
        self.s_channels, self.stat_weight, self.eps = s_channels, stat_weight, eps
        self.connector = None
        if s_channels != t_channels:
            self.connector = nn.Sequential(
                nn.Conv2d(s_channels, t_channels, 1, bias=False), nn.BatchNorm2d(t_channels), nn.ReLU()
            )

    def forward(self, fm_s: Tensor, fm_t: Tensor, out_t: Tensor, teacher_tail) -> Tensor:
        stat, adain = self.terms(fm_s, fm_t, out_t, teacher_tail)
        return self.stat_weight * stat + adain

    def terms(self, fm_s: Tensor, fm_t: Tensor, out_t: Tensor, teacher_tail) -> tuple[Tensor, Tensor]:
        _expect('AdaINKD', 'fm_s', fm_s, 'N', self.s_channels or 'C', 'H', 'W')
        channels = fm_s.shape[1] if self.connector is None else self.connector[0].out_channels
        _expect('AdaINKD', 'fm_t', fm_t, len(fm_s), channels, 'H', 'W')
        if min(fm_s[0, 0].numel(), fm_t[0, 0].numel()) < 2:
            shapes = f'{tuple(fm_s.shape)} and {tuple(fm_t.shape)}'
            raise ValueError(f'AdaINKD: fm_s and fm_t must have H W > 1, got {shapes}: tap an earlier layer')
        with _no_autocast(fm_s):
            s, t = _full(fm_s), _full(fm_t.detach(), fm_s)
            mu_s, sigma_s = self._statistics(s if self.connector is None else _run(self.connector, s))
            mu_t, sigma_t = self._statistics(t)
            stat = F.mse_loss(mu_s, mu_t) + F.mse_loss(sigma_s, sigma_t)
            y = sigma_s * (t - mu_t) / sigma_t + mu_s
            out = _run(teacher_tail, y) if isinstance(teacher_tail, nn.Module) else teacher_tail(y)
            out = _full(out, s)
            _expect('AdaINKD', 'out_t', out_t, *out.shape)  # what teacher_tail gives
            return stat, F.mse_loss(out, _full(out_t.detach(), s))

    def _statistics(self, fm: Tensor) -> tuple[Tensor, Tensor]:
        """(N, C, 1, 1) each."""
        variance, mean = torch.var_mean(fm, dim=(2, 3), correction=0, keepdim=True)
        return mean, (variance + self.eps).sqrt()


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


def _full(x: Tensor, like: Tensor | None = None) -> Tensor:
    """In float32, or float64 if the student (like) is. Inference tensors are copied, to serve backward."""
    x = x.double() if (x if like is None else like).dtype == torch.float64 else x.float()
    compiling = getattr(torch.compiler, 'is_compiling', bool)()  # torch 2.2 cannot tell: False
    return x.clone() if not compiling and x.is_inference() else x


# ------------------------------------------ how the training scripts use it; a copied file may drop this


def feed(kd, s, t, batch):
    def rest(fm):  # of the teacher, after its last map
        return _run(batch.net_t.classifier_layer(), fm.relu().mean(dim=(2, 3)))

    return kd(s.pres[-1], t.pres[-1], t.out, rest)


def build(loss, probe, **options):
    feat = probe.t.pres[-1].relu().mean(dim=(2, 3))  # stored answers say here that they have no maps
    layer = probe.net_t.classifier_layer()
    fits = layer.weight.shape[1:] == feat.shape[1:]
    if not fits or not _close(_run(layer, feat), probe.t.out):
        raise ValueError(
            'AdaINKD: the teacher must end in ReLU, average over positions and classifier, as what is run of '
            'it here does: take a resnet, wrn or vgg'
        )
    return loss(probe.s.fms[-1].shape[1], probe.t.fms[-1].shape[1], **options)


def _close(out: Tensor, wanted: Tensor) -> bool:
    """As far as bfloat16 goes; logits of a head that is all zero say nothing."""
    most = 0.05 * float(wanted.detach().abs().max())
    return most > 0 and torch.allclose(out.float(), wanted.float(), rtol=0, atol=most)
