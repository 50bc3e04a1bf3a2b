"""What all students of train_lm.py share: the text of a step, the teachers, what was written before."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dataset.text import Pairs, Text
from engine.errors import user_errors
from engine.optimise import adam
from engine.processes import mine, processes, rank
from engine.record import fingerprint, keep
from models import lm
from models.checkpoint import read_checkpoint

BATCH, PROMPT, NEW = 12, 32, 33  # texts of a step; symbols of a prompt, and of what continues it
CHUNK = 128  # held-out texts at a time
WARM_UP, LEAST = 50, 0.05  # steps until the whole learning rate; the share of it that is left at the end
WRITTEN, PROMPTS = 2000, 96  # texts that teacher and student write before a training; prompts of gen_nll
ROUND, PASSES = 8, 4  # minillm: a round's answers in batches, passes over them
TEACHER_LR, MAPS_LR = 3e-3, 1e-3  # of teachers and warm start; of the linear maps of dskd


def draw(kind: int, seed: int, step: int = 0) -> torch.Generator:
    """The numbers of one step of one kind, whatever was drawn before."""
    return torch.Generator().manual_seed(((seed * 1_000_003 + kind) * 1_000_003 + step) % 2**63)


def share_of_rate(step: int, steps: int) -> float:
    """Linearly up, then half a cosine down."""
    return min(1, (step + 1) / WARM_UP) * (LEAST + (1 - LEAST) * (1 + math.cos(math.pi * step / steps)) / 2)


def adamw(groups: list[dict]) -> torch.optim.AdamW:
    """groups: {'params': ..., 'base': its highest learning rate}."""
    return adam(groups, 0.0, torch.optim.AdamW, betas=(0.9, 0.99), weight_decay=0.01)


def set_rates(opt: torch.optim.Optimizer, share: float) -> None:
    for group in opt.param_groups:
        group['lr'] = share * group['base']


def cross_entropy(out: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(out.float().flatten(0, 1), target.flatten())


class Texts(NamedTuple):
    """Tokens read, tokens to be said (-100: not asked for), what a teacher says of them, which one."""

    x: Tensor
    target: Tensor
    t: Any = None
    net: Any = None


def continued(whole: Tensor, prompt: int = PROMPT) -> tuple[Tensor, Tensor]:
    """x and target of prompts with their continuations, of which alone something is asked."""
    target = whole[:, 1:].clone()
    target[:, : prompt - 1] = -100  # the prompt's last position predicts the first new symbol
    return whole[:, :-1], target


@dataclass
class Setting:
    """The text, the teachers, the weights that students start from, and what was written with them."""

    text: Text
    device: torch.device
    amp: Callable
    seed: int
    steps: int
    batch: int  # texts of a step, of each process
    root: Path  # for what other trainings may use again
    net_t: nn.Module
    start: nn.Module
    pairs: Pairs | None = None
    net_pairs: nn.Module | None = None

    @torch.no_grad()
    def look(self, net: nn.Module, x: Tensor) -> lm.Tokens:
        with self.amp():
            return net(x, True)

    def asked(self, whole: Tensor) -> tuple[Tensor, Tensor]:
        """x and target of whole windows."""
        whole = whole.to(self.device)
        target = whole[:, 1:].clone()
        target[:, : self.text.first] = -100
        return whole[:, :-1], target

    @cached_property
    def written(self) -> dict[str, Tensor]:
        """The same prompts continued by the teacher and by the student before training, kept in a file."""
        nets = {'teacher': self.net_t, 'start': self.start}
        made_of = '_'.join([self.text.digest, *map(fingerprint, nets.values())])  # the text has the prompts
        path = self.root / f'lm_written_{made_of}_s{self.seed}.pt'

        def make() -> dict[str, Tensor]:
            prompts = self.text.windows(WRITTEN, draw(4, self.seed))[:, :PROMPT].to(self.device)
            generator = torch.Generator(self.device)
            made = {}
            for who, net in nets.items():
                generator.manual_seed(self.seed)
                made[who] = torch.cat([lm.sample(net, part, NEW, generator) for part in prompts.split(250)])
            return made

        keep(path, make)
        with user_errors():
            return {who: whole.to(self.device) for who, whole in read_checkpoint(path).items()}

    @cached_property
    def exam(self) -> 'Exam':
        x, target = self.asked(self.text.held_out())
        parts = list(zip(x.split(CHUNK), target.split(CHUNK)))[rank() :: processes()]
        parts = [(x, target, self.look(self.net_t, x).out.float()) for x, target in parts]
        chosen = torch.randperm(len(x), generator=draw(5, 0))[:PROMPTS]
        return Exam(parts, target[:, self.text.first :].numel(), x[chosen.to(x.device), :PROMPT])


@dataclass
class Exam:
    """Held-out windows, what the teacher says of them, and the prompts that students continue."""

    parts: list[tuple[Tensor, Tensor, Tensor]]  # x, target, the teacher's logits: this process's share
    count: int  # symbols to be said, of all processes
    prompts: Tensor


class StepTexts:
    """The texts of one step, the same for every student; what the teacher says of them is found out once.

    Seed and step decide the texts of all processes; each has its part of them.
    """

    def __init__(self, setting: Setting, step: int) -> None:
        self.setting, self.step = setting, step
        self.all = setting.batch * processes()
        self.windows = mine(setting.text.windows(self.all, draw(1, setting.seed, step)))
        self.x, self.target = setting.asked(self.windows)
        self.net = setting.net_t

    @cached_property
    def t(self) -> lm.Tokens:
        return self.setting.look(self.setting.net_t, self.x)

    @cached_property
    def _rows(self) -> Tensor:
        return mine(torch.randint(WRITTEN, (self.all,), generator=draw(2, self.setting.seed, self.step)))

    def texts(self, whole: Tensor) -> Texts:
        x, target = continued(whole)
        return Texts(x, target, self.setting.look(self.setting.net_t, x), self.setting.net_t)

    @cached_property
    def by_teacher(self) -> Texts:
        return self.texts(self.setting.written['teacher'][self._rows])

    @cached_property
    def by_start(self) -> Texts:
        return self.texts(self.setting.written['start'][self._rows])

    @cached_property
    def second(self) -> Texts:
        x, target = (part.to(self.x.device) for part in self.setting.pairs.batch(self.windows))
        return Texts(x, target, self.setting.look(self.setting.net_pairs, x), self.setting.net_pairs)
