"""AFD, attentive feature distillation: regress normalised channels, weighed by a learned channel attention.

K. Wang, X. Gao, Y. Zhao, X. Li, D. Dou, C.-Z. Xu, "Pay Attention to Features, Transfer Learn Faster CNNs",
ICLR 2020.

    p = mean over h, w of fm_t
    r = sigmoid(1x1 conv, ReLU, 1x1 conv of p)
    rho = r / sum over c of r
    u[n, c] = fm[n, c] / (||fm[n, c]||_2 + 1e-6)              each channel of each sample, over its positions
    loss = mean over n of sum over c of rho[n, c] * mean over h, w of (u_s - u_t)^2

Tap: the map at the end of each stage, after its ReLU, one module per stage. The attention is trained with the
student. Channels are matched one to one, so student and teacher maps must have one shape.

Differences: no authors' code was found. The paper's attention is linear in all positions with a softmax; the
squeeze-and-excitation form here is Knowledge-Distillation-Zoo's. A map that is zero has a steep slope (1e6)
on a tap before the ReLU; behind the ReLU it is masked.

Source: AberHu/Knowledge-Distillation-Zoo, kd_losses/afd.py; no code of the authors was found.

Use:
    >>> import torch
    >>> from afd import AFD
    >>> fm_s, fm_t = torch.randn(8, 32, 8, 8, requires_grad=True), torch.randn(8, 32, 8, 8)
    >>> AFD(32, 32)(fm_s, fm_t).backward()
    >>> fm_s.grad.norm() > 0
    tensor(True)
"""

import torch
from torch import Tensor, nn


class AFD(nn.Module):
    """Attention-weighted squared error of normalised channels, for one pair of layers.

    Args:
        s_channels, t_channels: channels of the two maps, equal.
        att_f: hidden width of the attention as a share of the channels; 1.

    Shape:
        fm_s, fm_t: (N, C, H, W), equal. Returns a scalar. No gradient reaches fm_t.
        `attention_of(fm_t)` gives rho, (N, C).
        Computed in float32, or in float64 as the student.

    Raises:
        ValueError: the channel counts differ; a map is not (N, C, H, W); the shapes differ.
    """

    def __init__(self, s_channels: int, t_channels: int, att_f: float = 1.0) -> None:
        super().__init__()
        if s_channels != t_channels:
            raise ValueError(f'AFD: s_channels must equal t_channels, got {s_channels} and {t_channels}')
        hidden = max(1, int(t_channels * att_f))
        self.channels = t_channels
        self.attention = nn.Sequential(
            nn.Conv2d(t_channels, hidden, kernel_size=1),
            nn.ReLU(),
            nn.Conv2d(hidden, t_channels, kernel_size=1),
        )
        for layer in self.attention[::2]:
            nn.init.kaiming_normal_(layer.weight, mode='fan_out', nonlinearity='relu')
            nn.init.zeros_(layer.bias)

    def forward(self, fm_s: Tensor, fm_t: Tensor) -> Tensor:
        _expect('AFD', 'fm_s', fm_s, 'N', self.channels, 'H', 'W')
        _expect('AFD', 'fm_t', fm_t, *fm_s.shape)
        with _no_autocast(fm_s):
            fm_s, fm_t = _full(fm_s), _full(fm_t.detach(), fm_s)
            error = (_channels(fm_s) - _channels(fm_t)).square().mean(dim=2)
            return (self.attention_of(fm_t) * error).sum(dim=1).mean()

    def attention_of(self, fm_t: Tensor) -> Tensor:
        r = _run(self.attention, fm_t.mean(dim=(2, 3), keepdim=True)).flatten(1).sigmoid()
        return r / r.sum(dim=1, keepdim=True).clamp(min=1e-12)


def _channels(fm: Tensor) -> Tensor:
    """(N, C, H W), each channel of length 1."""
    fm = fm.flatten(2)
    return fm / (torch.linalg.vector_norm(fm, dim=2, keepdim=True) + 1e-6)


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
