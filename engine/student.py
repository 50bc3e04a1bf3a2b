"""A student: its network with its losses, and everything else that belongs to it and to no other."""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dataset.labels import NO_LABEL, labelled_cross_entropy
from engine import optimise
from engine.batch import Batch, InFloat32, Probe
from engine.meter import Meter
from engine.processes import processes, summed
from engine.record import Record
from engine.side_by_side import cast_weights
from engine.stages import Stages, default_of
from methods import Method


@dataclass
class Term:
    """One method of a student."""

    name: str
    method: Method
    weight: float
    options: dict
    ramp: Callable[[int, int], float] | None = None
    stages: Stages | None = None  # that it compares; None: the row's
    loss: nn.Module | None = None

    def __post_init__(self) -> None:
        self.stages = self.stages or default_of(self.method)

    def build(self, probe: Probe) -> None:
        self.loss = self.stages.build(self.name, self.method, probe, self.options)

    @property
    def recipe(self) -> list:
        """Name, weight and arguments, and the stages if they are not the row's."""
        other = [] if self.stages == default_of(self.method) else [str(self.stages)]
        return [self.name, self.weight, self.options, *other]


class Student(nn.Module):
    """A network with its losses: one training step is one forward pass of this module.

    Args:
        net: the network.
        terms: the methods it learns with.
        ce: weight of cross-entropy; None: what the methods say.
        amp: makes the autocast of its forward passes.
        gather: joins the batches of all processes, for --global_relations.
        cast: the precision into which weights are cast all at once, see --cuda_graphs; None: one by one.
        stop: epochs of the training after which cross-entropy alone goes on, see --kd_stop; None: none.
    """

    def __init__(
        self, net: nn.Module, terms: list[Term], amp, ce=None, gather=None, cast=None, stop=None
    ) -> None:
        super().__init__()
        self.net, self.losses = net, nn.ModuleList(term.loss for term in terms)
        self.terms, self.amp, self.ce, self.gather, self.cast = terms, amp, ce, gather, cast
        self.stop = stop
        self.all_labelled = True  # no target is -100

    def forward(self, batch: Batch, weights: dict[str, float], inner: dict[str, float], phase: str):
        """Logits, and {'ce': cross-entropy, method: its loss, ...} for the methods that have a weight.

        inner: the value of each method's inner schedule.
        """
        t = batch.all_t[0] if batch.all_t else None
        if phase == 'pretrain':  # the losses' own modules learn, the student does not
            return None, {
                k.name: k.method.own.pretrain(k.loss, k.stages.of(t), batch)
                for k in self.terms
                if k.name in weights
            }

        if any(term.method.needs.image_gradient for term in self.terms):
            batch.img = batch.img.detach().requires_grad_()
        batch.net_s, batch.student = self.net, self.look_at
        batch.raw = self.raw(batch.img)
        s = InFloat32(batch.raw)
        losses = {} if phase == 'init' else {'ce': self.cross_entropy(s.out, batch.target)}
        for term in self.terms:
            if term.name not in weights:
                continue
            batch.from_teacher = batch.once.get(term.method.own.once_per_batch)
            batch.inner = inner.get(term.name)
            seen = (term.stages.of(s), term.stages.of(t), batch)
            if self.gather and term.method.needs.relations:
                seen = self.gather(*seen)
            losses[term.name] = term.method.feed(term.loss, *seen)
        return s.out, losses

    def cross_entropy(self, out: Tensor, target: Tensor) -> Tensor:
        if self.all_labelled:
            return F.cross_entropy(out, target)
        if processes() == 1:
            return labelled_cross_entropy(out, target)
        # gradients are averaged over processes, whose shares may hold few labels or none
        count = summed((target != NO_LABEL).sum()).clamp(min=1) / processes()
        return labelled_cross_entropy(out, target, count=count)

    def look_at(self, img: Tensor) -> InFloat32:
        """What the student says of further images."""
        return InFloat32(self.raw(img))

    def raw(self, img: Tensor):
        with self.amp():
            if self.cast:
                weights = cast_weights(self.net, self.cast, self.losses)
                return torch.func.functional_call(self.net, weights, (img, True))
            return self.net(img, True)

    def inner(self, epoch: int, epochs: int) -> dict[str, float]:
        """{method: the value of its inner schedule in this epoch}"""
        schedules = {term.name: term.method.when.inner for term in self.terms}
        return {name: schedule(max(epoch, 0), epochs) for name, schedule in schedules.items() if schedule}

    def weights(self, phase: str, epoch: int, epochs: int) -> dict[str, float]:
        """{'ce' or method: its weight in this epoch}, without the methods that rest."""
        if phase == 'pretrain':
            return {term.name: 1.0 for term in self.terms if term.method.when.pretrain}
        if phase == 'train' and self.stop is not None and epoch >= self.stop:
            return {'ce': 1.0}
        weights = {}
        if phase == 'train':
            ces = (term.method.when.ce for term in self.terms)
            own = math.prod(ce(epoch, epochs) if callable(ce) else ce for ce in ces)
            weights['ce'] = own if self.ce is None else self.ce
        for term in self.terms:
            factor = (
                term.ramp(epoch, epochs) if term.ramp and phase == 'train' else 1
            )  # epochs before are < 0
            # a loss that initialises rests afterwards; others rest while it works
            if (phase == 'init') == bool(term.method.when.alone) and term.weight * factor != 0:
                weights[term.name] = term.weight * factor
        return weights


@dataclass
class Run:
    """One student in training: everything that belongs to it and to no other."""

    name: str
    step: nn.Module  # a Student, or DistributedDataParallel around it
    terms: list[Term]
    net: nn.Module
    opt: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    generator: torch.Generator  # for losses that draw on the device
    record: Record
    meter: Meter
    before: tuple[int, int]  # epochs of pretraining and of initialisation
    batch_size: int
    epochs: int  # of the training proper
    inside: bool  # the phases before it are the first of the --epochs, see --phases
    counters: list[Tensor]  # counts of batches that are kept on the host, see --cuda_graphs
    rng: random.Random = None  # for losses that draw a choice
    draws: bool = False  # from torch's global generator, as dropout does: seeded before every step then
    seeds: random.Random = None  # for these steps
    phase: str = 'train'
    now: int = 0  # epochs of the training proper that lie behind; negative in the phases before
    weights: dict[str, float] = field(default_factory=dict)  # of cross-entropy and the methods, in this epoch
    inner: dict[str, float] = field(default_factory=dict)  # values of inner schedules in this epoch
    usual_only: str = ''  # why a CUDA graph cannot repeat its step
    reads_epoch: bool = False  # a loss asked for the epoch in the last usual step

    @property
    def first(self) -> int:
        """Its first epoch: 0, or less if phases come before the training."""
        return 0 if self.inside else -sum(self.before)

    @property
    def epoch(self) -> int:
        """The next epoch."""
        return self.record.epoch + self.first

    @property
    def generators(self) -> list[torch.Generator]:
        return [self.generator]

    def own(self, epoch: int) -> int:
        """Epochs of the training proper that an epoch has behind it; negative in the phases before."""
        return epoch - self.first - sum(self.before)

    def phase_of(self, epoch: int) -> str:
        own = self.own(epoch)
        return 'train' if own >= 0 else 'init' if own >= -self.before[1] else 'pretrain'

    def learning_rate(self, epoch: float, args) -> float:
        """epoch: with its fraction, as in optimise.learning_rate."""
        phase = self.phase_of(math.floor(epoch))
        if phase == 'train' or self.inside:
            return optimise.learning_rate(args, epoch) / (1 if phase == 'train' else 10)
        init = self.before[1]
        done = (math.floor(epoch) + init) / init if phase == 'init' else 0
        falls = sum(done >= share for share in (0.6, 0.8))  # Knowledge-Distillation-Zoo's
        return args.lr / 10 * args.lr_decay**falls

    def resting(self) -> list[str]:
        """What has no weight in any epoch of this training, because its schedule is for longer ones."""
        plans = [(term.name, term.ramp) for term in self.terms if term.weight and term.ramp]
        if getattr(self.step, 'module', self.step).ce is None:
            plans += [('ce', term.method.when.ce) for term in self.terms if callable(term.method.when.ce)]
        every = range(self.epochs)
        return [name for name, plan in plans if not any(plan(epoch, self.epochs) for epoch in every)]

    def decided(self) -> tuple:
        """What Python decides of a step: as long as it stays, a recording of the step holds."""
        rate = self.opt.param_groups[0]['lr']
        return (self.phase, *self.weights.items(), *self.inner.items(),
                None if isinstance(rate, Tensor) else rate,
                self.now if self.reads_epoch else None)  # fmt: skip
