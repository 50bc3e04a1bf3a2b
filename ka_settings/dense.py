"""Teachers of one dense task each (segmentation, depth, normals); the student gets all tasks."""

import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import dataset
import engine.data
import models
from dataset.dense import TASKS, DenseMetrics, channels_of, supervised
from engine import pictures
from engine.augment import add_augment_flag, read_augment
from engine.device import autocast
from engine.errors import UserError, user_errors
from engine.flags import positive_int, whole_number
from engine.method_flags import refuse_repeated
from engine.processes import gathered, same_buffers
from models.branching import JointNet
from models.segmentation import SegNet

# flags of all settings that have no meaning here
NOT_HERE = {
    'val_split': '',
    'pad': ', whose images are not cropped',
    's_init': ', whose students are made of their teachers',
}

SCENES = (3, 12, 27, 41)  # of the test set, in pictures


class Dense:
    """Teachers of one dense task each; students have all tasks."""

    name, data, networks = 'dense', ('scenes', 'nyuv2'), 'dense tasks: segnet (small, default), segnet_vgg'
    data_help = 'dense tasks: scenes (embedded; scenes:N for N training images) or nyuv2'
    key, blocks, val = 'score', (), False  # --val_split is refused

    @staticmethod
    def add_flags(parser) -> None:
        # fmt: off
        flag = parser.add_argument_group('dense tasks').add_argument
        flag('--tasks', nargs='+', choices=TASKS, default=list(TASKS),
             metavar='TASK', help='one per teacher; of scenes, nyuv2; default ' + ' '.join(TASKS))
        flag('--size', type=positive_int, default=48, help='scenes, nyuv2: side of the images, default 48')
        flag('--labelled', action='store_true',
             help='scenes: train on the images that the teachers had labels for; default: if every '
                  'student reads labels')
        flag('--epochs_ft', type=whole_number, default=5,
             help='scenes: epochs of fine-tuning; after those of --epochs, at half the learning rate; '
                  'default 5')
        add_augment_flag(flag, 'scenes, nyuv2')
        # fmt: on

    def __init__(self, args, wanted: dict, device, log) -> None:
        self.args, self.amp = args, autocast(device, args.amp)
        labelled = args.labelled or all(method.needs.labels for method in wanted.values())
        for flag, why in NOT_HERE.items():
            if getattr(args, flag) not in (None, 0, 'reflect'):
                raise UserError(f'--{flag}: not for scenes and nyuv2{why}')
        refuse_repeated('--tasks', args.tasks)
        with user_errors():
            self.train, self.test = dataset.load_dense(
                args.data_name, args.img_root, device, args.size, labelled
            )
        self.train.view, numbers = read_augment(args, args.size)
        engine.data.share(self.train, self.test)
        needs = [name for name, method in wanted.items() if not method.needs.labels]
        self.tasks, self.student_name = tuple(args.tasks), args.s_name or 'segnet'
        if len(args.t_model) not in ((len(self.tasks),) if needs else (0, len(self.tasks))):
            raise UserError(
                f'--t_model: needs one teacher per task ({", ".join(self.tasks)}), got {len(args.t_model)}'
            )
        names = args.t_name * len(self.tasks) if len(args.t_name) == 1 else args.t_name
        names = names or ['segnet'] * len(self.tasks)
        if len(names) != len(self.tasks):
            raise UserError(f'--t_name: {len(args.t_name)} names for {len(self.tasks)} tasks')
        if needs and len(needs) == len(wanted) and args.s_name not in (None, *names):
            raise UserError(f'--s_name {args.s_name}: {", ".join(needs)} makes the student of the teachers')
        self.nets, figures = [], []
        for task, name, path in zip(self.tasks, names, args.t_model):
            net = self.network(name, task)
            try:
                said = models.load_weights(net, path)
            except ValueError as error:
                order = f'--t_model follows --tasks {" ".join(self.tasks)}'
                raise UserError(f'teacher of {task} ({name}): {error}; {order}') from None
            net.requires_grad_(False).eval().to(device, memory_format=torch.channels_last)
            read = self._metrics(lambda img, net=net: [net(img)], (task,))
            if not all(math.isfinite(value) for value in read.values()):
                raise UserError(f'{path}: the teacher is not finite')
            log(f'teacher {task}: {said}; ' + ', '.join(f'{k} {v:.3g}' for k, v in read.items()))
            self.nets.append(net)
            figures.append({'name': name, 'task': task, **read})
        self.facts = {'teacher': '+'.join(names) if self.nets else None, 'tasks': self.tasks,
                      'teachers': figures, 'labelled': labelled}  # fmt: skip
        augmented = {'augment': numbers} if numbers else {}
        self.facts |= augmented
        self.recipe = {'tasks': list(self.tasks), 'labelled': labelled, **augmented}
        shown = {'seg': 'miou', 'depth': 'rmse', 'normal': 'angle_mean'}
        self.shown = [shown[task] for task in self.tasks]

    def network(self, name: str, task: str) -> SegNet:
        forms = {
            'segnet': {'widths': (16, 32, 48, 64), 'convolutions': (2, 2, 2, 2)},
            'segnet_vgg': {},
        }
        if name not in forms:
            raise UserError(f'no network for dense tasks is called {name!r}; there are {", ".join(forms)}')
        return SegNet(channels_of(task, self.train.num_classes), **forms[name])

    def phases(self) -> list[int]:
        """The training, and the fine-tuning if there is any."""
        first, second = self.args.epochs, self.args.epochs_ft
        return [first, first + second] if second else [first]

    def student(self, method) -> nn.Module:
        """One network for all tasks: made of the teachers, or fresh where labels are read."""
        torch.manual_seed(self.args.seed)
        fresh = [self.network(self.student_name, task) for task in self.tasks]
        if method.needs.labels and len(fresh) == 1:
            return fresh[0]  # a teacher
        torch.manual_seed(self.args.seed)
        with user_errors():
            return JointNet(fresh if method.needs.labels else self.nets)

    def forward(self, net: nn.Module, batch):
        return listed(net(batch.img))

    @torch.no_grad()
    def teachers_on(self, img: Tensor) -> list[Tensor]:
        with self.amp():
            outs = [net(img) for net in self.nets]
        return [out.float() for out in outs]

    def sample(self):
        """Images without labels on which branch points are chosen: 400 of the training set, as they are."""
        for first in range(0, min(400, len(self.train)), 100):
            yield (self.train.images[first : min(first + 100, 400)] - 0.5,)

    def supervised(self, s: list[Tensor], target: dict) -> Tensor:
        return sum(supervised(task, out, target[task]) for task, out in zip(self.tasks, s))

    def measure(self, net: nn.Module) -> dict[str, float]:
        net.eval()
        same_buffers(net)
        read = self._metrics(lambda img: listed(net(img)), self.tasks)
        return {f'test_{key}': value for key, value in read.items()}

    def details(self, net: nn.Module) -> dict:
        """Sizes, of what is used, and where the branches leave the trunk."""
        joint = isinstance(net, JointNet)
        sizes = {'parameters': net.parameters_in_use() if joint else count(net),
                 'parameters_of_teachers': sum(map(count, self.nets))}  # fmt: skip
        return sizes | ({'branch_points': net.points.tolist()} if joint else {})

    def how_to_load(self, net: nn.Module, path: Path) -> str:
        joint = isinstance(net, JointNet)
        channels = [channels_of(task, self.train.num_classes) for task in self.tasks]
        shape = 'widths={}, convolutions={}'.format(*(net.trunk if joint else net).shape())
        made, imports = f'SegNet({channels[0]}, {shape})', 'from models.segmentation import SegNet'
        if joint:
            made = f'JointNet([SegNet(k, {shape}) for k in {channels}])'
            imports += '; from models.branching import JointNet'
        return models.how_to_fill(path, made, imports)

    def ensembles(self) -> dict:
        return {}

    @torch.no_grad()
    def shows(self, net: nn.Module) -> dict[str, np.ndarray]:
        """Of a few test images what student, teachers and truth have for each task."""
        chosen = SCENES if max(SCENES) < len(self.test) else range(min(len(SCENES), len(self.test)))
        index = torch.tensor(list(chosen), device=self.test.device)
        images, truth = self.test.images[index], {k: v[index] for k, v in self.test.labels.items()}
        with self.amp():
            outs = [out.float() for out in listed(net(images - 0.5))]
        said = {'student': outs, 'teacher': self.teachers_on(images - 0.5)}
        said['truth'] = [truth[task] for task in self.tasks]
        arrays = {'image': images, 'classes': torch.tensor(self.train.num_classes)}
        for who, of_tasks in said.items():
            for task, x in zip(self.tasks, of_tasks):
                if task == 'seg':
                    x = (x if who == 'truth' else x.argmax(dim=1)).to(torch.int16)
                elif task == 'normal':
                    x = torch.nn.functional.normalize(x, dim=1)
                arrays[f'{task}_{who}'] = x
        return {key: x.cpu().numpy() for key, x in arrays.items()} | {'tasks': np.array(self.tasks)}

    @staticmethod
    def drawn(arrays: dict, names: list[str] | None = None) -> np.ndarray:
        return pictures.grid([pictures.dense(arrays, n) for n in range(len(arrays['image']))], names)

    @torch.no_grad()
    def _metrics(self, outputs, tasks: tuple) -> dict[str, float]:
        metrics = DenseMetrics(tasks, self.train.num_classes, self.train.device)
        for img, labels, _ in self.test.test_batches(100):
            with self.amp():
                outs = outputs(img)
            metrics.add(outs, labels)
        metrics.merge(gathered(metrics.state()))
        return metrics.read()


def listed(out) -> list[Tensor]:
    """A network of one task gives a tensor, one of several a list."""
    return out if isinstance(out, list) else [out]


def count(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())
