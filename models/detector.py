"""A small detection transformer, DETR for toys, also for students of several (ka_losses/transformer_ka.py).

N. Carion et al., "End-to-End Object Detection with Transformers", ECCV 2020, arXiv:2005.12872: convolutions,
an encoder, a decoder with a learned code per query, a class and a box from each query; here pre-norm, with
two layers each. A student of T teachers has T chunks: its projection makes T sequences, one after another.
"""

import math

import torch
from torch import Tensor, nn


class Detector(nn.Module):
    """Objects of an image, at most as many as there are queries.

    Args:
        num_classes: K, without background.
        chunks: T, sequences that the projection makes.
        dim: width, a multiple of 4 heads and of 4 numbers of the position code.
        queries: Q.
        layers: of the encoder, of the decoder.

    Shape:
        img: (N, 3, H, W), H and W multiples of 8. Returns a list over decoder layers of {'logits':
        (N, Q, 1 + K), column 0 is background, 'boxes': (N, Q, 4) centre x, centre y, width, height in 0..1},
        and a list of sequences (T H W / 64, N, dim): the projection, and the output of each encoder layer.
    """

    def __init__(
        self,
        num_classes: int,
        chunks: int = 1,
        dim: int = 64,
        queries: int = 8,
        layers: tuple[int, int] = (2, 2),
    ) -> None:
        super().__init__()
        if dim % 4:
            raise ValueError(f'Detector: dim must be a multiple of 4, got {dim}')
        self.dim, self.chunks = dim, chunks
        widths = [3, dim // 4, dim // 2, dim]
        self.body = nn.Sequential(*(_stage(a, b) for a, b in zip(widths, widths[1:])))
        self.proj = nn.Conv2d(dim, chunks * dim, 1)
        self.encoder = nn.ModuleList(_Layer(dim, crosses=False) for _ in range(layers[0]))
        self.decoder = nn.ModuleList(_Layer(dim, crosses=True) for _ in range(layers[1]))
        self.memory_norm, self.out_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.queries = nn.Parameter(torch.randn(queries, dim))
        self.kind = nn.Linear(dim, 1 + num_classes)
        self.box = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, 4))

    def forward(self, img: Tensor) -> tuple[list[dict], list[Tensor]]:
        fm = self.proj(self.body(img))
        tokens = torch.cat(fm.flatten(2).transpose(1, 2).chunk(self.chunks, dim=2), dim=1)
        place = position_code(*fm.shape[2:], self.dim).to(tokens).repeat(self.chunks, 1)
        sequences = [tokens]
        for layer in self.encoder:
            tokens = layer(tokens, place)
            sequences.append(tokens)
        memory, found = self.memory_norm(tokens), []
        y = memory.new_zeros(len(img), *self.queries.shape)
        for layer in self.decoder:
            y = layer(y, self.queries, memory, place)
            seen = self.out_norm(y)
            found.append({'logits': self.kind(seen), 'boxes': self.box(seen).sigmoid()})
        return found, [sequence.transpose(0, 1) for sequence in sequences]


def position_code(height: int, width: int, dim: int) -> Tensor:
    """(height * width, dim): sines and cosines of the row and the column of each place."""
    frequencies = torch.arange(1, dim // 4 + 1) / 2
    y, x = ((torch.arange(n) + 0.5) / n * 2 * math.pi for n in (height, width))
    parts = [f(p[:, None] * frequencies) for p in (y, x) for f in (torch.sin, torch.cos)]
    rows = torch.cat(parts[:2], dim=1)[:, None].expand(height, width, -1)
    columns = torch.cat(parts[2:], dim=1)[None].expand(height, width, -1)
    return torch.cat([rows, columns], dim=2).flatten(0, 1)


def _stage(c_in: int, c_out: int) -> nn.Sequential:
    """To half the height and width."""
    layers = []
    for a, stride in ((c_in, 2), (c_out, 1)):
        layers += [
            nn.Conv2d(a, c_out, 3, stride, 1, bias=False),
            nn.BatchNorm2d(c_out),
            nn.ReLU(inplace=True),
        ]
    return nn.Sequential(*layers)


class _Layer(nn.Module):
    """Pre-norm attention to itself, to a memory in the decoder, and a feed-forward network.

    Codes are added to queries and keys, never to values.
    """

    def __init__(self, dim: int, crosses: bool, heads: int = 4) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(2 + crosses))
        self.own = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.cross = nn.MultiheadAttention(dim, heads, batch_first=True) if crosses else None
        self.feed = nn.Sequential(nn.Linear(dim, 2 * dim), nn.ReLU(), nn.Linear(2 * dim, dim))

    def forward(self, x: Tensor, code: Tensor, memory: Tensor | None = None, place: Tensor | None = None):
        y = self.norms[0](x)
        x = x + self.own(y + code, y + code, y, need_weights=False)[0]
        if self.cross is not None:
            y = self.norms[2](x)
            x = x + self.cross(y + code, memory + place, memory, need_weights=False)[0]
        return x + self.feed(self.norms[1](x))
