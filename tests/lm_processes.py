"""What test_ddp.py has two processes do with train_lm.py, one after the other: starting takes longest.

    two('tests/lm_processes.py', FOLDER, FLAGS...)      FLAGS: of train_lm.py

FOLDER/said.pt has what each process ended with.
"""

import sys
from functools import partial
from pathlib import Path

import engine.threads  # noqa: F401  before torch

import pytest
import torch

import train_lm
from engine import errors, lm_setting
from engine.processes import gathered, rank
from kd_losses.distillm import SampleSchedule

EVERY = ('ce', 'taid', 'distillm2', 'fdistill', 'minillm', 'dskd', 'uld', 'dskd_cma')
OWN = ('--kd_mode', 'fkl', '--lmbda', 'adaptive')


def small(patch) -> None:
    """Few texts that networks write, held-out ones in many parts, and a schedule that asks for own texts."""
    patch(lm_setting, 'WRITTEN', 8)
    patch(lm_setting, 'PROMPTS', 2)
    patch(lm_setting, 'CHUNK', 5)
    patch(SampleSchedule, 'update', lambda self, loss: setattr(self, 'threshold', 0.7))


def main(patch):
    folder, flags = Path(sys.argv[1]), sys.argv[2:]
    runs, make, step, loss = [], train_lm.make_run, train_lm.train_student, train_lm.cross_entropy

    def call(*words):
        sys.argv = ['train_lm.py', *flags, *words]
        train_lm.main()

    def made(*args):
        runs.append(make(*args))
        return runs[-1]

    def killed(student, seen):
        if seen.step == 3:
            raise MemoryError
        step(student, seen)

    small(patch)
    patch(train_lm, 'make_run', made)
    call('--kd_mode', *EVERY, '--note', 'whole')
    call(*OWN, '--note', 'own')
    states = {}
    for run in runs:
        states |= {f'{run.name} net {key}': value for key, value in run.net.state_dict().items()}
        states |= {f'{run.name} kd {key}': value for key, value in run.kd.state_dict().items()}
        states |= {f'{run.name} {k}': v for k, v in run.memory.items() if isinstance(v, torch.Tensor)}
    said = {'states': gathered(states)}

    few = ('--kd_mode', 'taid', 'minillm')
    for words, note in ((few, 'half'), (OWN, 'half own')):
        patch(train_lm, 'train_student', killed)
        try:
            call(*words, '--note', note)
        except MemoryError:
            patch(train_lm, 'train_student', step)
        call(*words, '--note', note, '--resume', 'auto')

    patch(train_lm, 'cross_entropy', lambda *args: loss(*args) * (float('nan') if rank() else 1))
    try:
        call('--kd_mode', 'ce', '--note', 'nan')
    except errors.NonFinite as error:
        said['failures'] = gathered(str(error))
    if rank() == 0:
        torch.save(said, folder / 'said.pt')


if __name__ == '__main__':
    with pytest.MonkeyPatch.context() as monkey:
        errors.run(partial(main, monkey.setattr))
