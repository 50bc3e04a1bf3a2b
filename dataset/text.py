"""Texts for train_lm.py, none of them downloaded: `load('pydoc')`, `load('markov')`, or any UTF-8 file.

pydoc is the language reference that Python carries (pydoc_data.topics, 465 kB of English with code in 3.11;
other versions differ by a few percent: results have the text's hash). markov is a chain over 8 symbols whose
exact next-symbol probabilities are known: a teacher without training, and the best loss that can be reached.
"""

import bisect
import hashlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from models.lm import CONTEXT, Oracle

SIZE = 200_000  # symbols of markov
PAIRS = 200  # of the second vocabulary


@dataclass
class Text:
    """A text in symbols, the first nine tenths for training."""

    name: str
    symbols: str
    ids: Tensor  # (length,) int64
    first: int = 0  # position of a window from which on symbols are predicted
    oracle: Oracle | None = None
    entropy: float | None = None  # nats per symbol, the best loss, where it is known
    replaced: float = 0.0  # share of the characters that became blanks
    train: Tensor = field(init=False)
    val: Tensor = field(init=False)

    def __post_init__(self) -> None:
        cut = len(self.ids) * 9 // 10
        self.train, self.val = self.ids[:cut], self.ids[cut:]
        if len(self.val) <= CONTEXT + 1:
            least = 10 * (CONTEXT + 2)
            raise ValueError(
                f'{self.name}: the text has {len(self.ids)} symbols, at least {least} are needed'
            )

    @property
    def digest(self) -> str:
        return hashlib.sha1(self.symbols.encode() + self.ids.numpy().tobytes()).hexdigest()[:12]

    def windows(self, n: int, generator: torch.Generator) -> Tensor:
        """(n, CONTEXT + 1) pieces of the training part, from random places."""
        starts = torch.randint(len(self.train) - CONTEXT, (n,), generator=generator)
        return self.train[starts[:, None] + torch.arange(CONTEXT + 1)]

    def held_out(self) -> Tensor:
        """All windows of the last tenth that do not overlap in what they predict."""
        return self.val.unfold(0, CONTEXT + 1, CONTEXT)

    def show(self, ids) -> str:
        return ''.join(self.symbols[i] for i in ids)


def load(name: str) -> Text:
    """The text called name: 'pydoc', 'markov' or 'markov:K', else a file.

    Raises:
        ValueError: no such text, or too short a one; one line.
    """
    kind, _, size = name.partition(':')
    if kind == 'markov' and not Path(name).is_file():
        if size and not (size.isdigit() and 2 <= int(size) <= 64):
            raise ValueError(f'{name}: say markov or markov:K with 2 to 64 symbols')
        return markov(int(size or 8))
    if name == 'pydoc':
        try:
            from pydoc_data import topics
        except ImportError:
            raise ValueError('pydoc: this Python has no pydoc_data; take markov, or a file of text') from None
        return of_characters(name, '\n'.join(topics.topics[key] for key in sorted(topics.topics)))
    try:
        return of_characters(name, Path(name).read_text(encoding='utf-8'))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, 'strerror', None) or 'is not UTF-8'
        raise ValueError(f'{name}: {reason}; say pydoc, markov, or a file of UTF-8 text') from None


def of_characters(name: str, text: str) -> Text:
    """Printable ASCII and newlines; everything else becomes a blank."""
    kept = ''.join(c if ' ' <= c <= '~' or c == '\n' else ' ' for c in text)
    replaced = sum(a != b and not a.isspace() for a, b in zip(text, kept)) / max(len(text), 1)
    if replaced > 0.5:
        raise ValueError(f'{name}: {replaced:.0%} of it would be blanks, only printable ASCII is kept')
    text = kept
    symbols = ''.join(sorted(set(text)))
    if len(symbols) < 2:
        raise ValueError(f'{name}: the text has {len(symbols)} different symbols, at least 2 are needed')
    numbers = {c: i for i, c in enumerate(symbols)}
    return Text(name, symbols, torch.tensor([numbers[c] for c in text]), replaced=replaced)


def markov(K: int, seed: int = 0) -> Text:
    """A chain of order 2: the next symbol depends on the last two, by K^2 draws of a Dirichlet(0.1)."""
    rng = np.random.default_rng(seed)
    # without the 1 % log p reaches -130, and a divergence is its tail
    p = 0.99 * rng.dirichlet(np.full(K, 0.1), size=K * K) + 0.01 / K
    sums = p.cumsum(axis=1).tolist()
    ids = [0, 0]
    for u in rng.random(SIZE - 2).tolist():
        ids.append(min(bisect.bisect(sums[ids[-2] * K + ids[-1]], u), K - 1))
    pairs = np.full(K * K, 1 / K**2)
    for _ in range(2000):
        pairs = (pairs[:, None] * p).reshape(K, K, K).sum(axis=0).reshape(-1)
    entropy = -float((pairs[:, None] * p * np.log(p)).sum())
    symbols = ''.join(chr(ord('a') + i) if i < 26 else chr(ord('A') + i - 26) for i in range(min(K, 52)))
    symbols += ''.join(map(str, range(10)))[: max(K - 52, 0)] + '+-'[: max(K - 62, 0)]
    oracle = Oracle(torch.from_numpy(np.log(p)).float().reshape(K, K, K))
    return Text(f'markov:{K}', symbols, torch.tensor(ids), 1, oracle, entropy)


class Pairs:
    """A second vocabulary: the symbols, and the most frequent pairs of neighbours in the training text.

    Read greedily from the left: a pair if the next two symbols are one, else a symbol.
    """

    def __init__(self, text: Text) -> None:
        K = len(text.symbols)
        counts = (text.train[:-1] * K + text.train[1:]).bincount(minlength=K * K)
        best = counts.argsort(descending=True, stable=True)[:PAIRS]
        self.numbers = {divmod(pair, K): K + i for i, pair in enumerate(best.tolist())}
        self.symbols = [*text.symbols, *map(text.show, self.numbers)]
        self.K = len(self.symbols)

    def encode(self, ids: list[int]) -> list[int]:
        tokens, i = [], 0
        while i < len(ids):
            pair = self.numbers.get(tuple(ids[i : i + 2]))
            tokens.append(ids[i] if pair is None else pair)
            i += 1 if pair is None else 2
        return tokens

    def batch(self, windows: Tensor) -> tuple[Tensor, Tensor]:
        """What is read and what is to be said of each window, padded with 0 and with -100."""
        rows = [torch.tensor(self.encode(row)) for row in windows.tolist()]
        pad = torch.nn.utils.rnn.pad_sequence
        x = pad([row[:-1] for row in rows], batch_first=True)
        return x, pad([row[1:] for row in rows], batch_first=True, padding_value=-100)
