"""A student that learns from several teachers: what flows through its steps, and what belongs to it alone."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from engine.batch import as_float
from engine.errors import UserError
from engine.meter import Meter
from engine.record import Record
from ka_losses import ConcatKD
from methods.ka import Method


@dataclass
class Batch:
    """The images of a step and all that a feed (ka_losses) may ask for beside student and teachers.

    The first fields are the same for every student of a group; a student's own copy has the others, too.
    """

    img: Tensor  # (N, 3, H, W), normalised
    target: Any  # of the setting's labels; None for all rows that do not read them
    index: Tensor  # (N,), positions in the training set
    all_t: list  # what the teachers say of the images, see Setting.teachers_on

    update: str = 'all'  # which of the row's updates this is
    phase: int = 0  # of the setting's phases, from 0
    done: float = 0.0  # share of the whole training that lies behind
    layers: tuple[int, ...] = ()  # the stages that the loss attaches to
    blocks: list[Tensor] = ()  # of each teacher, where its classes are among the student's
    rng: random.Random | None = None  # for choices of the host
    soft: Callable | None = None  # (out_s, [out_t, ...]) -> soft targets at temperature 1
    supervised: Callable | None = None  # (s, target) -> the loss of the reference that reads labels


@dataclass
class Probe:
    """What a loss may be built from: what student and teachers say of a few images, and more."""

    s: Any
    all_t: list
    net_s: nn.Module
    layers: tuple[int, ...]
    tasks: tuple[str, ...]


@dataclass
class Moment:
    """Where in the training a step is."""

    phase: int
    done: float  # share of the whole training
    lr: dict[str, float]  # by the role of a group of parameters


@dataclass
class Term:
    """A row with what the flags make of it."""

    name: str
    method: Method
    weight: float  # of its loss
    soft: float  # of soft targets over all classes beside it
    options: dict  # of the loss's constructor


class Student(nn.Module):
    """A network with its loss: one update is one forward pass of this module.

    Args:
        net, ka: the network and the loss's module.
        term: the row and its weights.
        setting: how the network is called, and in which precision.
        T: temperature of the soft targets over all classes.
    """

    def __init__(self, net: nn.Module, ka: nn.Module, term: Term, setting, T: float) -> None:
        super().__init__()
        self.net, self.ka, self.term, self.setting, self.soft = net, ka, term, setting, ConcatKD(T=T)

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, and its terms without weights."""
        method, all_t = self.term.method, batch.all_t
        forward = method.own.forward or self.setting.forward
        with self.setting.amp():
            s = forward(self.net, batch)
        s = as_float(s)
        said = method.feed(self.ka, s, all_t, batch)
        if not isinstance(said, tuple) or len(said) != 2:
            raise UserError(
                f'{self.term.name}: a feed of an amalgamation returns (loss, its terms), terms a dict of '
                f'what to log, {{}} for nothing; got {type(said).__name__}'
            )
        loss, terms = said
        loss = self.term.weight * loss
        if self.term.soft and batch.update not in method.when.no_soft_targets_in:
            kd = self.soft(s.out, [t.out for t in all_t])
            loss, terms = loss + self.term.soft * kd, {'kd': kd, **terms}
        return loss, terms


@dataclass
class Run:
    """One student in training: everything that belongs to it and to no other."""

    name: str
    method: Method
    step: nn.Module  # a Student, or DistributedDataParallel around it
    net: nn.Module
    ka: nn.Module
    opts: dict[str, torch.optim.Optimizer]  # by update
    scaler: torch.amp.GradScaler
    record: Record
    layers: tuple[int, ...]
    meter: Meter
    draws: bool = False  # from torch's global generator, as dropout does: seeded before every step then
    rng: random.Random | None = None  # for losses that draw a choice
    seeds: random.Random | None = None  # for these steps
