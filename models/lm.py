"""A small decoder of next tokens, the oracle of a Markov chain, and how to draw from them.

`net(x)` gives logits (N, L, K) for tokens (N, L); `net(x, True)` Tokens(out, hid), with the last hidden
states, which the head reads. Head and embedding are one matrix, `net.head()`.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CONTEXT = 64
SIZES = {'teacher': (96, 3, 3), 'student': (32, 1, 2)}  # width, layers, heads


class Tokens(NamedTuple):
    out: Tensor
    hid: Tensor | None = None


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, h: Tensor) -> Tensor:
        q, k, v = (
            x.unflatten(2, (self.heads, -1)).transpose(1, 2) for x in self.qkv(self.norm1(h)).chunk(3, 2)
        )
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        h = h + self.proj(seen.transpose(1, 2).flatten(2))
        return h + self.down(F.gelu(self.up(self.norm2(h))))


class Decoder(nn.Module):
    """Pre-norm, causal, without dropout.

    Args:
        K: tokens.
        width, layers, heads: its size.
    """

    def __init__(self, K: int, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(K, width)
        self.places = nn.Parameter(0.02 * torch.randn(CONTEXT, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        nn.init.normal_(self.embed.weight, std=0.02)
        self.register_buffer('heads', torch.tensor(heads))  # a file of weights says what network it is of

    def forward(self, x: Tensor, hidden: bool = False) -> Tensor | Tokens:
        h = self.embed(x) + self.places[: x.shape[1]]
        for block in self.blocks:
            h = block(h)
        h = self.norm(h)
        out = h @ self.embed.weight.T
        return Tokens(out, h) if hidden else out

    def head(self) -> Tensor:
        return self.embed.weight


class Oracle(nn.Module):
    """The chain's own probabilities: log_p (K, K, K) of the two symbols before. Position 0 knows nothing."""

    def __init__(self, log_p: Tensor) -> None:
        super().__init__()
        self.register_buffer('log_p', log_p)

    def forward(self, x: Tensor, hidden: bool = False) -> Tensor | Tokens:
        out = self.log_p[F.pad(x, (1, 0))[:, :-1], x]
        out = torch.cat([torch.zeros_like(out[:, :1]), out[:, 1:]], dim=1)
        return Tokens(out) if hidden else out


def build(size: str, K: int) -> Decoder:
    """'teacher' or 'student', of the sizes above."""
    return Decoder(K, *SIZES[size])


def from_state(state: dict) -> Decoder:
    """The decoder whose weights these are.

    Raises:
        ValueError: they are of another network.
    """
    try:
        K, width = state['embed.weight'].shape
        layers = 1 + max(int(key.split('.')[1]) for key in state if key.startswith('blocks.'))
        net = Decoder(K, width, layers, int(state['heads']))
        net.load_state_dict(state)
    except (KeyError, ValueError, RuntimeError, AttributeError):
        raise ValueError('not the weights of a decoder of models/lm.py') from None
    return net


@torch.no_grad()
def sample(
    net, prompt: Tensor, n: int, generator: torch.Generator, other=None, mix: float = 0.0, shard=(0, 1)
) -> Tensor:
    """prompt (N, L) continued by n tokens, drawn at temperature 1; of other with the share mix.

    shard: (place, parts), where the prompts are one part of a batch: they are continued as within the whole.
    """
    x, (place, parts) = prompt, shard
    for _ in range(n):
        seen = x[:, -CONTEXT:]
        p = net(seen)[:, -1].float().softmax(dim=1)
        if mix:
            p = (1 - mix) * p + mix * other(seen)[:, -1].float().softmax(dim=1)
        # what torch.multinomial does, but the numbers are drawn for the whole batch
        q = p.new_empty(parts * len(p), p.shape[1]).exponential_(generator=generator).chunk(parts)[place]
        x = torch.cat([x, (p / q).argmax(dim=1, keepdim=True)], dim=1)
    return x
