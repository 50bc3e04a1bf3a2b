"""What train_lm.py is made of besides its loop: texts of a step, and students; networks: lm_networks.py."""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dataset.text import Pairs, Text
from engine.errors import user_errors
from engine.meter import Meter
from engine.record import Record, fingerprint, save_checkpoint
from kd_losses.distillm import SampleSchedule
from methods import Method
from models import lm
from models.checkpoint import read_checkpoint

BATCH, PROMPT, NEW = 12, 32, 33  # texts of a step; symbols of a prompt, and of what continues it
WARM_UP, LEAST = 50, 0.05  # steps until the whole learning rate; the share of it that is left at the end
WRITTEN, PROMPTS = 2000, 96  # texts that teacher and student write before a training; prompts of gen_nll
ROUND, PASSES = 96, 4  # minillm: answers of a round, passes over them
TEACHER_LR, MAPS_LR = 3e-3, 1e-3  # of teachers and warm start; of the linear maps of dskd


def draw(kind: int, seed: int, step: int = 0) -> torch.Generator:
    """The numbers of one step of one kind, whatever was drawn before."""
    return torch.Generator().manual_seed(((seed * 1_000_003 + kind) * 1_000_003 + step) % 2**63)


def share_of_rate(step: int, steps: int) -> float:
    """Linearly up, then half a cosine down."""
    return min(1, (step + 1) / WARM_UP) * (LEAST + (1 - LEAST) * (1 + math.cos(math.pi * step / steps)) / 2)


def adamw(groups: list[dict], device: torch.device) -> torch.optim.AdamW:
    """groups: {'params': ..., 'base': its highest learning rate}."""
    return torch.optim.AdamW(
        groups, lr=0.0, betas=(0.9, 0.99), weight_decay=0.01, fused=True if device.type == 'cuda' else None
    )


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


# ------------------------------------------------------------------------------------ what all students share


@dataclass
class World:
    """The text, the teachers, the weights that students start from, and what was written with them."""

    text: Text
    device: torch.device
    amp: Callable
    seed: int
    steps: int
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
        path = self.root / f'lm_written_{"_".join(map(fingerprint, nets.values()))}_s{self.seed}.pt'
        if path.exists():
            with user_errors():
                return {who: whole.to(self.device) for who, whole in read_checkpoint(path).items()}
        prompts = self.text.windows(WRITTEN, draw(4, self.seed))[:, :PROMPT].to(self.device)
        generator = torch.Generator(self.device)
        made = {}
        for who, net in nets.items():
            generator.manual_seed(self.seed)
            made[who] = torch.cat([lm.sample(net, part, NEW, generator) for part in prompts.split(250)])
        save_checkpoint(path, made)
        return made

    @cached_property
    def exam(self) -> SimpleNamespace:
        """The held-out windows, what the teacher says of them, and the prompts that students continue."""
        x, target = self.asked(self.text.held_out())
        out_t = torch.cat([self.look(self.net_t, part).out.float() for part in x.split(128)])
        chosen = torch.randperm(len(x), generator=draw(5, 0))[:PROMPTS]
        return SimpleNamespace(x=x, target=target, out_t=out_t, prompts=x[chosen.to(x.device), :PROMPT])


class Look:
    """The texts of one step, the same for every student; what the teacher says of them is found out once."""

    def __init__(self, world: World, step: int) -> None:
        self.world, self.step = world, step
        self.windows = world.text.windows(BATCH, draw(1, world.seed, step))
        self.x, self.target = world.asked(self.windows)
        self.net = world.net_t

    @cached_property
    def t(self) -> lm.Tokens:
        return self.world.look(self.world.net_t, self.x)

    @cached_property
    def _rows(self) -> Tensor:
        return torch.randint(WRITTEN, (BATCH,), generator=draw(2, self.world.seed, self.step))

    def texts(self, whole: Tensor) -> Texts:
        x, target = continued(whole)
        return Texts(x, target, self.world.look(self.world.net_t, x), self.world.net_t)

    @cached_property
    def by_teacher(self) -> Texts:
        return self.texts(self.world.written['teacher'][self._rows])

    @cached_property
    def by_start(self) -> Texts:
        return self.texts(self.world.written['start'][self._rows])

    @cached_property
    def second(self) -> Texts:
        x, target = (part.to(self.x.device) for part in self.world.pairs.batch(self.windows))
        return Texts(x, target, self.world.look(self.world.net_pairs, x), self.world.net_pairs)


# ------------------------------------------------------------------------------------------------ one student


class Memory(dict):
    """What a student keeps from step to step, as a part of its checkpoint."""

    def state_dict(self) -> dict:
        return dict(self)

    def load_state_dict(self, state: dict) -> None:
        self.clear()
        self.update(state)


@dataclass
class Run:
    """One student in training: everything that belongs to it and to no other."""

    name: str
    method: Method
    kd: nn.Module
    weight: float
    ce: float
    net: nn.Module
    opt: torch.optim.Optimizer
    meter: Meter
    world: World
    lmbda: float | str
    generator: torch.Generator
    record: Record = None
    memory: Memory = field(default_factory=Memory)

    def __post_init__(self) -> None:
        self.generator.manual_seed(self.world.seed)
        self.schedule = SampleSchedule()

    def remember(self) -> None:
        """What is no tensor of the memory yet; before a checkpoint."""
        self.memory['generator'] = self.generator.get_state()
        self.memory['schedule'] = self.schedule.state_dict()

    def recall(self) -> None:
        """After one was loaded."""
        self.generator.set_state(self.memory['generator'])
        self.schedule.load_state_dict(self.memory['schedule'])
        for key, value in self.memory.items():
            if isinstance(value, Tensor) and key != 'generator':
                self.memory[key] = value.to(self.world.device)

    def look(self, x: Tensor) -> lm.Tokens:
        with self.world.amp():
            return self.net(x, True)

    def sampled(self, prompts: Tensor, n: int = NEW, **mixture) -> Tensor:
        return lm.sample(self.net, prompts, n, self.generator, **mixture)

    def data(self, seen: Look) -> tuple[Look | Texts, bool]:
        """The step's text, or one of the student's own, and whether it is that."""
        if not self.lmbda:
            return seen, False
        u = torch.rand((), generator=self.generator, device=self.generator.device).item()
        buffer = self.memory.get(
            'buffer', torch.zeros(0, PROMPT + NEW, dtype=torch.int64, device=seen.x.device)
        )
        if self.lmbda == 'adaptive':
            source = self.schedule.source(u, seen.step / self.world.steps, len(buffer))
        else:
            source = 'student' if u < self.lmbda else 'data'
        if source == 'data':
            return seen, False
        if source == 'student':
            whole = self.sampled(seen.x[:, :PROMPT])
            if self.lmbda == 'adaptive':
                self.memory['buffer'] = torch.cat([buffer, whole])[-self.schedule.capacity :]
        else:
            rows = torch.randint(len(buffer), (BATCH,), generator=self.generator, device=buffer.device)
            whole = buffer[rows]
        return seen.texts(whole), True


class Batch:
    """What a feed may ask for besides Tokens of student and teacher."""

    def __init__(self, run: Run, seen: Look, data: Look | Texts) -> None:
        self.run, self.seen = run, seen
        self.x, self.target = data.x, data.target
        self.net_s, self.net_t, self.student = run.net, run.world.net_t, run.look
        self.progress = seen.step / run.world.steps

    def written(self) -> Texts:
        """Some of what the teacher wrote before the training."""
        return self.seen.by_teacher

    def written_by_start(self) -> Texts:
        """What the student, before its training, wrote after the same prompts."""
        return self.seen.by_start

    def sampled(self, x: Tensor) -> Texts:
        """What the student writes now after the prompts of these texts."""
        return self.seen.texts(self.run.sampled(x[:, :PROMPT]))

    def second(self) -> Texts:
        """The same windows in the second vocabulary, with the teacher that speaks it."""
        return self.seen.second

    def rollouts(self, score: Callable, mix: float = 0.2) -> SimpleNamespace:
        """A part of this round's answers, which student and teacher wrote together; score: their rewards."""
        run, world, kept = self.run, self.run.world, self.run.memory
        batches = ROUND // BATCH
        place = self.seen.step % (PASSES * batches)
        if place == 0 or 'order' not in kept:
            prompts = world.text.windows(ROUND, draw(3, world.seed, self.seen.step))[:, :PROMPT]
            whole = run.sampled(prompts.to(world.device), PROMPT, other=world.net_t, mix=mix)
            tokens = whole[:, PROMPT:]
            with torch.no_grad():
                outs = [world.look(net, whole[:, :-1]).out[:, PROMPT - 1 :] for net in (run.net, world.net_t)]
            scores = score(*outs, tokens, torch.ones_like(tokens), mix=mix)
            kept |= {'whole': whole} | dict(zip(('logp_old', 'reward', 'weight'), scores))
            orders = [
                torch.randperm(ROUND, generator=draw(6, world.seed, self.seen.step + i))
                for i in range(PASSES)
            ]
            kept['order'] = torch.cat(orders).to(world.device)
        rows = kept['order'][place * BATCH : (place + 1) * BATCH]
        x = kept['whole'][rows, :-1]
        scores = {key: kept[key][rows] for key in ('logp_old', 'reward', 'weight')}
        return SimpleNamespace(
            x=x, tokens=kept['whole'][rows, PROMPT:], t=world.look(world.net_t, x), **scores
        )


def student_of(world: World) -> nn.Module:
    """A copy of the weights that all start from, which learns."""
    return copy.deepcopy(world.start).train().requires_grad_(True)
