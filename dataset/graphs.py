"""Graphs of acquaintances: the smallest task in which neighbours tell what a node does not, made here.

A node belongs to one of six communities and shows 16 numbers that hardly tell which: the community's own,
weak, under noise. Edges join nodes of one community three times out of four, so that the features of
neighbours, and of theirs, add up to an answer. Test graphs share no node with the training graphs.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

CLASSES, FEATURES = 6, 16


@dataclass
class Graphs:
    """Several graphs as one that falls into parts.

    feat (V, 16) float32; edge_index (2, E) int64, from and to, both directions and a self-loop per node;
    target (V,) int64; part (V,) the number of a node's graph, in order.
    """

    feat: Tensor
    edge_index: Tensor
    target: Tensor
    part: Tensor

    @property
    def count(self) -> int:
        return int(self.part[-1]) + 1

    def some(self, numbers: Tensor) -> 'Graphs':
        """The graphs of these numbers."""
        nodes = torch.isin(self.part, numbers)
        place = nodes.long().cumsum(0) - 1
        edges = self.edge_index[:, nodes[self.edge_index[0]]]
        part = torch.searchsorted(numbers.sort().values, self.part[nodes])
        return Graphs(self.feat[nodes], place[edges], self.target[nodes], part)

    def to(self, device) -> 'Graphs':
        return Graphs(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))


def graphs(n: int, seed: int, nodes: int = 100, signal: float = 0.4) -> Graphs:
    """n graphs, the same for the same arguments; signal: deviation of a community's own, beside 1."""
    own = signal * np.random.default_rng(0).standard_normal((CLASSES, FEATURES))
    rng = np.random.default_rng([11, seed, n, nodes])
    target = rng.integers(CLASSES, size=(n, nodes))
    feat = own[target] + rng.standard_normal((n, nodes, FEATURES))
    edges = []
    for k in range(n):
        by_class = [np.flatnonzero(target[k] == c) for c in range(CLASSES)]
        for u in range(nodes):
            for _ in range(2):  # each node finds two others, and is found by about as many
                near = by_class[target[k, u]] if rng.random() < 0.75 else np.arange(nodes)
                edges.append((k * nodes + u, k * nodes + int(rng.choice(near))))
    both = np.array(edges).T
    loops = np.arange(n * nodes)
    both = np.concatenate([both, both[::-1], np.stack([loops, loops])], axis=1)
    both = np.unique(both, axis=1)  # no edge twice
    part = np.repeat(np.arange(n), nodes)
    made = feat.reshape(n * nodes, -1).astype(np.float32), both, target.reshape(-1), part
    return Graphs(*(torch.from_numpy(np.ascontiguousarray(x)) for x in made))
