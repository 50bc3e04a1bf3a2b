"""Accuracies."""

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dataset import Resident
from engine.errors import UserError
from engine.processes import gathered, processes, same_buffers, summed

YOUR_OWN = '; docs/extending.md, Your own network, says what a network gives, and how to wrap another'


@torch.no_grad()
def refuse_misfit(name: str, net: nn.Module, data) -> None:
    """Whether a network takes images of this size: tried on two of them, with a copy, so nothing changes."""
    with torch.random.fork_rng(devices=[]):  # a folder's loader draws from the global generator
        first = next(data.test_batches(2), None)
    if first is None:  # this process has no share of them
        return
    img = first[0]
    try:
        out = copy.deepcopy(net).eval()(img)
    except torch.OutOfMemoryError:
        raise
    except (ValueError, RuntimeError, AssertionError) as error:
        h, w = img.shape[2:]
        said = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f'{name}: does not take images of {h} x {w}: {said}') from error
    if not isinstance(out, Tensor):
        raise UserError(f'{name}: net(img) must give logits, got a {type(out).__name__}{YOUR_OWN}')


def features_of(name: str, net: nn.Module, img: Tensor):
    """net(img, True), tried before anything trains."""
    try:
        seen = net(img, True)
    except TypeError as error:
        raise UserError(f'{name}: {error}{YOUR_OWN}') from error
    if not all(hasattr(seen, part) for part in ('out', 'feat', 'fms', 'pres')):
        raise UserError(f'{name}: net(img, True) must give Feats, got a {type(seen).__name__}{YOUR_OWN}')
    return seen


def at_once(data) -> int:
    """Images of a batch in an evaluation: many of those that live on the GPU; a folder's may be large."""
    return 1000 if data.device.type != 'cpu' and isinstance(data, Resident) else 128


def evaluate(net: nn.Module, data, amp: Callable[[], torch.autocast]) -> dict[str, float]:
    """Top-1, top-5 (percent), cross-entropy over every image once, and the number of non-finite logits."""
    return figures(counted(net, data, amp))


@torch.no_grad()
def counted(net: nn.Module, data, amp: Callable[[], torch.autocast], said: Tensor | None = None) -> Tensor:
    """What evaluate needs, on the device: nothing waits for it yet.

    said: another network's classes of all images; how many are this one's, too, is a sixth number then.
    """
    net.eval()
    same_buffers(net)
    sums = torch.zeros(
        5 if said is None else 6,
        dtype=torch.float64,
        device='cpu' if data.device.type == 'mps' else data.device,
    )
    for img, target, index in data.test_batches(at_once(data)):
        with amp():
            out = net(img)
        out = out.float()
        ranked = out.topk(min(5, out.shape[1]), dim=1).indices == target[:, None]
        loss = F.cross_entropy(out, target, reduction='sum')
        bad = (~torch.isfinite(out)).sum()
        more = [] if said is None else [(out.argmax(dim=1) == said[index]).sum()]
        seen = torch.stack([ranked[:, 0].sum(), ranked.sum(), loss, bad, bad * 0 + len(out), *more])
        sums += seen.to(sums.device)
    return summed(sums)


def figures(counts: Tensor) -> dict[str, float]:
    top1, top5, loss, bad, n = counts.tolist()
    return {'top1': 100 * top1 / n, 'top5': 100 * top5 / n, 'loss': loss / n, 'bad': int(bad)}


@torch.no_grad()
def classes(net: nn.Module, data, amp: Callable[[], torch.autocast]) -> Tensor:
    """(N,) what a network says of every image, in order."""
    net.eval()
    batches = data.test_batches(at_once(data))
    said = []
    for img, _, _ in batches:
        with amp():
            said.append(net(img).argmax(dim=1))
    return torch.cat(said)


@torch.no_grad()
def outputs(net: nn.Module, data) -> tuple[Tensor, Tensor]:
    """What a network that stacks several logits (M, N, K) says of every image, and the labels."""
    net.eval()
    same_buffers(net)
    batches = data.test_batches(at_once(data))
    parts = [(net(img), target) for img, target, _ in batches]
    if processes() > 1:  # shares of unequal size, or none in some process
        shares = gathered([(out.cpu(), target.cpu()) for out, target in parts])
        parts = [part for share in shares for part in share]
    outs, target = torch.cat([out for out, _ in parts], dim=1), torch.cat([target for _, target in parts])
    return outs.to(data.device), target.to(data.device)


def measure(net: nn.Module, val, test, amp: Callable[[], torch.autocast]) -> dict[str, Tensor]:
    """{'val': ..., 'test': ...} for measured(); without 'val' if there is no validation set."""
    return {half: counted(net, data, amp) for half, data in (('val', val), ('test', test)) if data}


def measured(counts: dict[str, Tensor]) -> dict[str, float]:
    """test_top1, test_top5, and val_top1, val_top5 if there is a validation set."""
    row = {}
    for half, sums in counts.items():
        seen = figures(sums)
        row |= {f'{half}_top1': seen['top1'], f'{half}_top5': seen['top5']}
    return row
