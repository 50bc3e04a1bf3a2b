"""ICKD, inter-channel correlation: match which channels fire together.

L. Liu, Q. Huang, S. Lin, H. Xie, B. Wang, X. Chang, X. Liang, "Exploring Inter-Channel Correlation for
Diversity-preserved Knowledge Distillation", ICCV 2021, arXiv:2202.03680.

    x = batch norm of a 1x1 convolution of fm_s (trained with the student), as (N, C_t, H * W); t = fm_t, too
    G[n] = x[n] * x[n]^T, every row divided by its length
    loss = mean over n and rows of the squared distance between the rows of G_s and G_t

Tap: the last stage's map, after its ReLU. Channels differ through the convolution; sizes may differ, they are
summed out. The authors weigh it by 2.5 beside cross-entropy, alone or with soft targets.

Differences: the authors' CIFAR code. Its unused teacher embedding is left out; a channel that is zero
everywhere gets no gradient, where it gets about 1e10 in the authors' code.

Source: ADLab-AutoDrive/ICKD, Cifar100/distiller_zoo/ICKD.py (ICKDLoss).

Use:
    >>> import torch
    >>> from ickd import ICKD
    >>> fm_s, fm_t = torch.randn(8, 16, 8, 8, requires_grad=True), torch.randn(8, 32, 8, 8)
    >>> ICKD(16, 32)(fm_s, fm_t).backward()
    >>> fm_s.grad.norm() > 0
    tensor(True)
"""

import torch
from torch import Tensor, nn


class ICKD(nn.Module):
    """Squared difference of row-normalised channel Gram matrices.

    Args:
        s_channels, t_channels: channels of the two maps.

    Shape:
        fm_s: (N, s_channels, H_s, W_s), fm_t: (N, t_channels, H_t, W_t). Returns a scalar.
        No gradient reaches fm_t.
        Computed in float32, also under TF32, or in float64 as the student.

    Raises:
        ValueError: a map is not 4-D or has other channels than announced; the batch sizes differ.
    """

    def __init__(self, s_channels: int, t_channels: int) -> None:
        super().__init__()
        self.s_channels, self.t_channels = s_channels, t_channels
        self.embed_s = nn.Sequential(
            nn.Conv2d(s_channels, t_channels, kernel_size=1, bias=False), nn.BatchNorm2d(t_channels)
        )

    def forward(self, fm_s: Tensor, fm_t: Tensor) -> Tensor:
        _expect('ICKD', 'fm_s', fm_s, 'N', self.s_channels, 'H', 'W')
        _expect('ICKD', 'fm_t', fm_t, len(fm_s), self.t_channels, 'H', 'W')
        with _no_autocast(fm_s):
            g_s, g_t = _correlation(_run(self.embed_s, _full(fm_s))), _correlation(_full(fm_t.detach(), fm_s))
            return (g_s - g_t).square().sum(dim=2).mean()


def _correlation(fm: Tensor) -> Tensor:
    x = _exact(fm.flatten(2))
    return _unit((x @ x.mT).to(fm.dtype))


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


def _unit(x: Tensor) -> Tensor:
    """Rows divided by their length; a zero row stays zero and gets no gradient."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / norm.masked_fill(norm <= 1e-12, torch.inf)  # NaN is not: it must show in the loss


def _full(x: Tensor, like: Tensor | None = None) -> Tensor:
    """In float32, or float64 if the student (like) is. Inference tensors are copied, to serve backward."""
    x = x.double() if (x if like is None else like).dtype == torch.float64 else x.float()
    compiling = getattr(torch.compiler, 'is_compiling', bool)()  # torch 2.2 cannot tell: False
    return x.clone() if not compiling and x.is_inference() else x
