"""A student of train_lm.py, and what it is fed; lm_setting.py has what all share, lm_networks.py networks."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from engine.lm_setting import NEW, PASSES, PROMPT, ROUND, Setting, StepTexts, Texts, draw
from engine.meter import Meter
from engine.processes import joined, mine, processes, rank
from engine.record import Record
from kd_losses.distillm import SampleSchedule
from methods import Method
from models import lm


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
    setting: Setting
    lmbda: float | str
    generator: torch.Generator
    record: Record = None
    memory: Memory = field(default_factory=Memory)

    def __post_init__(self) -> None:
        self.generator.manual_seed(self.setting.seed)
        self.schedule = SampleSchedule()

    def remember(self) -> None:
        """What is no tensor of the memory yet; before a checkpoint."""
        self.memory['generator'] = self.generator.get_state()
        self.memory['schedule'] = self.schedule.state_dict()

    def recall(self) -> None:
        """After one was loaded."""
        if len(self.memory['generator']) == len(self.generator.get_state()):
            self.generator.set_state(self.memory['generator'])
        else:  # of another kind of device, whose numbers are others anyway
            self.generator.manual_seed(self.setting.seed * 1_000_003 + self.record.epoch)
        self.schedule.load_state_dict(self.memory['schedule'])
        for key, value in self.memory.items():
            if isinstance(value, Tensor) and key != 'generator':
                self.memory[key] = value.to(self.setting.device)

    def look(self, x: Tensor) -> lm.Tokens:
        with self.setting.amp():
            return self.net(x, True)

    def sampled(self, prompts: Tensor, n: int = NEW, **mixture) -> Tensor:
        """Continuations; the generator moves as in a process that continues the prompts of all."""
        return lm.sample(self.net, prompts, n, self.generator, shard=(rank(), processes()), **mixture)

    def data(self, seen: StepTexts) -> tuple[StepTexts | Texts, bool]:
        """The step's text, or one of the student's own, and whether it is that."""
        if not self.lmbda or not self.weight:  # of its own texts it would learn nothing
            return seen, False
        u = torch.rand((), generator=self.generator, device=self.generator.device).item()
        buffer = self.memory.get(
            'buffer', torch.zeros(0, PROMPT + NEW, dtype=torch.int64, device=seen.x.device)
        )
        if self.lmbda == 'adaptive':
            source = self.schedule.source(u, seen.step / self.setting.steps, len(buffer))
        else:
            source = 'student' if u < self.lmbda else 'data'
        if source == 'data':
            return seen, False
        if source == 'student':
            whole = self.sampled(seen.x[:, :PROMPT])
            if self.lmbda == 'adaptive':
                self.memory['buffer'] = torch.cat([buffer, joined(whole)])[-self.schedule.capacity :]
        else:
            rows = torch.randint(len(buffer), (seen.all,), generator=self.generator, device=buffer.device)
            whole = buffer[mine(rows)]
        return seen.texts(whole), True


@dataclass
class Rollouts:
    """Answers to N prompts that student and teacher wrote together, and their rewards, (N, L) each."""

    x: Tensor  # prompt and answer, without the last token
    tokens: Tensor
    t: Any  # what the teacher says of x
    logp_old: Tensor
    reward: Tensor
    weight: Tensor


@dataclass
class Probe:
    """What a loss may be built from: what student and teacher say of one batch."""

    s: Any
    t: Any
    steps: int
    second: Texts | None  # the batch in the second vocabulary, with the teacher that speaks it


class Batch:
    """What a feed may ask for besides Tokens of student and teacher."""

    def __init__(self, run: Run, seen: StepTexts, data: StepTexts | Texts) -> None:
        self.run, self.seen = run, seen
        self.x, self.target = data.x, data.target
        self.net_s, self.net_t, self.student = run.net, run.setting.net_t, run.look
        self.progress = seen.step / run.setting.steps

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

    def rollouts(self, score: Callable, mix: float = 0.2) -> Rollouts:
        """A part of this round's answers, which student and teacher wrote together; score: their rewards."""
        run, setting, kept, n = self.run, self.run.setting, self.run.memory, self.seen.all
        place = self.seen.step % (PASSES * ROUND)
        if place == 0 or 'order' not in kept:
            prompts = mine(setting.text.windows(ROUND * n, draw(3, setting.seed, self.seen.step)))[:, :PROMPT]
            whole = run.sampled(prompts.to(setting.device), PROMPT, other=setting.net_t, mix=mix)
            tokens = whole[:, PROMPT:]
            with torch.no_grad():
                outs = [
                    setting.look(net, whole[:, :-1]).out[:, PROMPT - 1 :] for net in (run.net, setting.net_t)
                ]
            scores = score(*outs, tokens, torch.ones_like(tokens), mix=mix)
            round_of_all = zip(('whole', 'logp_old', 'reward', 'weight'), map(joined, (whole, *scores)))
            kept |= dict(round_of_all)
            orders = [
                torch.randperm(ROUND * n, generator=draw(6, setting.seed, self.seen.step + i))
                for i in range(PASSES)
            ]
            kept['order'] = torch.cat(orders).to(setting.device)
        rows = mine(kept['order'][place * n : (place + 1) * n])
        x = kept['whole'][rows, :-1]
        scores = {key: kept[key][rows] for key in ('logp_old', 'reward', 'weight')}
        return Rollouts(x, kept['whole'][rows, PROMPT:], setting.look(setting.net_t, x), **scores)


def student_of(setting: Setting) -> nn.Module:
    """A copy of the weights that all start from, which learns."""
    return copy.deepcopy(setting.start).train().requires_grad_(True)
