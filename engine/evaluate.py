"""Accuracies."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.processes import gathered, same_buffers, summed


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
    for img, target, index in data.test_batches(128 if data.device.type == 'cpu' else 1000):
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
    batches = data.test_batches(128 if data.device.type == 'cpu' else 1000)
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
    batches = data.test_batches(128 if data.device.type == 'cpu' else 1000)
    parts = [(net(img), target) for img, target, _ in batches]
    outs, target = torch.cat([out for out, _ in parts], dim=1), torch.cat([target for _, target in parts])
    shares = gathered((outs.cpu(), target.cpu()))  # of unequal size
    joined = torch.cat([out for out, _ in shares], dim=1), torch.cat([target for _, target in shares])
    return tuple(x.to(outs.device) for x in joined)


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
