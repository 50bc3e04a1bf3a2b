"""A frozen network made faster: batch norms multiplied into their convolutions, weights cast once."""

import copy
from collections import Counter

import torch
from torch import Tensor, nn


def identity(x: Tensor) -> Tensor:
    return x


def folded(net: nn.Module, img: Tensor, dtype: torch.dtype | None = None) -> nn.Module:
    """A copy in evaluation mode, equal up to rounding, in which a convolution does its batch norm's work.

    In evaluation mode a batch norm is a factor and an offset per channel, so both can move into the
    convolution before it: one pass over the map instead of two. Who follows whom is seen on a forward pass of
    img, whatever the architecture; a map that anything besides the batch norm reads stays as it is. The batch
    norm modules stay, with their weights and with hooks on them, but hand on what they get.

    Args:
        img: (N, 3, H, W), two images are enough.
        dtype: of the convolutions' and the linear layers' weights, for use under autocast of that dtype,
            which then need not cast them at every forward pass. None: as they are.
    """
    fast = copy.deepcopy(net).eval().requires_grad_(False)
    for conv, norm in foldable(fast, img):
        fold(conv, norm)
    for module in fast.modules() if dtype else ():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.to(dtype)
    return fast


@torch.enable_grad()
def foldable(net: nn.Module, img: Tensor) -> list[tuple[nn.Conv2d, nn.BatchNorm2d]]:
    """Each convolution whose output one batch norm reads and nobody else, and that batch norm."""
    made, pairs, calls = {}, [], Counter()

    def convolved(conv, _, out):
        calls[conv] += 1
        made[id(out)] = conv, out.grad_fn, out  # holding the tensor keeps its id from being given to another

    def normalised(norm, inputs):
        calls[norm] += 1
        if id(inputs[0]) in made:
            conv, node, _ = made[id(inputs[0])]
            pairs.append((conv, norm, node))

    handles = [m.register_forward_hook(convolved) for m in net.modules() if isinstance(m, nn.Conv2d)]
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d) and m.running_var is not None]
    handles += [norm.register_forward_pre_hook(normalised) for norm in norms]
    f = net(img.detach().requires_grad_(), True)
    for handle in handles:
        handle.remove()

    # the graph that autograd has made tells every reader of a map; what the network hands out is read, too
    reads, waiting, seen = Counter(), [x.grad_fn for x in (f.out, f.feat, *f.fms, *f.pres)], set()
    reads.update(waiting)
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            following = [later for later, _ in node.next_functions]
            reads.update(following)
            waiting += following
    # a module that is called twice would need a factor for each place
    return [(conv, norm) for conv, norm, node in pairs if reads[node] == calls[conv] == calls[norm] == 1]


@torch.no_grad()
def fold(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
    factor, offset = (norm.running_var + norm.eps).rsqrt(), -norm.running_mean
    if conv.bias is not None:
        offset = offset + conv.bias
    if norm.affine:
        factor = factor * norm.weight
    bias = offset * factor + (norm.bias if norm.affine else 0)
    weight = (conv.weight * factor[:, None, None, None]).contiguous(memory_format=torch.channels_last)
    conv.weight = nn.Parameter(weight, requires_grad=False)
    conv.bias = nn.Parameter(bias, requires_grad=False)
    norm.forward = identity
