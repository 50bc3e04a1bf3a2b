"""Layer-wise amalgamation: compress the teachers' maps into one, and let the student's map follow it.

C. Shen, X. Wang, J. Song, L. Sun, M. Song, "Amalgamating Knowledge towards Comprehensive Classification",
AAAI 2019, arXiv:1811.02796.

    R = enc(concatenated teacher maps);  D_1 ... D_m = dec(R)
    A = fam(fm_s)       (1x1 convolutions)
    amal   = mean over all elements of (A - R)^2, R held constant
    recons = sum over teachers of mean over elements of (D_i - fm_t_i)^2
    loss = w_amal * amal + w_recons * recons

So enc and dec learn to compress, and only the student and fam follow.

Tap: the output of each stage after its ReLU; one module per stage, equal height and width. Beside it:
concat_kd on the logits.

Differences: the paper trains in three stages (compress, layer by layer, jointly); like the authors' later
code (KamalEngine) everything is trained at once. That code attaches a block to every convolution of a
ResNet-18; we attach three to a CIFAR ResNet.

Source: zju-vipa/KamalEngine, kamal/amalgamation/layerwise_amalgamation.py (AmalBlock, LayerWiseAmalgamator);
the older code in three stages, read only: commit afd0557, kamal/layer_wise_ka.

Use:
    >>> import torch
    >>> from layerwise import LayerwiseKA
    >>> fm_s = torch.randn(8, 16, 4, 4, requires_grad=True)
    >>> fms_t = [torch.randn(8, 16, 4, 4), torch.randn(8, 32, 4, 4)]
    >>> LayerwiseKA(16, [16, 32])(fm_s, fms_t).backward()
    >>> fm_s.grad.norm() > 0
    tensor(True)
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LayerwiseKA(nn.Module):
    """Auto-encoder of the teachers' maps at one layer, and the student's distance to its code.

    Args:
        s_channels: of the student's map, also the width of the code.
        t_channels: list, of each teacher's map.
        w_amal, w_recons: weights of the two terms, 1 and 1.

    Shape:
        fm_s: (N, s_channels, H, W); fms_t: list of (N, t_channels[i], H, W). Returns a scalar, with
        return_terms=True also {'amal', 'recons'} without weights. No gradient reaches fms_t.
        Computed in float32, or in float64 as the student.

    Raises:
        ValueError: t_channels is empty; a map has other channels, batch or size.
    """

    def __init__(
        self, s_channels: int, t_channels: list[int], w_amal: float = 1.0, w_recons: float = 1.0
    ) -> None:
        super().__init__()
        if not t_channels:
            raise ValueError('LayerwiseKA: t_channels must name the channels of one teacher or more, got []')
        self.t_channels, self.w_amal, self.w_recons = list(t_channels), w_amal, w_recons
        self.enc = nn.Conv2d(sum(t_channels), s_channels, kernel_size=1)
        self.fam = nn.Conv2d(s_channels, s_channels, kernel_size=1)
        self.dec = nn.Conv2d(s_channels, sum(t_channels), kernel_size=1)

    def forward(self, fm_s: Tensor, fms_t: list[Tensor], return_terms: bool = False):
        c_s = self.fam.in_channels
        _expect('LayerwiseKA', 'fm_s', fm_s, 'N', c_s, 'H', 'W')
        if len(fms_t) != len(self.t_channels):
            raise ValueError(
                f'LayerwiseKA: fms_t must hold {len(self.t_channels)} maps, got {len(fms_t)}: one per teacher'
            )
        for i, (fm_t, channels) in enumerate(zip(fms_t, self.t_channels)):
            _expect('LayerwiseKA', f'fms_t[{i}]', fm_t, len(fm_s), channels, *fm_s.shape[2:])
        with _no_autocast(fm_s):
            joined = torch.cat([_full(fm_t.detach(), fm_s) for fm_t in fms_t], dim=1)
            code = _run(self.enc, joined)
            amal = F.mse_loss(_run(self.fam, _full(fm_s)), code.detach())
            decoded = zip(
                _run(self.dec, code).split(self.t_channels, dim=1), joined.split(self.t_channels, dim=1)
            )
            recons = sum(F.mse_loss(got, wanted) for got, wanted in decoded)
            loss = self.w_amal * amal + self.w_recons * recons
        return (loss, {'amal': amal, 'recons': recons}) if return_terms else loss


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


def feed(ka, s, all_t, batch):
    return _total(
        loss(s.fms[k], [t.fms[k] for t in all_t], return_terms=True) for k, loss in zip(batch.layers, ka)
    )


def build(loss, probe, **options):
    """One module per level."""
    return nn.ModuleList(
        loss(probe.s.fms[k].shape[1], [t.fms[k].shape[1] for t in probe.all_t], **options)
        for k in probe.layers
    )


def _total(results) -> tuple[Tensor, dict]:
    """The sum of several (loss, terms)."""
    losses, terms = zip(*results)
    return sum(losses), {key: sum(term[key] for term in terms) for key in terms[0]}
