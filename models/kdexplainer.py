"""A classifier that learns which classes share their layers: a tree of blocks with a head per class.

M. Xue, J. Song, X. Wang, Y. Chen, X. Wang, M. Song, "KDExplainer: A Task-oriented Attention Model for
Explaining Knowledge Distillation", IJCAI 2021, arXiv:2105.04181; tools/kdexplainer.py trains it.

Each class is a task of its own, a head with one logit. Below the heads lie levels of 8, 4 and 2 blocks; every
head and every block reads one block of the level below it. Which one is learnt:

    pi = softmax(A / 0.5) over the parents, A (children, parents), one matrix per level, drawn from U(0, 1)
    d = softmax(log(pi) / t) over the parents
    input of child i = sum over j of d_ij * output of parent j

The temperature t falls while the tree is searched. Then it is frozen, every child has the parent with the
largest A, and blocks that nobody reads are left out. There is no Gumbel noise, although the authors' function
is called gumbel_softmax. The paper's other contribution, the virtual attention module, is in neither public
code and not here.

Source: xmq1221/KDExplainer, LEARNTOBRANCH.py, and zju-vipa/KamalEngine,
kamal/vision/models/classification/LEARNTOBRANCH.py.
"""

import torch
from torch import Tensor, nn


class KDExplainer(nn.Module):
    """The tree, searching its branches or frozen.

    Args:
        num_classes: K, heads.
        blocks: of each level, from the image to the heads.
        width: channels inside the blocks and between them.
        last: channels of the last level.
        head: 'ce': a head gives one logit; 'nce': two, of which the larger counts.

    Shape:
        x: (N, 3, H, W), H and W at least 2 ** levels. Returns (N, K).

    Attributes:
        temperature: t of the search, set from outside.
        parents: (children,) per level above the first, the frozen tree; -1 while it is searched.

    Raises:
        ValueError: unknown head; no level, or an empty one.
    """

    def __init__(
        self, num_classes: int = 10, blocks: tuple[int, ...] = (2, 4, 8), width: int = 64, last: int = 32,
        head: str = 'ce',
    ) -> None:  # fmt: skip
        super().__init__()
        if head not in ('ce', 'nce'):
            raise ValueError(f"KDExplainer: head must be 'ce' or 'nce', got {head!r}: 'ce' is the usual one")
        if not blocks or min(blocks) < 1:
            raise ValueError(f'KDExplainer: blocks must be numbers > 0, got {blocks}: (2, 4, 8)')
        self.temperature = 1.0
        self.levels = nn.ModuleList()
        for i, count in enumerate(blocks):
            c_in, c_out = width if i else 3, last if i == len(blocks) - 1 else width
            self.levels.append(nn.ModuleList(_block(c_in, width, c_out) for _ in range(count)))
        self.heads = nn.ModuleList(_head(last, 1 if head == 'ce' else 2) for _ in range(num_classes))
        counts = [*blocks, num_classes]
        pairs = list(zip(counts[1:], counts))
        self.routes = nn.ParameterList(torch.rand(children, parents) for children, parents in pairs)
        for i, (children, _) in enumerate(pairs):
            self.register_buffer(f'parents{i}', torch.full((children,), -1))

    @property
    def parents(self) -> list[Tensor]:
        return [getattr(self, f'parents{i}') for i in range(len(self.routes))]

    @property
    def frozen(self) -> bool:
        return bool((self.parents[0] >= 0).all())

    def weights(self, level: int) -> Tensor:
        """pi (children, parents) of the level above this one."""
        return torch.softmax(self.routes[level] / 0.5, dim=1)

    def forward(self, x: Tensor) -> Tensor:
        outs = self._along_the_tree(x) if self.frozen else self._along_all(x)
        return torch.stack([out.max(dim=1).values for out in outs], dim=1)

    def _along_all(self, x: Tensor) -> list[Tensor]:
        maps = [block(x) for block in self.levels[0]]
        for i, layer in enumerate([*self.levels[1:], self.heads]):
            d = torch.softmax(torch.log_softmax(self.routes[i] / 0.5, dim=1) / self.temperature, dim=1)
            stacked = torch.stack(maps)
            shape = stacked.shape[1:]
            inputs = d.to(stacked.dtype) @ stacked.flatten(1)
            maps = [child(row.reshape(shape)) for child, row in zip(layer, inputs)]
        return maps

    def _along_the_tree(self, x: Tensor) -> list[Tensor]:
        used = self.used()
        maps = {j: self.levels[0][j](x) for j in used[0]}
        for i, layer in enumerate([*self.levels[1:], self.heads]):
            parents = self.parents[i].tolist()
            maps = {c: layer[c](maps[parents[c]]) for c in used[i + 1]}
        return list(maps.values())

    def used(self) -> list[list[int]]:
        """Per level the blocks that a head reads, over whatever way; last all heads."""
        used = [list(range(len(self.heads)))]
        for parents in reversed(self.parents):
            parents = parents.tolist()
            used.insert(0, sorted({parents[child] for child in used[0]}))
        return used

    @torch.no_grad()
    def freeze(self) -> None:
        """Every child keeps the parent with the largest weight, the first of equals."""
        for parents, route in zip(self.parents, self.routes):
            parents.copy_(route.argmax(dim=1))
        self.routes.requires_grad_(False)

    def fresh(self) -> None:
        """New random weights; the tree stays."""
        for module in self.modules():
            if hasattr(module, 'reset_parameters'):
                module.reset_parameters()


def _block(c_in: int, width: int, c_out: int) -> nn.Sequential:
    """Two convolutions, and half the side."""
    return nn.Sequential(
        nn.Conv2d(c_in, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
        nn.Conv2d(width, c_out, 3, padding=1), nn.BatchNorm2d(c_out), nn.ReLU(),
        nn.MaxPool2d(2),
    )  # fmt: skip


def _head(channels: int, logits: int) -> nn.Sequential:
    """A class's own layers."""
    return nn.Sequential(
        nn.AdaptiveAvgPool2d(7), nn.Flatten(),
        nn.Linear(49 * channels, 128), nn.ReLU(), nn.Dropout(0.15),
        nn.Linear(128, 128), nn.ReLU(), nn.Dropout(0.15),
        nn.Linear(128, logits),
    )  # fmt: skip
