"""Trained networks as sources of a transfer: which files, trained on what, what they say of images."""

import glob
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

import dataset
import models
from engine.errors import UserError, user_errors

HELP = (
    'files of weights: FILE of ours, with its results.json beside it; NETWORK=FILE, or NETWORK=FILE@DATA for '
    "images that are normalised as those of DATA; patterns in quotes, 'save/*/net.pt'; or NAME.json, a list "
    'of {"file", "net", and if you like "name", "data", "classes", "trained_on", "url"}'
)


@dataclass
class Source:
    """A file of weights and what is known about it."""

    file: Path
    net: str  # the architecture
    name: str
    data: str  # whose mean and std its images have
    trained_on: str | None = None  # for colours: data and classes
    classes: list[int] | None = None  # of its data; None: all, or unknown
    seed: int | None = None
    url: str | None = None
    known: bool = False  # whether data and classes are what it was trained on
    images: str | None = None  # digest of the user's own images that it was trained on
    scale: tuple | None = None  # (mean, std) of its images, where the name of the data does not say them
    headless: bool = False  # whether its file has no classifier: load draws one, whose logits say nothing

    def facts(self) -> dict:
        told = {'name': self.name, 'net': self.net, 'file': str(self.file), 'trained_on': self.trained_on}
        return told | {'data': self.data, 'classes': self.classes, 'seed': self.seed, 'url': self.url}

    def of(self, data: str, images: str | None) -> bool | None:
        """Whether it was trained on this data; None if that is not known. images: own ones' digest."""
        if not self.known:
            return None
        if self.data.partition(':')[0] != data.partition(':')[0]:
            return False
        if not dataset.owned(data):
            return True
        return None if None in (images, self.images) else images == self.images

    def saw(self, data: str, classes: Sequence[int] | None, images: str | None = None) -> bool | None:
        """Whether it was trained on any of these classes; None if that is not known."""
        if not (same := self.of(data, images)):
            return same
        return self.classes is None or classes is None or bool(set(self.classes) & set(classes))

    def load(self, device: torch.device) -> nn.Module:
        """The network with its own classifier if it has one, frozen, in evaluation mode."""
        with user_errors():
            number = models.num_classes_in(models.build(self.net, 10), self.file)
            net = models.build_for(self.file, self.net, number or 10)
            self.headless = number is None
            models.load_weights(net, self.file, new_head=self.headless)
        net.requires_grad_(False).to(device, memory_format=torch.channels_last)
        return net.eval()

    def seen_by(self, img: Tensor, data: str, scale: tuple | None = None) -> Tensor:
        """Images that are normalised as those of `data`, with this mean and std, as the network wants."""
        if data == self.data and not (scale and self.scale):
            return img
        with user_errors():
            theirs, ours = scale or dataset.mean_std(data), self.scale or dataset.mean_std(self.data)
        if theirs == ours:
            return img
        (m, s), (mean, std) = (
            (torch.tensor(x, device=img.device)[:, None, None] for x in y) for y in (theirs, ours)
        )
        return (img * s + m - mean) / std


def read_sources(words: Sequence[str], data: str) -> list[Source]:
    """The networks of a command line, in order; data: whose normalisation those have that do not say."""
    found = []
    for word in words:
        if word.endswith('.json'):
            found += _listed(Path(word), data)
            continue
        if Path(word).is_file():  # whatever its name holds
            found.append(_source({'file': word}, data))
            continue
        net, equals, rest = word.partition('=')
        net, rest = (net, rest) if equals else (None, word)
        rest, at, own = rest.partition('@')
        files = sorted(glob.glob(rest)) if set(rest) & set('*?[') else [rest]
        if not files:
            raise UserError(f'{rest}: no file has such a name')
        for file in files:
            told = {'file': file} | ({'net': net} if net else {}) | ({'data': own} if at else {})
            found.append(_source(told, data))
    names = [s.name for s in found]
    for s in found:  # two of one name: say where they are
        s.name = str(s.file) if names.count(s.name) > 1 else s.name
    return found


def _listed(path: Path, data: str) -> list[Source]:
    try:
        told = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f'{path}: cannot be read as JSON ({error})') from None
    dicts = isinstance(told, list) and all(isinstance(x, dict) for x in told)
    if not dicts or not all(isinstance(x.get('file'), str) for x in told):
        raise UserError(f'{path}: wanted a list of {{"file": ..., "net": ...}}')
    for x in told:
        if isinstance(x.get('classes'), str):  # as flags have them
            with user_errors():
                x['classes'] = dataset.read_classes(x['classes'], 1_000_000)
    return [_source(x | {'file': path.parent / x['file']}, data) for x in told]


def _source(told: dict, data: str) -> Source:
    file = Path(told['file'])
    if not file.is_file():
        raise UserError(f'{file}: no such checkpoint file')
    beside = file.with_name('results.json')
    ours = {}
    if 'net' not in told or beside.exists():
        try:
            results = json.loads(beside.read_text())
            ours = {'net': results['student'], 'data': results['data'], 'seed': results.get('seed')}
            ours |= {'classes': results.get('classes'), 'name': file.parent.name, 'known': True}
            recipe = results.get('recipe', {})
            scale = recipe.get('own_scale')
            own = {'images': recipe.get('own_images'), 'scale': scale and tuple(map(tuple, scale))}
            ours |= own if told.get('data', ours['data']) == ours['data'] else {}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            if 'net' not in told:
                said = 'no results.json beside it says which network it is: write NETWORK=FILE'
                raise UserError(f'{file}: {said}') from None
    told = {'name': file.stem, 'data': data} | ours | told
    if 'trained_on' not in told and (told.get('known') or 'classes' in told):
        classes = told.get('classes')
        parts = [told['data'].partition(':')[0], (told.get('images') or '')[:6]]
        told['trained_on'] = ' '.join(filter(None, [*parts, written(classes or ())]))
    kept = {key: value for key, value in told.items() if key in Source.__dataclass_fields__}
    return Source(**(kept | {'file': file}))


def written(classes: Sequence[int]) -> str:
    """[0, 1, 2, 7] -> '0-2,7', what dataset.read_classes reads."""
    runs = []
    for c in classes:
        if runs and c == runs[-1][1] + 1:
            runs[-1][1] = c
        else:
            runs.append([c, c])
    return ','.join(str(a) if a == b else f'{a},{b}' if b == a + 1 else f'{a}-{b}' for a, b in runs)


def some(data, number: int | None, seed: int):
    """At most so many images of a data set, drawn by seed."""
    if number is None or number >= len(data):
        return data
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))[:number]
    return data.subset(order.sort().values.to(data.device))


@dataclass
class Seen:
    """What a network says of images: logits (N, K), embeddings (N, D), labels (N,)."""

    out: Tensor
    feat: Tensor
    target: Tensor
    extra: dict = field(default_factory=dict)


@torch.no_grad()
def look(net: nn.Module, source: Source, data, name: str, amp: Callable) -> Seen:
    """All images of a set, as they are. name: of the data set."""
    parts = []
    for img, target, _ in data.test_batches(250):
        with amp():
            f = net(source.seen_by(img, name, (data.mean, data.std)), True)
        parts.append((f.out.float(), f.feat.float().flatten(1), target))
    return Seen(*(torch.cat(x) for x in zip(*parts)))


def probe_images(data) -> Tensor:
    """All images of a (small) set in one tensor."""
    return torch.cat([img for img, _, _ in data.test_batches(250)])
