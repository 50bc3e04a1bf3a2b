"""Pruning the channels of CIFAR ResNets: which go together, what they are worth, a narrower network.

H. Li et al., "Pruning Filters for Efficient ConvNets", ICLR 2017 (l1); Z. Liu et al., "Learning Efficient
Convolutional Networks through Network Slimming", ICCV 2017 (bn); both from memory, unverified. Y. Aflalo et
al., "Knapsack Pruning with Inner Distillation", arXiv:2002.08258 (taylor, knapsack, greedy; their code, but
for the true sizes of strided layers and the stem, which is tied to a first stage without projection).

    groups(net)                     channels that an addition ties together
    scores(net, groups, kind)       a number per channel: l1, l2, bn, taylor, taylor_abs, random
    costs(net, groups, size)        multiply-adds of a channel
    select(...)                     which channels stay
    shrink(net, groups, keep)       the same network, narrower
"""

import copy
import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .resnet import ResNet

KINDS = ('l1', 'l2', 'bn', 'taylor', 'taylor_abs', 'random')
HOWS = ('uniform', 'global', 'greedy', 'knapsack')


@dataclass
class Group:
    """Convolutions whose output channels are removed together, their batch norms, and who reads them."""

    name: str
    convs: list[str] = field(default_factory=list)
    bns: list[str] = field(default_factory=list)
    readers: list[str] = field(default_factory=list)


def groups(net: nn.Module) -> list[Group]:
    """All groups of a ResNet, the inner channels of a block as well as those that stages share.

    Raises:
        ValueError: another network.
    """
    if not isinstance(net, ResNet):
        raise ValueError(f'slimming: net must be a resnet of CIFAR, got {type(net).__name__}')
    made, shared = [], Group('conv1', ['conv1'], ['bn1'])
    for stage in ('layer1', 'layer2', 'layer3'):
        for i, block in enumerate(getattr(net, stage)):
            at = f'{stage}.{i}'
            made.append(Group(f'{at}.conv1', [f'{at}.conv1'], [f'{at}.bn1'], [f'{at}.conv2']))
            shared.readers.append(f'{at}.conv1')
            if block.downsample is not None:
                shared.readers.append(f'{at}.downsample.0')
                made.append(shared)
                shared = Group(stage, [f'{at}.downsample.0'], [f'{at}.downsample.1'])
            shared.convs.append(f'{at}.conv2')
            shared.bns.append(f'{at}.bn2')
    shared.readers.append('fc')
    return [*made, shared]


def scores(net: nn.Module, groups: list[Group], kind: str, batches=None, generator=None) -> list[Tensor]:
    """(C,) per group, the sum over its convolutions. batches: (img, target) pairs, for the Taylor kinds."""
    bn_of = {conv: bn for group in groups for conv, bn in zip(group.convs, group.bns)}
    each = conv_scores(net, bn_of, kind, batches, generator)
    for conv, value in each.items():
        if torch.isnan(value).any():
            raise ValueError(f'slimming: scores must be numbers, got NaN in {conv}')
    return [sum(each[conv] for conv in group.convs) for group in groups]


def conv_scores(net: nn.Module, bn_of: dict, kind: str, batches=None, generator=None) -> dict[str, Tensor]:
    """{convolution: (C,)}; bn_of: {convolution: its batch norm}."""
    if kind not in KINDS:
        raise ValueError(f'slimming: kind must be one of {", ".join(KINDS)}, got {kind!r}')
    weights = {conv: net.get_submodule(conv).weight for conv in bn_of}
    if kind in ('taylor', 'taylor_abs'):
        return _taylor(net, weights, list(batches or ()), absolute=kind == 'taylor_abs')
    made = {}
    for conv, w in weights.items():
        rows = w.detach().flatten(1)
        if kind == 'random':
            made[conv] = torch.rand(len(rows), generator=generator).to(rows)
        elif kind == 'bn':
            made[conv] = net.get_submodule(bn_of[conv]).weight.detach().abs()
        else:
            made[conv] = rows.abs().sum(dim=1) if kind == 'l1' else rows.square().sum(dim=1).sqrt()
    return made


def _taylor(net: nn.Module, weights: dict[str, Tensor], batches: list, absolute: bool) -> dict[str, Tensor]:
    """First order effect of a filter on cross-entropy, in eval mode: of the sum, or of every batch."""
    if not batches:
        raise ValueError(
            'slimming: batches must hold (img, target) pairs, got none: the kind needs gradients'
        )
    training, total = net.training, dict.fromkeys(weights, 0)
    net.eval()
    for img, target in batches:
        loss = F.cross_entropy(net(img), target) / len(batches)
        for name, g in zip(weights, torch.autograd.grad(loss, list(weights.values()))):
            total[name] = total[name] + ((weights[name] * g).flatten(1).sum(dim=1).abs() if absolute else g)
    net.train(training)
    if absolute:
        return {name: value.detach() for name, value in total.items()}
    return {name: (weights[name] * g).abs().flatten(1).sum(dim=1).detach() for name, g in total.items()}


def sizes(net: nn.Module, size: int) -> dict[str, int]:
    """{convolution: pixels of its output} for images of this size."""
    seen, hooks = {}, []
    for name, module in net.named_modules():
        if isinstance(module, nn.Conv2d):
            note = lambda m, args, out, name=name: seen.update({name: out[0, 0].numel()})  # noqa: E731
            hooks.append(module.register_forward_hook(note))
    training = net.training
    with torch.no_grad():
        net.eval()(next(net.parameters()).new_zeros(1, 3, size, size))
    net.train(training)
    for hook in hooks:
        hook.remove()
    return seen


def costs(net: nn.Module, groups: list[Group], size: int, readers: bool = False) -> list[int]:
    """Multiply-adds of one channel of each group; readers: with what those save that read it."""
    pixels, made = sizes(net, size), []
    for group in groups:
        cost = sum(net.get_submodule(conv).weight[0].numel() * pixels[conv] for conv in group.convs)
        for name in group.readers if readers else ():
            weight = net.get_submodule(name).weight
            cost += weight[:, 0].numel() * pixels.get(name, 1)
        made.append(cost)
    return made


def macs(net: nn.Module, size: int) -> int:
    """Multiply-adds of convolutions and classifier for one image."""
    pixels = sizes(net, size)
    return sum(
        m.weight.numel() * pixels.get(name, 1)
        for name, m in net.named_modules()
        if isinstance(m, (nn.Conv2d, nn.Linear))
    )


def select(values: list[Tensor], costs: list[int], ratio: float, how: str) -> list[Tensor]:
    """Boolean masks of the channels that stay, at least one per group.

    ratio: what goes, of the channels ('uniform': of each group, 'global': of all), or of the cost ('greedy',
    'knapsack'), which counts a channel with all of its inputs: in the cut network more than that is gone.
    """
    if how not in HOWS or not 0 <= ratio < 1:
        raise ValueError(
            f'slimming: how must be one of {", ".join(HOWS)}, ratio in [0, 1), got {how!r}, {ratio}'
        )
    if how == 'uniform':
        keep = [_all_but_lowest(v, int(ratio * len(v))) for v in values]
    else:
        flat = torch.cat(values)
        each = torch.cat([torch.full((len(v),), float(c)) for v, c in zip(values, costs)]).long()
        if how == 'global':
            mask = _all_but_lowest(flat, int(ratio * len(flat)))
        else:
            fill = knapsack if how == 'knapsack' else greedy
            mask = torch.zeros(len(flat), dtype=torch.bool)
            mask[fill(flat, each, int(int(each.sum()) * (1 - ratio)))] = True
        keep = list(mask.split([len(v) for v in values]))
    for v, mask in zip(values, keep):
        if not mask.any():
            mask[v.argmax()] = True
    return keep


def _all_but_lowest(values: Tensor, count: int) -> Tensor:
    mask = torch.ones(len(values), dtype=torch.bool)
    mask[values.cpu().argsort(stable=True)[:count]] = False
    return mask


def knapsack(values: Tensor, weights: Tensor, capacity: int) -> Tensor:
    """Sorted indices of the items of the largest total value that fit; ties leave the later item out.

    Exact as long as its table has at most 2e8 entries (items times capacity), else with weights rounded up.
    """
    weights, values = weights.long().cpu(), values.cpu().double()
    unit = math.gcd(*weights.tolist(), 0) or 1
    unit = max(unit, -(-capacity * len(weights) // 200_000_000))
    weights, capacity = -(-weights // unit), capacity // unit
    best, taken = torch.zeros(capacity + 1, dtype=torch.float64), []
    for v, w in zip(values, weights.tolist()):
        with_it = torch.full_like(best, -torch.inf)
        if w <= capacity:
            with_it[w:] = best[: capacity + 1 - w] + v
        taken.append(with_it > best)
        best = torch.where(taken[-1], with_it, best)
    found, left = [], capacity
    for k in range(len(weights) - 1, -1, -1):
        if taken[k][left]:
            found.append(k)
            left -= int(weights[k])
    return torch.tensor(sorted(found), dtype=torch.int64)


def greedy(values: Tensor, weights: Tensor, capacity: int) -> Tensor:
    """Sorted indices of what is left when the least valuable per weight have gone until the rest fits."""
    order = (values.cpu().double() / weights.cpu()).argsort(stable=True).tolist()
    left, gone = int(weights.sum()), set()
    for k in order:
        if left <= capacity:
            break
        gone.add(k)
        left -= int(weights[k])
    return torch.tensor([k for k in range(len(weights)) if k not in gone], dtype=torch.int64)


def shrink(net: nn.Module, groups: list[Group], keep: list[Tensor]) -> nn.Module:
    """A copy without the other channels: the same class, the same names, smaller tensors."""
    net = copy.deepcopy(net)
    with torch.no_grad():
        for group, mask in zip(groups, keep):
            at = mask.nonzero()[:, 0]
            for name in group.convs:
                conv = net.get_submodule(name)
                _resize(conv, conv.weight[at])
            for name in group.bns:
                bn = net.get_submodule(name)
                for part in ('weight', 'bias', 'running_mean', 'running_var'):
                    _put(bn, part, getattr(bn, part)[at])
                bn.num_features = len(at)
            for name in group.readers:
                reader = net.get_submodule(name)
                _resize(reader, reader.weight[:, at])
    return net


def shaped_like(net: nn.Module, state: dict) -> nn.Module:
    """net as narrow as the weights of a slimmed network; net itself for any others."""
    own = net.state_dict()
    fits = (
        isinstance(net, ResNet)
        and own.keys() <= state.keys()
        and len(state['fc.weight']) == len(own['fc.weight'])
    )
    narrower = fits and all(
        x.dim() == own[name].dim() and all(a <= b for a, b in zip(x.shape, own[name].shape))
        for name, x in state.items()
        if name in own
    )
    if not narrower or all(state[name].shape == x.shape for name, x in own.items()):
        return net
    with torch.no_grad():
        for path, module in net.named_modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                _resize(module, state[f'{path}.weight'].to(module.weight))
            elif isinstance(module, nn.BatchNorm2d):
                for part in ('weight', 'bias', 'running_mean', 'running_var'):
                    _put(module, part, state[f'{path}.{part}'].to(getattr(module, part)))
                module.num_features = len(module.weight)
    return net


def _resize(module: nn.Module, weight: Tensor) -> None:
    _put(module, 'weight', weight)
    if isinstance(module, nn.Conv2d):
        module.out_channels, module.in_channels = weight.shape[:2]
    else:
        module.out_features, module.in_features = weight.shape


def _put(module: nn.Module, name: str, x: Tensor) -> None:
    x = x.detach().clone()
    setattr(module, name, nn.Parameter(x) if name in module._parameters else x)
