"""CWD, channel-wise distillation: where in the picture does each channel fire?

C. Shu, Y. Liu, J. Gao, Z. Yan, C. Shen, "Channel-wise Knowledge Distillation for Dense Prediction", ICCV
2021, arXiv:2011.13256.

    x = ReLU(BN(1x1 conv of fm_s)) where channels are given and differ, else fm_s
    p = softmax of fm_t[n, c] / tau over the H * W positions,  q = the same of x[n, c]
    loss = tau^2 / (N * C) * sum over n, c and positions of p * (log p - log q)

Every channel of every picture is one distribution over the positions: a large region counts no more than a
small one, and how high a channel reaches counts nothing.

Tap: the logits before they are enlarged to the picture's size (weight 3, no channels given), or the map that
the classifier reads (weight 50), or each map of a feature pyramid (tau 1, weight 10). One instance per map;
its connector is trained with the student.

Differences: the authors take the softmax and then its logarithm, which is infinite for a channel that spreads
over more than about 103 * tau; log_softmax has the same value and no such limit. Their connector has
BatchNorm with a leaky ReLU, then ReLU: together BatchNorm and ReLU. Their options: 'spatial' is soft targets
per pixel (st.py), 'none', their default, compares the first picture of the batch only.

Source: irfanICMLL/TorchDistiller, SemSeg-distill/utils/criterion.py (CriterionCWD).

Use:
    >>> import torch
    >>> from cwd import CWD
    >>> out_s, out_t = torch.randn(2, 19, 8, 8, requires_grad=True), torch.randn(2, 19, 8, 8)
    >>> CWD()(out_s, out_t).backward()
    >>> out_s.grad.norm() > 0
    tensor(True)
"""

import torch
from torch import Tensor, nn


class CWD(nn.Module):
    """Divergence between two maps, every channel a distribution over the positions.

    Args:
        s_channels, t_channels: channels of the two maps; with both given and different, a connector brings
            the student's to the teacher's. None for both: the maps have equal channels.
        tau: temperature, > 0; 4.

    Shape:
        fm_s: (N, s_channels, H, W), fm_t: (N, t_channels, H, W). Returns a scalar. No gradient reaches fm_t.
        Single positions of fm_t may be -inf (they have probability 0); a channel that is -inf everywhere is
        no distribution: leave it out of both maps. Computed in float32, or in float64 as the student.

    Raises:
        ValueError: tau is not positive; one of the channels is missing; a map has other channels or another
        size.
    """

    def __init__(
        self, s_channels: int | None = None, t_channels: int | None = None, tau: float = 4.0
    ) -> None:
        super().__init__()
        if not tau > 0:
            raise ValueError(f'CWD: tau must be > 0, got {tau}')
        if (s_channels is None) != (t_channels is None):
            raise ValueError(f'CWD: give both channels or none, got {s_channels} and {t_channels}')
        self.s_channels, self.t_channels, self.tau = s_channels, t_channels, tau
        self.connector = None
        if s_channels != t_channels:
            self.connector = nn.Sequential(
                nn.Conv2d(s_channels, t_channels, kernel_size=1, bias=False),
                nn.BatchNorm2d(t_channels),
                nn.ReLU(),
            )

    def forward(self, fm_s: Tensor, fm_t: Tensor) -> Tensor:
        _expect('CWD', 'fm_s', fm_s, 'N', self.s_channels or 'C', 'H', 'W')
        n, c, *size = fm_s.shape
        c = c if self.connector is None else self.t_channels
        _expect('CWD', 'fm_t', fm_t, n, c, *size)
        with _no_autocast(fm_s):
            x, fm_t = _full(fm_s), _full(fm_t.detach(), fm_s)
            hidden = 0.0
            if self.connector is not None:
                hidden = 0 * x.detach().sum()  # the ReLU may swallow an inf, which must show
                x = _run(self.connector, x)
            log_p, log_q = ((z.flatten(2) / self.tau).log_softmax(dim=2) for z in (fm_t, x))
            return _kl(log_p, log_q).sum() * (self.tau**2 / (n * c)) + hidden


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
