"""One network for several dense tasks, made of SegNets: a trunk that a branch per task leaves somewhere.

J. Ye et al., "Student Becoming the Master", CVPR 2019, arXiv:1904.10167; see ka_losses/sbm.py.
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ka_losses.sbm import ChannelCoding

from .segmentation import SegNet


class Leaving(nn.Module):
    """What networks share whose `branches` leave a common trunk at `points`, a buffer."""

    def freeze(self, frozen: bool) -> None:
        """Hold the branches, batch norm included (block phase), or let them train (fine-tuning)."""
        self.frozen = frozen
        self.branches.requires_grad_(not frozen)
        self.train(self.training)

    def train(self, mode: bool = True):
        super().train(mode)
        self.branches.train(mode and not self.frozen)
        return self

    @torch.no_grad()
    def choose(self, points: list[int]) -> None:
        self.points.copy_(torch.tensor(points))


def _widths(net: SegNet) -> list[int]:
    """Channels of the levels, from the encoder's output on."""
    return [getattr(net, f'down{i}').layers[-1][0].out_channels for i in range(net.levels, 0, -1)]


class JointNet(Leaving):
    """The trunk is a whole SegNet; branch u leaves it at point k, through a channel coding and the remaining
    decoder blocks of its own SegNet, which are given the trunk's pooling indices.

    Point 0 is the encoder's output, point k the output of the k-th decoder block. Every branch has a coding
    for every point; `choose` says which is used.

    Args:
        nets: a SegNet per task, of equal levels and widths. The trunk is a copy of the first, branch u of the
            u-th decoder.

    Shape:
        x: (N, 3, H, W). Returns the list of the tasks' outputs, (N, K_u, H, W).

    Raises:
        ValueError: the networks differ in levels or widths.
    """

    def __init__(self, nets: list[SegNet]) -> None:
        super().__init__()
        self.levels = nets[0].levels
        self.trunk = copy.deepcopy(nets[0])
        self.branches = nn.ModuleList(
            nn.ModuleList(copy.deepcopy(getattr(net, f'up{i}')) for i in range(self.levels, 0, -1))
            for net in nets
        )
        widths = _widths(nets[0])
        if any(_widths(net) != widths for net in nets):
            raise ValueError(
                f'JointNet: nets must have equal levels and widths, got '
                f'{[_widths(net) for net in nets]}: take networks of one kind'
            )
        self.codings = nn.ModuleList(nn.ModuleList(ChannelCoding(c) for c in widths) for _ in nets)
        self.register_buffer('points', torch.zeros(len(nets), dtype=torch.int64))
        self.frozen = False
        self.requires_grad_(True)

    def forward(self, x: Tensor, points: list[int] | None = None) -> list[Tensor]:
        """points: where each branch leaves the trunk this time; None: the chosen ones."""
        points = self.points.tolist() if points is None else points
        places = []
        for i in range(1, self.levels + 1):
            x = getattr(self.trunk, f'down{i}')(x)
            size = x.shape[2:]
            x, where = F.max_pool2d(x, 2, return_indices=True)
            places.append((where, size))
        places = places[::-1]
        maps = [x]
        for k in range(max(points)):
            maps.append(self._up(getattr(self.trunk, f'up{self.levels - k}'), maps[-1], places[k]))
        outs = []
        for u, point in enumerate(points):
            y = self.codings[u][point](maps[point])
            for k in range(point, self.levels):
                y = self._up(self.branches[u][k], y, places[k])
            outs.append(y)
        return outs

    @staticmethod
    def _up(block: nn.Module, x: Tensor, place) -> Tensor:
        where, size = place
        return block(F.max_unpool2d(x, where, 2, output_size=size))

    def parameters_in_use(self) -> int:
        """Parameters that the chosen points need."""
        points = self.points.tolist()
        used = [getattr(self.trunk, f'down{i}') for i in range(1, self.levels + 1)]
        used += [getattr(self.trunk, f'up{self.levels - k}') for k in range(max(points))]
        used += [self.codings[u][point] for u, point in enumerate(points)]
        used += [block for u, point in enumerate(points) for block in self.branches[u][point:]]
        return sum(p.numel() for module in used for p in module.parameters())
