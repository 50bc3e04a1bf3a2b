"""What test_ddp.py has two processes do with train_dense.py, one after the other: starting takes longest.

    two('tests/dense_processes.py', FOLDER, FLAGS...)      FLAGS: of train_dense.py

FOLDER/said.pt has what each process ended with.
"""

import sys
from functools import partial
from pathlib import Path

import engine.threads  # noqa: F401  before torch

import pytest
import torch
from torch import nn

import train_dense
from engine import dense as parts
from engine import errors
from engine.dense_tasks import Detection, Segmentation
from engine.processes import averaged, gathered, rank


def keep_statistics(patch) -> None:
    """Batch norms of students with a teacher stay as they are: with their process's pictures they differ."""
    train = parts.Run.train

    def still(run, mode):
        train(run, mode)
        for module in run.net.modules() if run.terms[0].method.needs.teacher else ():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()

    patch(parts.Run, 'train', still)


def find_some(patch) -> None:
    """Detectors that know two of the test pictures: what untrained ones find has precision 0 in any share."""

    def found(task, net, images):
        known = [task.setting.test[i] for i in (0, 3)]
        made = []
        for image in images:
            true = [target for picture, target in known if torch.equal(picture, image)]
            boxes = true[0]['boxes'] if true else torch.zeros(0, 4)
            labels = true[0]['labels'] if true else torch.zeros(0, dtype=torch.int64)
            made.append({'boxes': boxes, 'labels': labels, 'scores': torch.linspace(0.9, 0.1, len(labels))})
        return made

    patch(Detection, 'found', found)


def main(patch):
    folder, flags = Path(sys.argv[1]), sys.argv[2:]
    runs, make, step, loss = [], train_dense.make_run, train_dense.train_student, Segmentation.loss

    def call(*words):
        runs.clear()
        sys.argv = ['train_dense.py', *flags, *words]
        train_dense.main()

    def made(*args):
        runs.append(make(*args))
        return runs[-1]

    def killed(student, seen, args):
        if seen.step == 3:
            raise MemoryError
        step(student, seen, args)

    keep_statistics(patch)
    patch(train_dense, 'make_run', made)
    modes = (
        '--s_name',
        'lraspp:resnet10',
        '--kd_mode',
        'alone',
        'st+cwd',
        'skds_pair+maskd_seg',
        '--steps',
        '4',
        '--eval_every',
        '2',
    )
    call(*modes, '--note', 'whole')
    states = {}
    for run in runs:
        states |= {f'{run.name} net {key}': value for key, value in run.net.state_dict().items()}
        for term in run.terms:
            states |= {f'{run.name} {term.name} {key}': v for key, v in term.kd.state_dict().items()}
    said = {'states': gathered(states)}

    patch(train_dense, 'train_student', killed)
    try:
        call(*modes, '--note', 'half')
    except MemoryError:
        patch(train_dense, 'train_student', step)
    call(*modes, '--note', 'half', '--resume', 'auto')

    find_some(patch)
    boxes = ('--task', 'detection', '--s_name', 'fasterrcnn:resnet10', '--kd_mode', 'pkd', 'maskd')
    call(*boxes, '--steps', '1', '--note', 'boxes')

    patch(Segmentation, 'loss', lambda *args: loss(*args) * (float('nan') if rank() else 1))
    try:
        call('--kd_mode', 'alone', '--steps', '1', '--note', 'nan', '--t_steps', '350')
    except errors.NonFinite as error:
        said['failures'] = gathered(str(error))

    both, one, none = (nn.Parameter(torch.zeros(2, 2)) for _ in range(3))
    ((rank() + 1) * both.sum() + (one.sum() if rank() else 0)).backward()
    averaged([both, one, none])
    said['means'] = [p.grad for p in (both, one, none)]
    if rank() == 0:
        torch.save(said, folder / 'said.pt')


if __name__ == '__main__':
    with pytest.MonkeyPatch.context() as monkey:
        errors.run(partial(main, monkey.setattr))
