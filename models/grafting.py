"""A teacher with parts of a student in the place of its own, and the student that such parts make together.

C. Shen, X. Wang, Y. Yin, J. Song, S. Luo, M. Song, "Progressive Network Grafting for Few-Shot Knowledge
Distillation", AAAI 2021, arXiv:2012.04915; tools/graft.py trains it, kd_losses/graftkd.py is its loss.

A network is a stem, stages and a head (pooling and classifier). A graft is a part of the student between 1x1
convolutions that lead from the teacher's width to the student's and back; the head has only the first. Where
grafts follow each other, two of these meet without anything between them and are merged into one.
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .resnet import ResNet
from .vgg import VGG


class Stage(nn.Module):
    """Blocks that return what stands before their ReLU, as those of our networks do; pooled at the end."""

    def __init__(self, blocks, pool: bool) -> None:
        super().__init__()
        self.blocks, self.pool = nn.ModuleList(blocks), pool

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = F.relu(block(x))
        return F.max_pool2d(x, 2) if self.pool else x


class Head(nn.Module):
    """Global average pooling and the classifier."""

    def __init__(self, fc: nn.Linear) -> None:
        super().__init__()
        self.fc = fc

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.mean(dim=(2, 3)))


def parts_of(net: nn.Module) -> nn.ModuleList:
    """[stem, stage 1, ..., head] of a resnet or vgg for images below 64 pixels; the layers are net's own.

    Raises:
        ValueError: another network.
    """
    if isinstance(net, ResNet):
        stages = [Stage([nn.Sequential(net.conv1, net.bn1)], False)]
        stages += [Stage(layer, False) for layer in (net.layer1, net.layer2, net.layer3)]
    elif isinstance(net, VGG):
        stages = [Stage([block], i < 3) for i, block in enumerate(net.feat_modules())]
    else:
        raise ValueError(f'grafting: net must be a resnet or vgg of CIFAR, got {type(net).__name__}')
    return nn.ModuleList([*stages, Head(net.classifier_layer())])


def widths_of(parts: nn.ModuleList, size: int = 32) -> list[tuple[int, int]]:
    """(channels, side) of what each part but the head gives for images of this size."""
    parts = copy.deepcopy(parts).eval()
    x, widths = torch.zeros(1, 3, size, size), []
    with torch.no_grad():
        for part in parts[:-1]:
            x = part(x)
            widths.append((x.shape[1], x.shape[2]))
    return widths


class Graft(nn.Module):
    """A part of the student where the teacher's was.

    Args:
        part: of the student.
        width_in, width_out: (teacher's, student's) channels before and after it; after the head there is
            nothing to change: None.
    """

    def __init__(self, part: nn.Module, width_in: tuple[int, int], width_out: tuple[int, int] | None) -> None:
        super().__init__()
        self.t2s = nn.Conv2d(*width_in, 1, bias=False)
        self.part = part
        self.s2t = None if width_out is None else nn.Conv2d(*width_out[::-1], 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.part(self.t2s(x))
        return x if self.s2t is None else self.s2t(x)

    def adapters(self) -> list[nn.Parameter]:
        return [conv.weight for conv in (self.t2s, self.s2t) if conv is not None]


class Grafted(nn.Module):
    """The frozen teacher with some parts replaced.

    Args:
        teacher, student: resnets or vggs of as many stages; the maps between the stages that are replaced
            have the same sizes. Both are used up: their layers are this network's.
        first: the first part that may be replaced; 2 keeps stem and stage 1 of the teacher.
        size: side of the images.

    Shape:
        x: (N, 3, H, W). Returns (N, K).

    `use(parts)` says which are replaced now: numbers from `first` on, the head's is the last.

    Raises:
        ValueError: networks that are not alike in this way; first is not the number of a stage.
    """

    def __init__(self, teacher: nn.Module, student: nn.Module, first: int = 2, size: int = 32) -> None:
        super().__init__()
        self.teacher, s_parts = parts_of(teacher), parts_of(student)
        stages = len(self.teacher) - 1
        if len(s_parts) != len(self.teacher):
            raise ValueError(
                f'grafting: student must have {stages} stages as the teacher has, got {len(s_parts) - 1}: '
                'networks of one family have'
            )
        if not 0 < first < stages:
            raise ValueError(f'grafting: first must be 1 to {stages - 1}, a stage, got {first}')
        widths_t, widths_s = widths_of(self.teacher, size), widths_of(s_parts, size)
        for (_, at), (_, bt) in zip(widths_t[first - 1 :], widths_s[first - 1 :]):
            if at != bt:
                raise ValueError(f'grafting: student must have maps of {at} pixels, got {bt}: another one')
        pairs = [(a, b) for (a, _), (b, _) in zip(widths_t, widths_s)]
        self.first = first
        self.grafts = nn.ModuleList(
            Graft(s_parts[k], pairs[k - 1], pairs[k] if k < stages else None)
            for k in range(first, stages + 1)
        )
        self.used: tuple[int, ...] = ()
        self.teacher.requires_grad_(False)

    @property
    def numbers(self) -> range:
        """Of the parts that may be replaced."""
        return range(self.first, len(self.teacher))

    def use(self, parts) -> 'Grafted':
        self.used = tuple(parts)
        return self.train(self.training)

    def train(self, mode: bool = True):
        """The teacher's layers always stay in evaluation mode, and so do grafts that are not in use."""
        super().train(mode)
        self.teacher.eval()
        for k, graft in zip(self.numbers, self.grafts):
            graft.train(mode and k in self.used)
        return self

    def forward(self, x: Tensor) -> Tensor:
        for k, part in enumerate(self.teacher):
            x = self.grafts[k - self.first](x) if k in self.used else part(x)
        return x

    def merged(self) -> nn.Sequential:
        """The student: what is kept of the teacher, then the grafts, with one convolution where two meet.

        A copy; gives what this network gives with all parts replaced.
        """
        self_ = copy.deepcopy(self)
        layers = [*self_.teacher[: self.first], self_.grafts[0].t2s]
        for graft, later in zip(self_.grafts, self_.grafts[1:]):
            both = nn.Conv2d(graft.s2t.in_channels, later.t2s.out_channels, 1, bias=False)
            with torch.no_grad():
                both.weight.copy_(
                    (later.t2s.weight.flatten(1) @ graft.s2t.weight.flatten(1))[..., None, None]
                )
            layers += [graft.part, both.to(graft.s2t.weight)]
        return nn.Sequential(*layers, self_.grafts[-1].part)
