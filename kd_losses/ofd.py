"""OFD, overhaul of feature distillation: regress pre-ReLU maps, but only where it matters after the ReLU.

B. Heo, J. Kim, S. Yun, H. Park, N. Kwak, J. Y. Choi, "A Comprehensive Overhaul of Feature Distillation", ICCV
2019, arXiv:1904.01866.

    s = batch norm of a 1x1 convolution of fm_s (the connector, trained with the student)
    t' = max(fm_t, m_c)            m_c < 0: what the teacher's channel is worth on average when negative
    loss = sum over c, h, w of (s - t')^2 where s > t' or t' > 0, else 0; mean over n      ('batchmean')

    m_c = E[x | x < 0], x ~ N(mu, sigma^2), with mu = bias and sigma = |weight| of the teacher's batch norm
        = mu - sigma * phi(mu / sigma) / Phi(-mu / sigma), or -3 * sigma where Phi(-mu / sigma) <= 0.001

Tap: the maps BEFORE the last ReLU of each stage, one module per stage. A teacher map of another size is
average-pooled to the student's.

Differences: the authors' loss and margin; they sum the stages with weights 0.001 * (1/4, 1/2, 1) and keep the
teacher in train mode, train_kd.py averages equal stages with reduction='mean' and weight 0.5 as
Knowledge-Distillation-Zoo does, teacher in eval mode. margin=None takes the mean of the negative entries of
each batch (Knowledge-Distillation-Zoo). sigma = 0 crashes in the authors' code; here m = min(mu, 0).

Source: clovaai/overhaul-distillation, CIFAR-100/distiller.py (distillation_loss, get_margin_from_BN);
margin=None: AberHu/Knowledge-Distillation-Zoo, kd_losses/ofd.py.

Use:
    >>> import torch
    >>> from ofd import OFD
    >>> fm_s, fm_t = torch.randn(8, 16, 8, 8, requires_grad=True), torch.randn(8, 32, 8, 8)
    >>> OFD(16, 32)(fm_s, fm_t).backward()
    >>> fm_s.grad.norm() > 0
    tensor(True)
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class OFD(nn.Module):
    """Partial squared error to a margin-rectified teacher map.

    Args:
        s_channels, t_channels: channels of the two maps.
        margin: (t_channels,) negative numbers or one for all, e.g. `OFD.margin_from_bn(bn.weight, bn.bias)`;
            None: from each batch.
        reduction: 'batchmean' divides the sum by N (authors), 'mean' by the number of elements.

    Shape:
        fm_s: (N, s_channels, H, W), fm_t: (N, t_channels, H_t, W_t), both pre-activation. Returns a scalar.
        No gradient reaches fm_t.
        Computed in float32, or in float64 as the student.

    Raises:
        ValueError: unknown reduction; margin, fm_s or fm_t of a wrong shape.
    """

    def __init__(
        self,
        s_channels: int,
        t_channels: int,
        margin: Tensor | float | None = None,
        reduction: str = 'batchmean',
    ) -> None:
        super().__init__()
        if reduction not in ('batchmean', 'mean'):
            raise ValueError(f"OFD: reduction must be 'batchmean' or 'mean', got {reduction!r}")
        if margin is not None:
            margin = torch.as_tensor(
                margin, dtype=None if isinstance(margin, Tensor) else torch.get_default_dtype()
            )
            margin = margin.detach().expand(t_channels) if margin.dim() == 0 else margin.detach()
            _expect('OFD', 'margin', margin, t_channels)
        self.s_channels, self.t_channels, self.reduction = s_channels, t_channels, reduction
        self.connector = nn.Sequential(
            nn.Conv2d(s_channels, t_channels, kernel_size=1, bias=False), nn.BatchNorm2d(t_channels)
        )
        nn.init.normal_(self.connector[0].weight, std=math.sqrt(2 / t_channels))
        self.register_buffer('margin', None if margin is None else margin.clone().reshape(1, -1, 1, 1))

    @staticmethod
    def margin_from_bn(weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """Expected negative part per channel, (C,), from the affine parameters of a batch norm, each (C,).

        None, of a batch norm without them, counts as 1 and 0; without both the result is one number, ().
        """
        weight = torch.ones(()) if weight is None else weight
        sigma = _double(weight.detach()).abs()
        mu = torch.zeros_like(sigma) if bias is None else _double(bias.detach())
        sane = sigma.clamp(min=1e-12)
        z = mu / sane
        below = torch.special.ndtr(-z)  # P(x < 0)
        density = torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi)
        margin = torch.where(below > 0.001, mu - sane * density / below.clamp(min=0.001), -3 * sane)
        margin = torch.where(sigma < 1e-12, mu.clamp(max=0), margin)
        return margin.to(weight.dtype).to(weight.device)

    @staticmethod
    def margin_from_batch(fm_t: Tensor) -> Tensor:
        """Mean of the negative entries per channel of a map (N, C, H, W), as (1, C, 1, 1); 0 without any."""
        negative = (fm_t < 0).to(fm_t.dtype)
        count = negative.sum(dim=(0, 2, 3), keepdim=True)
        return (fm_t * negative).sum(dim=(0, 2, 3), keepdim=True) / (count + 1e-6)

    def forward(self, fm_s: Tensor, fm_t: Tensor) -> Tensor:
        _expect('OFD', 'fm_s', fm_s, 'N', self.s_channels, 'H', 'W')
        _expect('OFD', 'fm_t', fm_t, len(fm_s), self.t_channels, 'H', 'W')
        with _no_autocast(fm_s):
            s = _run(self.connector, _full(fm_s))
            with torch.no_grad():
                t = _full(fm_t, s)
                if t.shape[2:] != s.shape[2:]:
                    t = F.adaptive_avg_pool2d(t, s.shape[2:])
                t = torch.maximum(
                    t, self.margin_from_batch(t) if self.margin is None else _full(self.margin, s)
                )
                # where nothing is demanded, t <= 0 and s below it, the target is the student itself: error
                # and gradient are exactly 0. A sum, since torch.where is slow on a CPU; NaN shows
                target = torch.addcmul(t.relu(), (t <= 0).to(t.dtype), torch.minimum(s, t))
            if self.reduction == 'mean':
                return F.mse_loss(s, target)
            return F.mse_loss(s, target, reduction='sum') / len(s)


def _double(x: Tensor) -> Tensor:
    """In float64, on the CPU where the device has none (Apple's)."""
    return (x.cpu() if x.device.type == 'mps' else x).double()


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
    return sum(loss(x, y) for loss, x, y in zip(kd, s.pres[1:], t.pres[1:])) / len(kd)


def build(loss, probe, **options):
    """One for each stage, its margin from the teacher's batch norm."""
    pairs = zip(probe.s.pres[1:], probe.t.pres[1:], probe.net_t.bn_before_relu())
    return nn.ModuleList(
        loss(x.shape[1], y.shape[1],
             **{'margin': loss.margin_from_bn(bn.weight, bn.bias), 'reduction': 'mean', **options})
        for x, y, bn in pairs
    )  # fmt: skip
