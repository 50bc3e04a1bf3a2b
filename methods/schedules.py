"""How a factor moves over a training: functions (epochs done, length of the training) -> number.

Each is written as its authors say it, `linear(20, of=240)`: over the first 20 of their 240 epochs. A training
of another length gets the same share of it, and at least one epoch.
"""

import math
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class linear:
    """Up to 1 over the first epochs; the first one has a share already, unless it starts at 0."""

    epochs: float
    of: float
    start: int = 1

    def __call__(self, epoch: int, epochs: int) -> float:
        return min((epoch + self.start) / max(self.epochs * epochs / self.of, 1), 1)

    def lasting(self, epochs: int, of: int) -> 'linear':
        """The same over another number of epochs, for --ramp_epochs."""
        return replace(self, epochs=epochs, of=of)


@dataclass(frozen=True)
class half_cosine(linear):
    """Up to 1 over the first epochs, slowly at both ends."""

    def __call__(self, epoch: int, epochs: int) -> float:
        return 0.5 * (1 - math.cos(math.pi * super().__call__(epoch, epochs)))


@dataclass(frozen=True)
class gaussian(linear):
    """Up to 1 over the first epochs: exp(-5 (1 - share)^2)."""

    start: int = 0

    def __call__(self, epoch: int, epochs: int) -> float:
        return math.exp(-5 * (1 - super().__call__(epoch, epochs)) ** 2)


@dataclass(frozen=True)
class steps:
    """Constant pieces: steps((0, 0.1), (10, 0.5), of=240) is 0.1, and from the tenth epoch of 240 on 0.5."""

    pieces: tuple
    of: float

    def __init__(self, *pieces: tuple[float, float], of: float) -> None:
        object.__setattr__(self, 'pieces', pieces)
        object.__setattr__(self, 'of', of)

    def __call__(self, epoch: int, epochs: int) -> float:
        return [value for first, value in self.pieces if epoch * self.of >= first * epochs or not first][-1]


@dataclass(frozen=True)
class off_then_down:
    """0 at first, then the line from 1 (at the very beginning) to 0 (at a share of the training)."""

    off: float
    of: float
    zero_at: float

    def __call__(self, epoch: int, epochs: int) -> float:
        return 0 if epoch < self.off / self.of * epochs else max(1 - epoch / epochs / self.zero_at, 0)


@dataclass(frozen=True)
class cosine_from:
    """1 up to an epoch, then half a cosine down to 0 at the end: cosine_from(150, of=240)."""

    epoch: float
    of: float

    def __call__(self, epoch: int, epochs: int) -> float:
        first = self.epoch / self.of * epochs
        return 0.5 * (1 + math.cos(math.pi * max(epoch - first, 0) / (epochs - first)))
