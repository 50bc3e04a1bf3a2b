"""VID, variational information distillation: maximise a bound on the information shared with the teacher.

S. Ahn, S. X. Hu, A. Damianou, N. D. Lawrence, Z. Dai, "Variational Information Distillation for Knowledge
Transfer", CVPR 2019, arXiv:1904.05835.

The teacher's map is modelled as a Gaussian around a regression from the student's, one learned variance per
channel:

    mu = 1x1 conv, ReLU, 1x1 conv, ReLU, 1x1 conv of fm_s (no bias)
    var_c = softplus(alpha_c) + eps
    loss = mean over n, c, h, w of 1/2 * (log var_c + (mu - fm_t)^2 / var_c)

The constant log(2 pi) / 2 is dropped, so the loss may be negative.

Tap: the map after each stage, one module per stage, trained with the student. Channels differ through the
regression; maps of different size are average-pooled to the smaller height and width (the student's before
mu).

Differences: RepDistiller's form (its header says it is the author's), which adds stages where we average; the
convolutions start as in Knowledge-Distillation-Zoo (Kaiming normal, fan out). mdistiller forgets to train
alpha.

Source: HobbitLong/RepDistiller, distiller_zoo/VID.py (VIDLoss); the authors' repository,
ssahn0215/variational-information-distillation, could not be read.

Use:
    >>> import torch
    >>> from vid import VID
    >>> fm_s, fm_t = torch.randn(8, 16, 8, 8, requires_grad=True), torch.randn(8, 32, 8, 8)
    >>> VID(16, 32)(fm_s, fm_t).backward()
    >>> fm_s.grad.norm() > 0
    tensor(True)
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class VID(nn.Module):
    """Gaussian negative log-likelihood of a teacher map given a student map.

    Args:
        s_channels, t_channels: channels of the two maps.
        mid_channels: hidden width of the regression; None means t_channels.
        init_var: variance to start from, 5.
        eps: floor of the variance, 1e-5; must be below init_var.

    Shape:
        fm_s: (N, s_channels, H_s, W_s), fm_t: (N, t_channels, H_t, W_t). Returns a scalar.
        No gradient reaches fm_t.
        Computed in float32, or in float64 as the student.

    Raises:
        ValueError: init_var <= eps; a map is not 4-D or has other channels than announced; the batch sizes
        differ.
    """

    def __init__(
        self,
        s_channels: int,
        t_channels: int,
        mid_channels: int | None = None,
        init_var: float = 5.0,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        if not init_var > eps:
            raise ValueError(f'VID: init_var must be greater than eps = {eps}, got {init_var}')
        mid = t_channels if mid_channels is None else mid_channels
        self.s_channels, self.t_channels, self.eps = s_channels, t_channels, eps
        self.regressor = nn.Sequential(
            nn.Conv2d(s_channels, mid, kernel_size=1, bias=False),
            nn.ReLU(),
            nn.Conv2d(mid, mid, kernel_size=1, bias=False),
            nn.ReLU(),
            nn.Conv2d(mid, t_channels, kernel_size=1, bias=False),
        )
        for layer in self.regressor[::2]:
            nn.init.kaiming_normal_(layer.weight, mode='fan_out', nonlinearity='relu')
        x = init_var - eps
        self.alpha = nn.Parameter(
            torch.full((t_channels,), x + math.log1p(-math.exp(-x)))
        )  # softplus(alpha) = x

    def forward(self, fm_s: Tensor, fm_t: Tensor) -> Tensor:
        _expect('VID', 'fm_s', fm_s, 'N', self.s_channels, 'H', 'W')
        _expect('VID', 'fm_t', fm_t, len(fm_s), self.t_channels, 'H', 'W')
        with _no_autocast(fm_s):
            fm_s, fm_t = _same_size(_full(fm_s), _full(fm_t.detach(), fm_s))
            var = F.softplus(_full(self.alpha, fm_s)) + self.eps
            # one variance per channel: reduce the squared error first, then everything else is C numbers
            error = (_run(self.regressor, fm_s) - fm_t).square().mean(dim=(0, 2, 3))
            hidden = 0 * fm_s.detach().sum()  # a ReLU may swallow an inf, which must show
            return 0.5 * (var.log() + error / var).mean() + hidden


def _same_size(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Average-pool two maps to the smaller of their heights and of their widths."""
    size = (min(a.shape[2], b.shape[2]), min(a.shape[3], b.shape[3]))
    return tuple(x if x.shape[2:] == size else F.adaptive_avg_pool2d(x, size) for x in (a, b))


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
