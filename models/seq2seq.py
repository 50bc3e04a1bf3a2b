"""A small Transformer from frames to symbols, whose attention and states can be read: tools/sequences.py."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class Read:
    """What a forward pass shows.

    out: (B, L, K) logits; frm: (B, J, D) outputs of the encoder, seq: (B, D) their mean over the valid
    frames; ctx: (B, L, D) what the last decoder layer draws from the encoder at every step; enc, dec, cross:
    per layer the attention (B, H, J, J), (B, H, L, L), (B, H, L, J).
    """

    out: Tensor
    seq: Tensor | None = None
    frm: Tensor | None = None
    ctx: Tensor | None = None
    enc: list[Tensor] | None = None
    dec: list[Tensor] | None = None
    cross: list[Tensor] | None = None

    @classmethod
    def join(cls, reads: list['Read'], names) -> 'Read':
        """One of several, of these attributes."""
        return cls(**{name: _each(torch.cat, *(getattr(read, name) for read in reads)) for name in names})

    def part(self, index: Tensor) -> 'Read':
        """Of some samples."""
        return Read(
            **{name: _each(lambda x: x[0][index], x) for name, x in vars(self).items() if x is not None}
        )


def _each(make, *attributes):
    """make of the attributes of several reads, or layer by layer."""
    if isinstance(attributes[0], Tensor):
        return make(attributes)
    return [make(layer) for layer in zip(*attributes)]


class Seq2Seq(nn.Module):
    """Encoder and decoder of pre-norm Transformer layers.

    Args:
        features: width of a frame.
        symbols: K, the last of which begins and ends every string.
        width, heads, layers: of both halves; 32, 4, 2.
    """

    def __init__(self, features: int, symbols: int, width: int = 32, heads: int = 4, layers: int = 2) -> None:
        super().__init__()
        if width % heads or width % 2:
            raise ValueError(
                f'Seq2Seq: width must be even and a multiple of {heads} heads, got {width}; take 32'
            )
        self.width, self.symbols = width, symbols
        self.frame = nn.Sequential(nn.Linear(features, 128), nn.ReLU(), nn.Linear(128, width))
        self.symbol = nn.Embedding(symbols, width)
        self.encoder = nn.ModuleList(Layer(width, heads, False) for _ in range(layers))
        self.decoder = nn.ModuleList(Layer(width, heads, True) for _ in range(layers))
        self.norm_frm, self.norm_out = nn.LayerNorm(width), nn.LayerNorm(width)
        self.head = nn.Linear(width, symbols)

    def forward(self, frames: Tensor, length: Tensor, given: Tensor) -> Read:
        """frames: (B, J, features), length: (B,) valid ones, given: (B, L) symbols before each step."""
        valid = torch.arange(frames.shape[1], device=frames.device) < length[:, None]
        frm, enc = self.encode(frames, valid)
        out, ctx, dec, cross = self.decode(given, frm, valid)
        seq = (frm * valid[..., None]).sum(dim=1) / length[:, None]
        return Read(out, seq, frm, ctx, enc, dec, cross)

    def encode(self, frames: Tensor, valid: Tensor):
        x = self.frame(frames) + positions(frames.shape[1], self.width, frames.device)
        seen = []
        for layer in self.encoder:
            x, attention, *_ = layer(x, valid[:, None, None, :])
            seen.append(attention)
        return self.norm_frm(x), seen

    def decode(self, given: Tensor, frm: Tensor, valid: Tensor):
        steps = given.shape[1]
        y = self.symbol(given) + positions(steps, self.width, given.device)
        past = torch.ones(steps, steps, dtype=torch.bool, device=given.device).tril()
        dec, cross, ctx = [], [], None
        for layer in self.decoder:
            y, own, other, ctx = layer(y, past, frm, valid[:, None, None, :])
            dec.append(own)
            cross.append(other)
        return self.head(self.norm_out(y)), ctx, dec, cross

    @torch.no_grad()
    def greedy(self, frames: Tensor, length: Tensor, steps: int) -> Tensor:
        """(B, steps): the likeliest symbol, one after the other; -1 after the end."""
        valid = torch.arange(frames.shape[1], device=frames.device) < length[:, None]
        frm, _ = self.encode(frames, valid)
        end = self.symbols - 1
        given = torch.full((len(frames), 1), end, device=frames.device)
        for _ in range(steps):
            out = self.decode(given, frm, valid)[0]
            given = torch.cat([given, out[:, -1].argmax(dim=1, keepdim=True)], dim=1)
        said = given[:, 1:]
        over = (said == end).cumsum(dim=1) - (said == end).long() > 0
        return torch.where(over, -1, said)


class Layer(nn.Module):
    def __init__(self, width: int, heads: int, reads: bool) -> None:
        super().__init__()
        self.own, self.norm = Attention(width, heads), nn.LayerNorm(width)
        self.other, self.norm_other = (
            (Attention(width, heads), nn.LayerNorm(width)) if reads else (None, None)
        )
        self.mix = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width)
        )

    def forward(self, x: Tensor, allowed: Tensor, frm: Tensor | None = None, valid: Tensor | None = None):
        y = self.norm(x)
        made, own = self.own(y, y, allowed)
        x, other, ctx = x + made, None, None
        if self.other is not None:
            ctx, other = self.other(self.norm_other(x), frm, valid)
            x = x + ctx
        return x + self.mix(x), own, other, ctx


class Attention(nn.Module):
    """Multi-head attention that hands out its probabilities."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor, y: Tensor, allowed: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = (f(z).unflatten(2, (self.heads, -1)).transpose(1, 2)
                   for f, z in ((self.q, x), (self.k, y), (self.v, y)))  # fmt: skip
        score = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(~allowed, -torch.inf)
        attention = F.softmax(score, dim=-1)
        return self.o((attention @ v).transpose(1, 2).flatten(2)), attention


def positions(n: int, width: int, device) -> Tensor:
    """(n, width) sines and cosines."""
    rate = torch.exp(torch.arange(0, width, 2, device=device) * (-math.log(1000) / width))
    angle = torch.arange(n, device=device)[:, None] * rate
    return torch.stack([angle.sin(), angle.cos()], dim=2).flatten(1)
