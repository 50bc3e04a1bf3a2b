"""docs/pairs.md: every method on pairs of unlike networks: works, builds an adapter, or refuses."""

import copy
import functools
import random
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn
from torchvision.models import VisionTransformer

import models
import train_kd
from engine.batch import Probe
from engine.device import autocast
from engine.teachers import Teachers
from methods import METHODS
from models.hooks import Tap, tokens

# one difference at a time between resnet8 (16, 32, 64 channels at 32, 16, 8 pixels) and the teacher
PAIRS = {
    'channels': 'resnet8x4 teaches: four times the channels',
    'size': 'resnet8 on images of half the size teaches resnet8',
    'depth': 'resnet8 with one more map teaches resnet8',
    'networks': 'vgg8 teaches MobileNetV2: all of them at once',
    'transformer': 'a small vision transformer teaches resnet8',
}


class Shrunk(nn.Module):
    """A network that looks at its images at half the size: smaller maps, everything else the same."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x, feats=False):
        return self.net(nn.functional.avg_pool2d(x, 2), feats)

    def __getattr__(self, name):
        return super().__getattr__(name) if name in ('net', '_modules') else getattr(self.net, name)


class Deeper(Shrunk):
    """A network that hands out its first stage twice: one map more."""

    def forward(self, x, feats=False):
        f = self.net(x, feats)
        twice = [[maps[0], maps[1], *maps[1:]] for maps in (f.fms, f.pres)] if feats else []
        return f._replace(fms=twice[0], pres=twice[1]) if feats else f

    def after(self, k, fm):
        return self.net.after(max(k - 1, 0), fm)

    def bn_before_relu(self):
        bns = self.net.bn_before_relu()
        return [bns[0], *bns]


def transformer() -> Tap:
    net = VisionTransformer(
        image_size=32, patch_size=8, num_layers=3, num_heads=2, hidden_dim=32, mlp_dim=64, num_classes=10
    )
    nn.init.normal_(net.heads.head.weight)  # torchvision starts with zeros, and all logits would be equal
    layers = [f'encoder.layers.encoder_layer_{i}' for i in (0, 0, 1, 2)]
    return Tap(net, fms=layers, to_map=tokens)


@functools.cache
def pair(kind: str) -> tuple[nn.Module, nn.Module]:
    """(student, teacher), built once: who trains one of them copies it."""
    torch.manual_seed(0)
    student = models.build('MobileNetV2' if kind == 'networks' else 'resnet8', 10)
    teacher = {
        'channels': lambda: models.build('resnet8x4', 10),
        'size': lambda: Shrunk(models.build('resnet8', 10)),
        'depth': lambda: Deeper(models.build('resnet8', 10)),
        'networks': lambda: models.build('vgg8', 10),
        'transformer': transformer,
    }[kind]()
    return student, teacher.eval().requires_grad_(False)


def one_step(name: str, kind: str) -> tuple[str, str]:
    """('works', 'adapter' or 'refuses', what was said) of a forward and backward pass."""
    method = METHODS[name]
    net_s, net_t = copy.deepcopy(pair(kind))
    torch.manual_seed(1)
    n = 2
    img, target = torch.randn(n, 3, 32, 32), torch.arange(n) % 10
    amp = autocast(torch.device('cpu'), 'off')
    teachers = Teachers([net_t] * (2 if method.needs.all_teachers else 1), amp, [], img)
    teachers.prepare = {method.own.once_per_batch} - {None}
    views = {view: img for view in method.needs.views}
    options = {'quest': {'num_words': 8}, 'crd': {'nce_n': 8}, 'semckd': {'factor': 2}}.get(name, {})
    term = train_kd.Term(name, method, 1.0, options)
    try:
        seen = teachers(img, target, torch.arange(n), views)
        with torch.no_grad():
            s = net_s.eval()(img, True)
        probe = Probe(s, seen.all_t[0], net_s, net_t, Forty(img, target), n, 10, 10,
                      another_net=copy.deepcopy, all_t=seen.all_t)  # fmt: skip
        term.build(probe)
        net = method.own.student(net_s, term.loss, probe) if method.own.student else net_s
        step = train_kd.Student(net, [term], amp).train()
        if method.own.before:
            method.own.before(term.loss, teachers.teacher, probe)
        batch = replace(seen, now=5, epochs=10, generator=torch.Generator(), rng=random.Random(0))
        weights, inner = {'ce': 1.0, name: 1.0}, step.inner(5, 10)
        _, terms = step(batch, weights, inner, 'init' if method.when.alone else 'train')
        loss_kd = terms[name]
        (loss_kd + terms.get('ce', 0)).backward()
    except ValueError as error:
        return 'refuses', ' '.join(str(error).split())
    except (RuntimeError, TypeError) as error:  # a loss should refuse what does not fit
        return 'broken', f'{type(error).__name__}: {" ".join(str(error).split())}'
    if not torch.isfinite(loss_kd):
        return 'broken', f'loss {loss_kd}'
    # a single number that a loss learns, ctkd's temperature, adapts no network
    layers = any(p.requires_grad and p.dim() > 1 for p in term.loss.parameters())
    learns = layers or method.own.student is not None
    return ('adapter' if learns else 'works'), ''


class Forty:
    """What builders may ask of a training set."""

    targets = torch.arange(40) % 10
    mean, std = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)

    def __init__(self, img, target) -> None:
        self.img, self.target = img, target

    def __len__(self) -> int:
        return 40

    def steps(self, batch_size: int) -> int:
        return -(-len(self) // batch_size)

    def subset(self, index):
        return self

    def test_batches(self, size):
        yield self.img, self.target, None


TAUGHT = sorted(name for name, m in METHODS.items() if m.needs.teacher and not m.own.peers)

PAGE = """# Unlike pairs of networks

Written by `python -m report refresh`, which tries a training step of every method on every pair; a test tries
them again.

Stages are paired from the shallow end. Where a method compares maps position by position, the larger map is
averaged to the smaller one's size. Where it needs equal channels and has no adapter of its own, it refuses in
one line before training. *works*: as it is. *adapter*: with layers of the loss's own, or a changed student.

| the pair | what differs |
|---|---|
"""


def tried(name: str, kind: str) -> str:
    verdict, why = one_step(name, kind)
    if verdict == 'broken':
        raise ValueError(
            f'{name} on the pair {kind}: {why}; a ValueError of the loss would count as a refusal'
        )
    return verdict


def page(verdict: Callable[[str, str], str] = tried) -> str:
    """The text of docs/pairs.md; verdict: (method, pair) -> works, adapter or refuses."""
    torch.set_num_threads(1)  # small networks; several threads would wait for each other
    lines = [f'| `{kind}` | {what} |' for kind, what in PAIRS.items()]
    lines += ['', '| method | ' + ' | '.join(PAIRS) + ' |', '|---|' + '---|' * len(PAIRS)]
    lines += [f'| {name} | ' + ' | '.join(verdict(name, kind) for kind in PAIRS) + ' |' for name in TAUGHT]
    return PAGE + '\n'.join(lines) + '\n'


def verdicts(text: str) -> dict[str, list[str]]:
    """What a page says: {method: a verdict per pair}."""
    rows = [line for line in text.splitlines() if line.count('|') == len(PAIRS) + 2 and '---' not in line]
    cells = [[cell.strip() for cell in row.strip('|').split('|')] for row in rows]
    return {name: said for name, *said in cells if name != 'method'}
