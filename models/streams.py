"""One network for several multi-label teachers: a trunk through which each of them has a stream of its own.

J. Ye et al., "Amalgamating Filtered Knowledge", IJCAI 2019, arXiv:1905.11569; see ka_losses/afk.py.
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ka_losses.afk import Filter

from .branching import Leaving
from .resnet import ResNet


class StreamNet(Leaving):
    """The residual blocks of the trunk are shared; a stream differs by a filter on the shortcut of each.
    After one of these blocks it goes on through the remaining blocks and the classifier of its own teacher.

    Point k stands for the output of the k-th block, counted from 0; `choose` says where each stream leaves.
    Streams that are still in the trunk are normalised together, as one larger batch.

    Args:
        nets: a CIFAR ResNet per teacher, alike but for the classifier. The trunk is a copy of the first.
        columns: per teacher, which of its logits are wanted; None: all.

    Shape:
        x: (N, 3, H, W). Returns the list of the streams' logits, (N, K_u).

    Raises:
        ValueError: the teachers are other networks, or differ.
    """

    def __init__(self, nets: list[ResNet], columns: list[list[int]] | None = None) -> None:
        super().__init__()
        shapes = [[p.shape for name, p in net.named_parameters() if 'fc' not in name] for net in nets]
        if not all(isinstance(net, ResNet) for net in nets) or any(shape != shapes[0] for shape in shapes):
            raise ValueError(
                'StreamNet: teachers must be resnetN of one depth and width: streams share its blocks'
            )
        self.stem = nn.Sequential(copy.deepcopy(nets[0].conv1), copy.deepcopy(nets[0].bn1), nn.ReLU())
        self.trunk = _blocks(nets[0])
        self.levels = len(self.trunk)
        self.filters = nn.ModuleList(
            nn.ModuleList(Filter(b.conv1.out_channels, b.conv2.out_channels) for b in self.trunk)
            for _ in nets
        )
        self.branches = nn.ModuleList(
            nn.ModuleDict({'blocks': _blocks(net), 'fc': copy.deepcopy(net.fc)}) for net in nets
        )
        self.columns = columns or [list(range(net.fc.out_features)) for net in nets]
        self.register_buffer('points', torch.full((len(nets),), self.levels - 1))
        self.frozen = False
        self.requires_grad_(True)

    def forward(self, x: Tensor, points: list[int] | None = None) -> list[Tensor]:
        """points: where each stream leaves the trunk this time; None: the chosen ones."""
        points = self.points.tolist() if points is None else points
        streams = [self.stem(x)] * len(points)
        for k, block in enumerate(self.trunk):
            going = [u for u, point in enumerate(points) if point >= k]
            if not going:
                break
            x = torch.cat([streams[u] for u in going])
            middle = F.relu(block.bn1(block.conv1(x)))
            branch = block.bn2(block.conv2(middle)).chunk(len(going))
            shortcut = (x if block.downsample is None else block.downsample(x)).chunk(len(going))
            for j, (u, mid) in enumerate(zip(going, middle.chunk(len(going)))):
                streams[u] = F.relu(branch[j] + shortcut[j] * self.filters[u][k](mid))
        outs = []
        for y, branch, point, columns in zip(streams, self.branches, points, self.columns):
            for block in branch['blocks'][point + 1 :]:
                y = F.relu(block(y))
            outs.append(branch['fc'](y.mean(dim=(2, 3)))[:, columns])
        return outs

    def parameters_in_use(self) -> int:
        """Parameters that the chosen points need."""
        points = self.points.tolist()
        used = [self.stem, *self.trunk[: max(points) + 1]]
        for filters, branch, point in zip(self.filters, self.branches, points):
            used += [*filters[: point + 1], *branch['blocks'][point + 1 :], branch['fc']]
        return sum(p.numel() for module in used for p in module.parameters())


def _blocks(net: ResNet) -> nn.ModuleList:
    return nn.ModuleList(
        copy.deepcopy(block) for stage in (net.layer1, net.layer2, net.layer3) for block in stage
    )
