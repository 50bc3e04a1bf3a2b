"""A graph attention network in plain torch: tools/graphs.py."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class GAT(nn.Module):
    """Layers of graph attention (Velickovic et al., ICLR 2018) and a linear classifier.

    Args:
        features, classes: of the nodes.
        width: of a head; layers have heads * width outputs.
        heads, layers: 4, 2.
    """

    def __init__(self, features: int, classes: int, width: int, heads: int = 4, layers: int = 2) -> None:
        super().__init__()
        widths = [features] + [heads * width] * layers
        self.layers = nn.ModuleList(Layer(a, width, heads) for a in widths[:-1])
        self.head = nn.Linear(widths[-1], classes)

    def forward(self, feat: Tensor, edge_index: Tensor) -> tuple[Tensor, list[Tensor]]:
        """(V, classes) logits, and the outputs (V, heads * width) of all layers."""
        seen = []
        for layer in self.layers:
            feat = F.elu(layer(feat, edge_index))
            seen.append(feat)
        return self.head(feat), seen


class Layer(nn.Module):
    """Every node takes what its neighbours say, weighed by how it listens to them."""

    def __init__(self, c_in: int, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.width = heads, width
        self.linear = nn.Linear(c_in, heads * width, bias=False)
        self.skip = nn.Linear(c_in, heads * width)
        self.source, self.end = (nn.Parameter(torch.randn(heads, width) / width**0.5) for _ in range(2))

    def forward(self, feat: Tensor, edge_index: Tensor) -> Tensor:
        u, v = edge_index
        h = self.linear(feat).unflatten(1, (self.heads, self.width))
        score = F.leaky_relu((h * self.source).sum(2)[u] + (h * self.end).sum(2)[v], 0.2)  # (E, heads)
        score = (score - score.detach().max()).exp()
        total = score.new_zeros(len(feat), self.heads).index_add(0, v, score)
        said = (score / total[v].clamp(min=1e-30))[:, :, None] * h[u]
        return torch.zeros_like(h).index_add(0, v, said).flatten(1) + self.skip(feat)
