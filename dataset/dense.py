"""Images with a label for every pixel, for three tasks at once: segmentation, depth, surface normals."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .labels import labelled_cross_entropy
from .views import count_steps, shares, view_seed

TASKS = ('seg', 'depth', 'normal')


class Dense:
    """Everything on one device.

    Args:
        images: (N, 3, H, W) float32 in 0..1.
        seg: (N, H, W), classes; negative: unknown, in no loss and no metric.
        depth: (N, 1, H, W) float32 in metres; 0: unknown.
        normal: (N, 3, H, W) float32 unit vectors in camera coordinates; zero: unknown.
        num_classes: of the segmentation.
        device: where everything is kept.

    Batches are (img, labels, index): img (B, 3, H, W) float32 minus 0.5, labels {'seg', 'depth', 'normal'}.
    """

    def __init__(self, images, seg, depth, normal, num_classes: int, device) -> None:
        self.images, self.device, self.num_classes = images.to(device), torch.device(device), num_classes
        self.labels = {'seg': seg.to(device).long(), 'depth': depth.to(device), 'normal': normal.to(device)}
        self.shard = (0, 1)  # this process, number of processes
        self.view = None  # for training, see dense_views.py; None: a batch is mirrored, or not

    def __len__(self) -> int:
        return len(self.images)

    def steps(self, batch_size: int) -> int:
        """Batches of an epoch."""
        return count_steps(len(self), batch_size, self.shard)

    def train_batches(self, batch_size: int, seed: int, epoch: int, views=()) -> Iterator[tuple]:
        """One shuffled epoch; a whole batch is mirrored, or not; or each image seen through self.view."""
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        order = torch.randperm(len(self), generator=generator).to(self.device)
        mirrored = torch.rand(self.steps(batch_size), generator=generator) < 0.5
        for index, mirror in zip(shares(order, batch_size, self.shard), mirrored):
            img, labels = self._take(index)
            if self.view:
                from .dense_views import seen_through

                seeds = [view_seed('dense', seed, epoch, i) for i in index.tolist()]
                img, labels = seen_through(self.view, seeds, self.images[index], **labels)
                img = img - 0.5
            elif mirror:
                img, labels = img.flip(-1), {task: label.flip(-1) for task, label in labels.items()}
                labels['normal'] = labels['normal'] * labels['normal'].new_tensor([-1, 1, 1])[:, None, None]
            yield img.contiguous(memory_format=torch.channels_last), labels, index, {}

    def test_batches(self, batch_size: int) -> Iterator[tuple]:
        """Every image once, in order; under torchrun every process its share."""
        rank, processes = self.shard
        for index in torch.arange(rank, len(self), processes, device=self.device).split(batch_size):
            yield *self._take(index), index

    def _take(self, index: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return self.images[index] - 0.5, {task: label[index] for task, label in self.labels.items()}


def channels_of(task: str, num_classes: int) -> int:
    """How many channels a network gives for a task."""
    return {'seg': num_classes, 'depth': 1, 'normal': 3}[task]


def supervised(task: str, out: Tensor, label: Tensor) -> Tensor:
    """The loss of a task with labels, over known pixels: cross-entropy, L1, or 1 - cosine."""
    if task == 'seg':
        return labelled_cross_entropy(out, label.clamp(min=-1), -1)
    if task == 'depth':
        known = label > 0
        return ((out - label).abs() * known).sum() / known.sum().clamp(min=1)
    known = label.square().sum(dim=1) > 0
    return ((1 - F.cosine_similarity(out, label, dim=1)) * known).sum() / known.sum().clamp(min=1)


class DenseMetrics:
    """The usual figures of the three tasks, over all known pixels of a test set.

    Labels of `ignore` and -100 are left out; any other outside 0..num_classes-1 raises ValueError.
    """

    def __init__(self, tasks: tuple, num_classes: int, device, ignore: int = -1) -> None:
        self.tasks, self.num_classes, self.ignore = tasks, num_classes, ignore
        device = 'cpu' if torch.device(device).type == 'mps' else device  # which has no float64
        self.confusion = torch.zeros(num_classes**2, dtype=torch.float64, device=device)
        self.depth = torch.zeros(4, dtype=torch.float64, device=device)
        self.angles: list[Tensor] = []

    def add(self, outs: list[Tensor], labels: dict[str, Tensor]) -> None:
        for task, out in zip(self.tasks, outs):
            getattr(self, f'_add_{task}')(out.float(), labels[task])

    def state(self) -> tuple:
        return self.confusion.cpu(), self.depth.cpu(), [angle.cpu() for angle in self.angles]

    def merge(self, states: list[tuple]) -> None:
        """Become the sum of what several processes have seen."""
        self.confusion, self.depth = (sum(state[k] for state in states) for k in (0, 1))
        self.angles = [angle for state in states for angle in state[2]]

    def read(self) -> dict[str, float]:
        """miou, accuracy; rmse, abs_rel, delta125; angle_mean, angle_median, within_11, _22, _30; score.

        Shares are in percent, score is the mean of those that are best known: miou, delta125 and within_11.
        """
        result = {}
        for task in self.tasks:
            result |= getattr(self, f'_read_{task}')()
        known = [result[key] for key in ('miou', 'delta125', 'within_11') if key in result]
        return result | {'score': sum(known) / len(known)}

    def _add_seg(self, out: Tensor, label: Tensor) -> None:
        known = (label != self.ignore) & (label != -100)
        wrong = label[known & ((label < 0) | (label >= self.num_classes))]
        if len(wrong):
            raise ValueError(
                f'DenseMetrics: labels must be in 0..{self.num_classes - 1}, {self.ignore} or -100, '
                f'got {int(wrong[0])}: ignore={int(wrong[0])} if that marks unknown pixels'
            )
        pair = label[known] * self.num_classes + out.argmax(dim=1)[known]
        self.confusion += torch.bincount(pair, minlength=self.num_classes**2).to(self.confusion.device)

    def _read_seg(self) -> dict[str, float]:
        table = self.confusion.view(self.num_classes, self.num_classes)
        hits, union = table.diagonal(), table.sum(dim=0) + table.sum(dim=1) - table.diagonal()
        present = union > 0
        miou = (hits[present] / union[present]).mean()
        return {'miou': 100 * float(miou), 'accuracy': 100 * float(hits.sum() / table.sum())}

    def _add_depth(self, out: Tensor, label: Tensor) -> None:
        known = label > 0
        d, g = (x[known].to(self.depth.device).double() for x in (out, label))
        ratio = torch.maximum(d.clamp(min=1e-6) / g, g / d.clamp(min=1e-6))
        near, error = (ratio < 1.25).sum(), (d - g)
        self.depth += torch.stack([error.square().sum(), (error.abs() / g).sum(), near, near * 0 + len(g)])

    def _read_depth(self) -> dict[str, float]:
        square, relative, near, n = self.depth.tolist()
        return {'rmse': (square / n) ** 0.5, 'abs_rel': relative / n, 'delta125': 100 * near / n}

    def _add_normal(self, out: Tensor, label: Tensor) -> None:
        known = label.square().sum(dim=1) > 0
        cosine = F.cosine_similarity(out, label, dim=1)[known].clamp(-1, 1)
        self.angles.append(torch.rad2deg(torch.acos(cosine)).to(self.depth.device))

    def _read_normal(self) -> dict[str, float]:
        angle = torch.cat(self.angles).double()
        within = {f'within_{d:.0f}': 100 * float((angle < d).double().mean()) for d in (11.25, 22.5, 30)}
        return {'angle_mean': float(angle.mean()), 'angle_median': float(angle.median())} | within
