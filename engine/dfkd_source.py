"""Where the images of a data-free training come from.

What all kinds have in common; the kinds are in dfkd_kinds.py. Online: a generator that is trained as long as
the student. Pool: batches of images that are made one after the other and kept. Fixed: generators that are
trained before the student, then stay.

Random numbers are drawn on the CPU from one torch.Generator, which begins anew in every epoch: a function of
seed and epoch, so that a resumed run needs no state of it.
"""

import contextlib
import time
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from dataset import Resident
from engine.batch import InFloat32
from engine.meter import Meter
from engine.optimise import adam
from methods.dfkd import Method, Recipe
from models.generators import resized_crop_and_flip


@dataclass
class Setting:
    """What all image sources are told of the data: never an image of it."""

    mean: Tensor  # (3, 1, 1), of the teacher's training images
    std: Tensor
    size: int  # pixels of a side
    num_classes: int
    device: torch.device
    amp: Any  # makes the autocast of forward passes
    ood: Resident | None = None  # real images of another domain

    def normalise(self, pixels: Tensor) -> Tensor:
        return (pixels - self.mean) / self.std

    def in_memory(self, images: Tensor) -> Resident:
        """images: (N, H, W, 3) bytes, without labels."""
        mean, std = (x.flatten().tolist() for x in (self.mean, self.std))
        targets = torch.zeros(len(images), dtype=torch.int64)
        data = Resident(images, targets, self.num_classes, mean, std, self.device)
        data.pad = 'zero'
        return data

    def pixels(self, x: Tensor) -> Tensor:
        return (x * self.std + self.mean).clamp(0, 1)


@dataclass
class Made:
    """A batch that is being made, and what a feed (dfkd_losses) may ask for."""

    source: 'Source'
    x: Tensor  # (N, 3, H, W), as the networks see it
    t: Any  # Feats of the teacher; the gradient passes
    target: Tensor | None = None  # the classes it is made for
    z: Tensor | None = None  # the noise it is made of
    images: Tensor | None = None  # before views and normalisation
    d_fake: Tensor | None = None  # what a discriminator says of x
    z_hat: Tensor | None = None  # what a decoder makes of x
    keep: Tensor | None = None  # what end() is handed of the best images

    @cached_property
    def s(self) -> Any:
        """Feats of the student; the gradient passes."""
        return self.source.student(self.x)

    @property
    def weights(self) -> dict[str, float]:
        return self.source.weights

    @property
    def rng(self) -> torch.Generator:
        return self.source.rng

    @property
    def calls(self) -> int:
        return self.source.calls

    @property
    def warmup(self) -> int:
        return self.source.recipe.warmup

    def teacher(self, x: Tensor) -> Any:
        return self.source.teacher(x)

    def another_view(self) -> Tensor:
        """A random part of each image at full size, normalised."""
        return self.source.setting.normalise(resized_crop_and_flip(self.images, self.source.rng))


class Source:
    """What all have in common: the weighted sum of a row's terms, and its updates.

    Args:
        name, row, recipe, weights, options: of the method, as the flags make them.
        kd: the loss, built.
        net_t, net_s: the networks.
        setting: see Setting.
    """

    def __init__(
        self, name: str, row: Method, recipe: Recipe, weights: dict, options: dict, kd, net_t, net_s, setting
    ) -> None:
        self.row, self.recipe, self.weights, self.options = row, recipe, weights, options
        self.kd, self.net_t, self.net_s, self.setting = kd, net_t, net_s, setting
        self.rng = torch.Generator()
        self.calls, self.seconds = 0, 0.0
        self.rate = 1.0  # factor on its learning rates
        self.meter = Meter(f'{name}, its images', 0, setting.device)
        self.parts: dict[str, Any] = {'kd': kd}  # what has state
        self.last: Tensor | None = None  # some new images, as the networks see them
        self.said: Any = None  # the teacher's Feats of them, where they are known

    # what the three kinds do their own way
    def make(self) -> None:
        """Some updates of the images' source."""
        raise NotImplementedError

    def sample(self) -> Tensor:
        """A batch for the student."""
        raise NotImplementedError

    def show(self, n: int) -> Tensor:
        """n images in 0..1, the same whenever it is asked for them; nothing else changes."""
        raise NotImplementedError

    def begin_epoch(self, seed: int, epoch: int) -> None:
        self.rng.manual_seed(seed * 1_000_003 + epoch)
        self.meter = Meter(self.meter.name, epoch, self.setting.device)
        self.seconds = 0.0

    def synthesize(self) -> None:
        start = time.perf_counter()
        self.calls += 1
        with frozen(self.net_s, self.row.needs.student == 'train'):
            self.make()
        self.seconds += time.perf_counter() - start

    @torch.no_grad()
    def says(self, x: Tensor) -> InFloat32:
        """The teacher on a batch for the student."""
        return self.said if x is self.last and self.said else self.teacher(x)

    def teacher(self, x: Tensor) -> InFloat32:
        with self.setting.amp():
            return InFloat32(self.net_t(x, True))

    def student(self, x: Tensor) -> InFloat32:
        with self.setting.amp():
            return InFloat32(self.net_s(x, True))

    def network(self, net: nn.Module) -> nn.Module:
        """A generator or a judge, where it works and in the layout that convolutions are fastest in."""
        return net.to(self.setting.device, memory_format=torch.channels_last)

    def noise(self, n: int) -> Tensor:
        return torch.randn(n, self.recipe.nz, generator=self.rng).to(self.setting.device)

    def normalised(self, images: Tensor, generator: nn.Module) -> Tensor:
        x = self.setting.normalise(images) if generator.pixels else images
        return x.contiguous(memory_format=torch.channels_last)

    def adam(self, groups, lr: float, betas: tuple = ()) -> torch.optim.Adam:
        opt = adam(groups, lr, betas=betas or self.recipe.betas)
        for group in opt.param_groups:
            group['full'] = group['lr']
        return opt

    def loss(self, made: Made) -> tuple[Tensor, dict[str, Tensor]]:
        terms = self.row.feed(self.kd, made)
        return sum(self.weights[name] * term for name, term in terms.items() if self.weights[name]), terms

    def descend(self, loss: Tensor, opts: list[torch.optim.Optimizer], between=None) -> bool:
        """An update; whether the loss was finite. between: done with the gradients, before the step."""
        if not self.meter.guard(loss, opts[0]):
            return False
        for opt in opts:
            opt.zero_grad()
        loss.backward()
        if between:
            between()
        for opt in opts:
            opt.found_inf = getattr(opts[0], 'found_inf', None)
            self.step(opt)
        return True

    def step(self, opt: torch.optim.Optimizer) -> None:
        """With the rate of now, and gradients no longer than the recipe says."""
        for group in opt.param_groups:
            group['lr'] = group['full'] * self.rate
        if self.recipe.clip:
            nn.utils.clip_grad_norm_([p for g in opt.param_groups for p in g['params']], self.recipe.clip)
        opt.step()

    @torch.no_grad()
    def facts(self) -> dict:
        """Columns of an epoch's row: what the teacher says of new images, and the cost of making them."""
        probabilities = self.teacher(self.last).out.softmax(dim=1)
        counts = probabilities.argmax(dim=1).bincount(minlength=probabilities.shape[1])
        return {
            'confidence': float(probabilities.amax(dim=1).mean()),
            'classes': '/'.join(map(str, counts.tolist())),
            'seconds_synth': self.seconds,
        }

    def state_dict(self) -> dict:
        return {'calls': self.calls, **{name: part.state_dict() for name, part in self.parts.items()}}

    def load_state_dict(self, state: dict) -> None:
        self.calls = state['calls']
        for name, part in self.parts.items():
            part.load_state_dict(state[name])


@contextlib.contextmanager
def frozen(net: nn.Module, train: bool):
    """The student while images are made: only its running statistics change, in training mode."""
    net.train(train).requires_grad_(False)
    try:
        yield
    finally:
        net.train().requires_grad_(True)
