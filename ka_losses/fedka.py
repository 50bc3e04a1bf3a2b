"""FedKA (FedSA), federated selective aggregation: private teachers each teach a copy of the student at home.

D. Xie, R. Yu, G. Fang, J. Song, Z. Feng, X. Wang, L. Sun, M. Song, "Federated Selective Aggregation for
Knowledge Amalgamation", Chip 2023, arXiv:2207.13309.

    loss = mean over all elements of (translator(fm_s) - fm_t)^2
    translator: three times 1x1 convolution, batch norm, leaky ReLU 0.1;  C_s -> C_s -> k * C_t -> k * C_t

    selection: with a = saliency of student and teacher i on probe image p, flattened,
               tr_i = 1 / mean over p of (0.5 + 0.5 * cosine), q = 2 - tr, prob = softmax of q scaled to 0..1
    round:     drawn clients (with replacement, after prob) train a copy of the student each on their own
               unlabelled images; the server averages: w = sum over i of a_i * w_i

Tap: the last map of student and teacher, equal height and width. Logits are not used: the student's task may
be another one, and its classifier is fitted on a small labelled probe set.

Differences: the authors warm the student up on the probe set and keep its classifier for the selection; in
tools/fedka.py the student begins at random, and a copy of it, trained as a whole on the probe set, looks.
KamalEngine quantises Grad-CAM to 8 bit and divides by its range (NaN for a flat map, which here is all zero);
where it has NaN, because a map is zero or all tr are equal, ours has the similarity 0.5 and equal
probabilities. Its trainer names a class that does not exist, so it does not run.

Source: zju-vipa/KamalEngine, kamal/amalgamation/fedka_amal.py, kamal/utils/model_select.py,
kamal/vision/models/paraphraser.py.

Use:
    >>> import torch
    >>> from fedka import FedKA
    >>> fm_s, fm_t = torch.randn(8, 16, 4, 4, requires_grad=True), torch.randn(8, 32, 4, 4)
    >>> FedKA(16, 32)(fm_s, fm_t).backward()
    >>> fm_s.grad.norm() > 0
    tensor(True)
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FedKA(nn.Module):
    """Squared error between the translated student map and a teacher map.

    Args:
        s_channels, t_channels: of the maps.
        k: the translator gives int(k t_channels) channels, and fm_t must have as many; 1.

    Shape:
        fm_s: (N, s_channels, H, W); fm_t: (N, int(k t_channels), H, W). Returns a scalar, with
        return_terms=True also {'feat': the same}. No gradient reaches fm_t.
        Computed in float32, or in float64 as the student.

    Raises:
        ValueError: other channels, batch or size.
    """

    def __init__(self, s_channels: int, t_channels: int, k: float = 1.0) -> None:
        super().__init__()
        self.translator = Translator(s_channels, t_channels, k)

    def forward(self, fm_s: Tensor, fm_t: Tensor, return_terms: bool = False):
        _expect('FedKA', 'fm_s', fm_s, 'N', self.translator.encoder[0].in_channels, 'H', 'W')
        _expect('FedKA', 'fm_t', fm_t, len(fm_s), self.translator.channels, *fm_s.shape[2:])
        with _no_autocast(fm_s):
            loss = F.mse_loss(_run(self.translator, _full(fm_s)), _full(fm_t.detach(), fm_s))
        return (loss, {'feat': loss}) if return_terms else loss


class Translator(nn.Module):
    """From the student's map to the teacher's channels; arguments as FedKA.

    Shape:
        fm: (N, s_channels, H, W) -> (N, int(k t_channels), H, W).
    """

    def __init__(self, s_channels: int, t_channels: int, k: float = 1.0) -> None:
        super().__init__()
        self.channels = int(k * t_channels)
        widths = [s_channels, s_channels, self.channels, self.channels]
        layers = []
        for c_in, c_out in zip(widths, widths[1:]):
            layers += [nn.Conv2d(c_in, c_out, 1, bias=False), nn.BatchNorm2d(c_out), nn.LeakyReLU(0.1)]
        self.encoder = nn.Sequential(*layers)

    def forward(self, fm: Tensor) -> Tensor:
        return self.encoder(fm)


def transferability(sal_s: Tensor, sals_t: Tensor) -> Tensor:
    """How unlike student and teachers look at the probe images, >= 1; smaller is more alike.

    sal_s: (P, M), flattened saliency of the student on P probe images; sals_t: (clients, P, M). Returns
    (clients,).
    """
    _expect('transferability', 'sal_s', sal_s, 'P', 'M')
    _expect('transferability', 'sals_t', sals_t, 'clients', *sal_s.shape)
    a, b = F.normalize(_full(sal_s), dim=1), F.normalize(_full(sals_t), dim=2)  # 0 of a map without saliency
    return 1 / (0.5 + 0.5 * (a * b).sum(dim=2)).mean(dim=1)


def selection_prob(tr: Tensor) -> Tensor:
    """Probability of each client to be drawn, (clients,)."""
    q = 2 - tr
    spread = q.max() - q.min()
    return torch.softmax((q - q.min()) / torch.where(spread > 0, spread, 1.0), dim=0)


def fed_average(state_dicts: list[dict], weights: list | Tensor) -> dict:
    """Sum of weights[i] * state_dicts[i]; whole numbers (batch norm's counters) are taken from the first."""
    if len(weights) != len(state_dicts):
        raise ValueError(
            f'fed_average: weights must hold {len(state_dicts)}, got {len(weights)}: one per client'
        )
    return {
        key: sum(float(a) * state[key] for a, state in zip(weights, state_dicts))
        if value.is_floating_point()
        else value.clone()
        for key, value in state_dicts[0].items()
    }


def saliency(fm: Tensor, out: Tensor) -> Tensor:
    """Grad-CAM of the predicted class, scaled to 0..1 per image and flattened: (N, H W); flat maps give 0.

    fm: (N, C, H, W), with a graph to out: (N, K).
    """
    with _no_autocast(out):
        grad = torch.autograd.grad(out.max(dim=1).values.sum(), fm)[0]
    parts = (grad.mean(dim=(2, 3), keepdim=True) * fm).detach()
    cam = F.relu(parts.sum(dim=1)).flatten(1)
    size = parts.abs().sum(dim=1).flatten(1).amax(dim=1, keepdim=True)
    low, high = cam.amin(dim=1, keepdim=True), cam.amax(dim=1, keepdim=True)
    # equal positions differ by a rounding of their sums. NaN and inf are not flat: they must show
    flat = (high - low <= 4 * torch.finfo(cam.dtype).eps * size) & (size < torch.inf)
    return torch.where(flat, 0.0, (cam - low) / (high - low).clamp(min=1e-12))


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
