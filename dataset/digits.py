"""Digit strings, seen and heard: the smallest task in which one sense can teach another, made here.

A sample is a string of 4 to 7 digits, each lasting 2 to 4 frames of a video. The video shows it in 8x8
pixels, never quite at the same place, faint, under noise: a lip reader's lot. The sound plays it as a
telephone does, two tones per digit, two frames of sound to one of the video, and is easy to understand. Both
have the same timing, so what is heard at a moment tells what is seen there.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

LEAST, MOST = 4, 7  # digits of a string
END = 10  # begins and ends a string in the decoder
SIZE, BINS, RATE = 8, 16, 2  # pixels a side, frequencies, frames of sound per frame of the video
_FONT = (
    '####.##.##.####', '.#.##..#..#.###', '##...#.#.#..###', '###..#.##..####', '#.##.####..#..#',
    '####..##...###.', '.###..####.####', '###..#.#..#..#.', '####.#####.####', '####.####..###.',
)  # 3 x 5 pixels, row by row  # fmt: skip
_LOW, _HIGH = (697, 770, 852, 941), (1209, 1336, 1477)  # the telephone's, in Hz
_KEYS = {d: divmod(d - 1, 3) for d in range(1, 10)} | {0: (3, 1)}
_SAMPLES, _HERTZ, _FIRST = 128, 8000, 10  # of a frame of sound; the first frequency that is kept


@dataclass
class Digits:
    """n samples; J, I and L are the longest of the set, the rest is 0, and -1 in text.

    video (n, J, 64), sound (n, I, 16) float32; video_len, sound_len (n,); text (n, L) int64, closed by END.
    """

    video: Tensor
    sound: Tensor
    video_len: Tensor
    sound_len: Tensor
    text: Tensor

    def __len__(self) -> int:
        return len(self.text)

    def part(self, index: Tensor) -> 'Digits':
        return Digits(*(getattr(self, name)[index] for name in self.__dataclass_fields__))

    def to(self, device) -> 'Digits':
        return Digits(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))


def digits(n: int, seed: int, noise: float = 0.3) -> Digits:
    """n strings, the same for the same n, seed and noise (deviation, beside 1 of a stroke at its boldest)."""
    rng = np.random.default_rng([7, seed, n])
    strings, lasting = [], []
    for _ in range(n):
        count = rng.integers(LEAST, MOST + 1)
        strings.append(rng.integers(10, size=count))
        lasting.append(rng.integers(2, 5, size=count))
    shown = [np.repeat(string, times) for string, times in zip(strings, lasting)]  # the digit of every frame
    video_len = np.array([len(frames) for frames in shown])
    longest = int(video_len.max())
    video = np.zeros((n, longest, SIZE * SIZE), np.float32)
    sound = np.zeros((n, RATE * longest, BINS), np.float32)
    text = np.full((n, MOST + 1), -1, np.int64)
    for i, frames in enumerate(shown):
        video[i, : len(frames)] = _seen(frames, rng, noise)
        sound[i, : RATE * len(frames)] = _heard(np.repeat(frames, RATE), rng)
        text[i, : len(strings[i])], text[i, len(strings[i])] = strings[i], END
    arrays = video, sound, video_len, RATE * video_len, text
    return Digits(*(torch.from_numpy(np.ascontiguousarray(x)) for x in arrays))


def _seen(frames: np.ndarray, rng: np.random.Generator, noise: float) -> np.ndarray:
    """(frames, 64)."""
    picture = np.zeros((len(frames), SIZE, SIZE))
    top, left = rng.integers(1, 3, size=len(frames)), rng.integers(2, 4, size=len(frames))
    bold = rng.uniform(0.6, 1.0, (len(frames), 1, 1))
    for k, digit in enumerate(frames):
        picture[k, top[k] : top[k] + 5, left[k] : left[k] + 3] = _GLYPHS[digit]
    return (bold * picture + noise * rng.standard_normal(picture.shape)).reshape(len(frames), -1)


def _heard(frames: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(frames, 16): logarithms of the strength of frequencies from 625 Hz on, 62.5 Hz apart."""
    tones = np.array([[_LOW[_KEYS[d][0]], _HIGH[_KEYS[d][1]]] for d in frames])
    time = np.arange(_SAMPLES) / _HERTZ
    phase = rng.uniform(0, 2 * np.pi, (len(frames), 2, 1))
    wave = np.sin(2 * np.pi * tones[:, :, None] * time + phase).sum(axis=1)
    wave += 0.3 * rng.standard_normal(wave.shape)
    return np.log1p(np.abs(np.fft.rfft(wave)))[:, _FIRST : _FIRST + BINS]


_GLYPHS = np.array([[c == '#' for c in glyph] for glyph in _FONT]).reshape(10, 5, 3)
