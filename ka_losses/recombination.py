"""Recombination: the teachers' weights side by side in one network, then pruned and retrained.

No paper was found; KamalEngine's readme of 2019 names it "Learning Semantic Image Compression from
Distinct-task Teachers", without a link.

    combined convolution: weights (sum C_out, sum C_in, k, k), block i = teacher i, 0 outside; biases joined
    combined(concatenated inputs) = concatenation of the teachers' outputs, exactly
    quantiser:   s = (levels - 1) * sigmoid(x), y = round(s), gradient of s
    soft focal:  ce = - sum over k of softmax(out_t)_k * log softmax(out_s)_k
                 loss = mean over samples (and pixels) of alpha * (1 - exp(-ce))^gamma * ce

Teachers with identical layer graphs become one network; retraining on their outputs fills the zeros between
the blocks, while rounds of pruning (smallest L1 norm of a filter) make it small.

Tap: the teachers' outputs. For classifiers use concat_kd instead of the soft focal loss.

Differences: KamalEngine's code does not run (it writes into leaf parameters and never advances the input
offset) and its 2019 version prunes the LARGEST filters; we do what is meant. The task of compression, an
MS-SSIM term, is not here. The power's base is kept at 1e-12 or above: its slope at 0 is infinite for gamma
below 1.

Source: formula only; zju-vipa/KamalEngine, kamal/amalgamation/recombination.py, and commit afd0557,
kamal/recombination/combine.py and prune.py, do not run.

Use:
    >>> import torch
    >>> from recombination import SoftFocal
    >>> out_s, out_t = torch.randn(8, 5, requires_grad=True), torch.randn(8, 5)
    >>> SoftFocal(gamma=2.0)(out_s, out_t).backward()
    >>> out_s.grad.norm() > 0
    tensor(True)
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SoftFocal(nn.Module):
    """Cross-entropy with soft targets, easy pixels weighed down.

    Args:
        gamma: 0 is plain cross-entropy; 2 is usual.
        alpha: factor, 1.

    Shape:
        out_s, out_t: (N, K) or (N, K, H, W), equal. Returns a scalar, with return_terms=True also {'ce'}, the
        mean cross-entropy. No gradient reaches out_t.
        Computed in float32, or in float64 as the student.

    Raises:
        ValueError: gamma is negative; shapes differ.
    """

    def __init__(self, gamma: float = 0.0, alpha: float = 1.0) -> None:
        super().__init__()
        if gamma < 0:
            raise ValueError(f'SoftFocal: gamma must be >= 0, got {gamma}')
        self.gamma, self.alpha = gamma, alpha

    def forward(self, out_s: Tensor, out_t: Tensor, return_terms: bool = False):
        _expect('SoftFocal', 'out_s', out_s, 'N', 'K', *'HW' * (out_s.dim() == 4))
        _expect('SoftFocal', 'out_t', out_t, *out_s.shape)
        p = F.softmax(_full(out_t.detach(), out_s), dim=1)
        ce = torch.where(p == 0, 0.0, -p * F.log_softmax(_full(out_s), dim=1)).sum(dim=1)
        weight = self.alpha
        if self.gamma:
            weight = weight * (-torch.expm1(-ce)).clamp(min=1e-12) ** self.gamma
        loss = (weight * ce).mean()
        return (loss, {'ce': ce.mean()}) if return_terms else loss


class RangeQuantizer(nn.Module):
    """Round to whole levels; the gradient passes as if nothing had been rounded.

    Args:
        levels: how many, >= 2; values 0 to levels - 1.

    Shape:
        x: any -> the same.

    Raises:
        ValueError: fewer than two levels.
    """

    def __init__(self, levels: int = 6) -> None:
        super().__init__()
        if levels < 2:
            raise ValueError(f'RangeQuantizer: levels must be >= 2, got {levels}')
        self.levels = levels

    def forward(self, x: Tensor) -> Tensor:
        soft = (self.levels - 1) * torch.sigmoid(x)
        return soft + (soft.round() - soft).detach()


def combine_convs(convs: list[nn.Conv2d]) -> nn.Conv2d:
    """One convolution that applies each of the given ones to its own share of the channels.

    Raises:
        ValueError: groups, or kernel, stride, padding and its mode, dilation or bias that differ.
    """
    first = convs[0]
    for conv in convs:
        same = all(
            getattr(conv, name) == getattr(first, name)
            for name in ('kernel_size', 'stride', 'padding', 'dilation', 'padding_mode')
        )
        if conv.groups > 1 or not same or (conv.bias is None) != (first.bias is None):
            raise ValueError(
                f'combine_convs: needs equal convolutions without groups, got {first} and {conv}'
            )
    joined = nn.Conv2d(
        sum(conv.in_channels for conv in convs), sum(conv.out_channels for conv in convs), first.kernel_size,
        first.stride, first.padding, first.dilation, bias=first.bias is not None,
        padding_mode=first.padding_mode,
    ).to(first.weight)  # fmt: skip
    _fill(joined, convs)
    return joined


def combine_linears(linears: list[nn.Linear]) -> nn.Linear:
    """One linear layer that applies each of the given ones to its own share of the inputs.

    Raises:
        ValueError: only some have a bias.
    """
    first = linears[0]
    if any((linear.bias is None) != (first.bias is None) for linear in linears):
        raise ValueError('combine_linears: all or none must have a bias, got both: add a bias of zeros')
    widths = sum(x.in_features for x in linears), sum(x.out_features for x in linears)
    joined = nn.Linear(*widths, bias=first.bias is not None).to(first.weight)
    _fill(joined, linears)
    return joined


def combine_bns(bns: list[nn.BatchNorm2d]) -> nn.BatchNorm2d:
    """One batch norm for the concatenated channels.

    Raises:
        ValueError: eps, momentum, affine or track_running_stats differ, or there are no weights.
    """
    for bn in bns:
        same = all(
            getattr(bn, name) == getattr(bns[0], name)
            for name in ('eps', 'momentum', 'affine', 'track_running_stats')
        )
        if not same or not bn.affine or not bn.track_running_stats:
            raise ValueError(
                f'combine_bns: needs equal batch norms with weights and running statistics, got {bns[0]} and '
                f'{bn}: build all networks as one architecture'
            )
    joined = nn.BatchNorm2d(sum(bn.num_features for bn in bns), bns[0].eps, bns[0].momentum)
    state = {
        key: value.clone()
        if key == 'num_batches_tracked'
        else torch.cat([bn.state_dict()[key] for bn in bns])
        for key, value in bns[0].state_dict().items()
    }
    joined.to(bns[0].weight).load_state_dict(state)
    return joined.train(bns[0].training)


def combine_models(models: list[nn.Module]) -> nn.Module:
    """A copy of the first in which every convolution, batch norm and linear layer is the combined one.

    It reads the image once per model, concatenated: x.repeat(1, len(models), 1, 1). What has no weights
    must act on channels one by one. In eval mode its output is the models' outputs, concatenated.

    Raises:
        ValueError: the models do not have the same modules in the same order.
    """
    first = models[0]
    combine = {nn.Conv2d: combine_convs, nn.BatchNorm2d: combine_bns, nn.Linear: combine_linears}
    if any(
        type(model) is not type(first) or model._modules.keys() != first._modules.keys() for model in models
    ):
        kinds = ', '.join(type(model).__name__ for model in models)
        raise ValueError(
            f'combine_models: the models must have the same modules in the same order, got {kinds}: build '
            'all of them as one architecture'
        )
    if type(first) in combine:
        return combine[type(first)](models)
    if first._parameters or first._buffers:
        raise ValueError(
            f'combine_models: must be of convolutions, batch norms and linear layers, got '
            f'{type(first).__name__}: keep its parameters in such layers'
        )
    joined = first.__new__(type(first))
    joined.__dict__ = {  # dictionaries of hooks and parts are its own
        key: value.copy() if isinstance(value, (dict, set)) else value
        for key, value in first.__dict__.items()
    }
    joined._modules = {
        name: None if child is None else combine_models([model._modules[name] for model in models])
        for name, child in first._modules.items()
    }
    return joined


@torch.no_grad()
def _fill(joined: nn.Module, parts: list[nn.Module]) -> None:
    joined.weight.zero_()
    row = column = 0
    for part in parts:
        rows, columns = part.weight.shape[:2]
        joined.weight[row : row + rows, column : column + columns] = part.weight
        if part.bias is not None:
            joined.bias[row : row + rows] = part.bias
        row, column = row + rows, column + columns


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


def _full(x: Tensor, like: Tensor | None = None) -> Tensor:
    """In float32, or float64 if the student (like) is. Inference tensors are copied, to serve backward."""
    x = x.double() if (x if like is None else like).dtype == torch.float64 else x.float()
    compiling = getattr(torch.compiler, 'is_compiling', bool)()  # torch 2.2 cannot tell: False
    return x.clone() if not compiling and x.is_inference() else x
