"""What train_dense.py is made of besides its loop and its tasks: the pictures of a step, and students."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from engine.dense_tasks import Given, Setting
from engine.meter import Meter
from engine.processes import rank, same_buffers
from engine.record import Record
from methods.dense import Dense
from models.dense import Detected

# ------------------------------------------------------------------------------------ what all students share


class StepPictures:
    """The pictures of one step, the same for every student; what the teacher says of them, once."""

    def __init__(self, setting: Setting, step: int, parts: dict | None = None) -> None:
        self.setting, self.step = setting, step
        self.parts = setting.batches[step] if parts is None else parts
        self.generator = torch.Generator(setting.device)
        self._given, self._teacher = {}, {}

    def part(self, method: Dense) -> str:
        """Which pictures a loss is fed: those without labels where there are some and it can do with them."""
        return 'labelled' if method.labels or 'unlabelled' not in self.parts else 'unlabelled'

    @property
    def number(self) -> int:
        process = 7 + 7919 * rank()  # samplers and dropout draw other numbers in each
        return ((self.setting.seed * 1_000_003 + process) * 1_000_003 + self.step) % 2**63

    def seed(self) -> None:
        """For all that draws in a student's step, torchvision's samplers, say: a function of the step."""
        torch.manual_seed(self.number)
        self.generator.manual_seed(self.number)

    def given(self, part: str) -> Given:
        if part not in self._given:
            with torch.random.fork_rng(devices=[]):  # once for all students: it must not move what they draw
                torch.default_generator.manual_seed(self.number)  # CUDA's would not come back
                self._given[part] = self.setting.task.given(*self.parts[part])
        return self._given[part]

    def teacher(self, part: str):
        if part not in self._teacher:
            given = self.given(part)
            with torch.no_grad():
                self._teacher[part] = self.setting.task.look(self.setting.net_t, given)
        return self._teacher[part]

    def heard(self) -> list[Tensor]:
        """What the teacher has said in this step: logits, or the maps of a detector."""
        said = self._teacher.values()
        return [x for t in said for x in (t.fms if isinstance(t, Detected) else [t.out])]


class Batch:
    """What a feed may ask for besides the two networks' maps."""

    def __init__(self, seen: StepPictures, part: str) -> None:
        self.given, self.generator = seen.given(part), seen.generator

    @property
    def target(self) -> Tensor:
        """Classes of pixels (N, H, W), -1 where there is none."""
        return self.given.target

    @property
    def boxes(self) -> list[Tensor]:
        """Per picture (M, 4), in pixels of the padded batch."""
        return [target['boxes'] for target in self.given.target]

    @property
    def image_size(self) -> tuple[int, int]:
        """Of the padded batch."""
        return tuple(self.given.x.tensors.shape[2:])


# ------------------------------------------------------------------------------------------------ one student


@dataclass
class Probe:
    """What a loss may be built from: what student and teacher say of a few images, and sizes."""

    s: Any
    t: Any
    num_classes: int
    pictures: int  # of the training set


@dataclass
class Term:
    """A method of a student."""

    name: str
    method: Dense
    kd: nn.Module
    weight: float


@dataclass
class Run:
    """One student in training: everything that belongs to it and to no other."""

    name: str
    terms: list[Term]
    net: nn.Module
    opt: torch.optim.Optimizer
    meter: Meter
    setting: Setting
    record: Record = None

    @cached_property
    def parameters(self) -> list[nn.Parameter]:
        return [p for group in self.opt.param_groups for p in group['params']]

    def train(self, mode: bool) -> None:
        """At its end, also for the checkpoint, all processes have the batch norm statistics of the first."""
        for module in (self.net, *(term.kd for term in self.terms)):
            module.train(mode)
            if not mode:
                same_buffers(module)
