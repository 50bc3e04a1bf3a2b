"""The paper trail of a run: checkpoints, written whole or not at all, and results."""

import argparse
import contextlib
import copy
import csv
import io
import json
import os
from pathlib import Path

import torch
from torch import Tensor, nn

from engine.errors import UserError, user_errors
from engine.origin import class_names_of, fingerprint, provenance  # noqa: F401  asked for here, too
from engine.processes import processes, rank
from models.checkpoint import compare_classes, named_weights, read_checkpoint


def output_folder(path: Path) -> Path:
    """Make sure results can be written before hours are spent on them."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f'.probe-{os.getpid()}'
        probe.write_bytes(b'')
        probe.unlink()
    except OSError as error:
        raise UserError(f'{path}: cannot write to the output folder ({error.strerror})') from None
    return path


def write_atomic(path: Path, content: bytes) -> None:
    """All or nothing: a reader sees the old file or the new one, also after a crash or on a full disk.

    Under torchrun only the first process writes.
    """
    if rank() > 0:
        return
    temporary = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
    try:
        with open(temporary, 'wb') as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        state = 'the previous version is intact' if path.exists() else 'nothing was written'
        raise UserError(f'{path}: cannot be written ({error.strerror}); {state}') from None


def save_checkpoint(path: Path, content: dict) -> None:
    if rank() > 0:
        return
    buffer = io.BytesIO()
    torch.save(on_cpu(content), buffer)
    write_atomic(path, buffer.getvalue())


def on_cpu(x):
    """The same with every tensor on the CPU: a file that any machine can read."""
    if isinstance(x, Tensor):
        return x.cpu()
    if isinstance(x, dict):
        moved = copy.copy(x)  # with what a state_dict knows besides
        moved.update((key, on_cpu(value)) for key, value in x.items())
        return moved
    return type(x)(map(on_cpu, x)) if isinstance(x, (list, tuple)) else x


def load_checkpoint(path: Path, math_args: dict) -> dict:
    """A checkpoint of ours, refused when its run differs in anything that changes the numbers."""
    with user_errors():
        content = read_checkpoint(path)
    if not isinstance(content.get('args'), dict) or 'epoch' not in content:
        raise UserError(f'{path}: is not a checkpoint of this script')
    old = content['args']
    new = math_args | {k: default for k, default in NEWER.items() if k in old and k not in math_args}
    differ = [f'{k} was {old.get(k, NEWER.get(k))!r}, is {v!r}' for k, v in new.items() if old.get(k) != v]
    if differ:
        hint = ''
        weights = {'--init': path.with_name('net.pt'), '--s_init': path.with_name('student.pt')}
        finished = [f'{flag} {file}' for flag, file in weights.items() if file.exists()]
        if finished and math_args.get('epochs', 0) > old.get('epochs', math_args.get('epochs', 0)):
            hint = (
                '; this run is finished, and its learning rates belong to its length: to go on from its '
                f'weights, start another one, --note NAME {finished[0]}'
            )
        raise UserError(f'{path}: cannot resume, {"; ".join(differ)}{hint}')
    return content


def write_metrics(path: Path, rows: list[dict]) -> None:
    text = io.StringIO()
    columns = list(dict.fromkeys(key for row in rows[::-1] for key in row))  # phases have fewer columns
    writer = csv.DictWriter(text, columns, restval='')
    writer.writeheader()
    writer.writerows({k: f'{v:.6g}' if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    write_atomic(path, text.getvalue().encode())


def write_json(path: Path, content: dict) -> None:
    write_atomic(path, (json.dumps(content, indent=1) + '\n').encode())


def resume_point(choice: str | None, folder: Path) -> Path | None:
    """The checkpoint that --resume asks to continue in this run's folder; None starts from scratch."""
    last = folder / 'last.pt'
    if choice == 'auto':
        return last if last.exists() else None
    if choice == 'never':
        for name in ('last.pt', 'best.pt', 'results.json', 'metrics.csv'):
            if rank() == 0:
                (folder / name).unlink(missing_ok=True)
        return None
    if choice is not None:  # a file, a run's folder, or the folder of a group of runs
        candidates = [Path(choice), Path(choice) / 'last.pt', Path(choice) / folder.name / 'last.pt']
        for path in candidates:
            if path.is_file():
                return path
        raise UserError(
            f'--resume {choice}: no checkpoint there, looked for {", ".join(map(str, candidates))}'
        )
    if last.exists():
        raise UserError(
            f'{folder} already holds a run: --resume auto continues it, --resume never overwrites it, '
            f'--note NAME starts another one'
        )
    return None


class Record:
    """The paper trail of one network in training: its history and the files of its output folder.

    last.pt (everything a resume needs, written every epoch), best.pt (weights of the best epoch so far),
    metrics.csv (one row per epoch), and at the end results.json and the plain weights.

    Args:
        folder: where the files go.
        parts: what has state: {'net': ..., 'opt': ..., ...}, anything with state_dict and load_state_dict.
        math_args: everything that changes the numbers; a resume with other values is refused.
        origin: command, commit and machine, kept from the first start; commits of resumes are added. With
            class_names, all files of weights have them, too.
        selected_on: 'val' or 'test', whose figure chooses the best epoch.
        key: which figure, more is better.
    """

    def __init__(
        self, folder: Path, parts: dict, math_args: dict, origin: dict, selected_on: str, key: str = 'top1'
    ) -> None:
        self.folder, self.parts, self.math_args = output_folder(folder), parts, math_args
        self.origin, self.key = origin, f'{selected_on}_{key}'
        self.history: list[dict] = []
        self.saved = 0  # epochs that the checkpoint knows of
        self.waiting: dict | None = None  # the best weights so far, where best.pt is older
        if rank() == 0:
            for leftover in self.folder.glob('.*.tmp'):  # of a kill in the middle of a write
                leftover.unlink(missing_ok=True)

    @property
    def epoch(self) -> int:
        """Epochs done."""
        return len(self.history)

    @property
    def best(self) -> dict:
        """The row of the best epoch, the first of equals; phases before the training do not count."""
        return max((row for row in self.history if self.key in row), key=lambda row: row[self.key])

    def resume(self, path: Path | None) -> None:
        if path is None:
            return
        content = load_checkpoint(path, self.math_args)
        with user_errors():
            compare_classes(path, content['origin'].get('class_names'), self.origin.get('class_names'))
        for name, part in self.parts.items():
            part.load_state_dict(content[name])
        self.history = content['history']
        self.saved = self.epoch
        best = path.with_name('best.pt')
        if best.exists() and not (self.folder / 'best.pt').exists():  # the run moves to another folder
            write_atomic(self.folder / 'best.pt', best.read_bytes())
        commit, names = self.origin['commit'], self.origin.get('class_names')
        self.origin = content['origin'] | ({'class_names': names} if names else {})
        commits = [self.origin['commit'], *self.origin.get('resumed_with', [])]
        if commit not in commits:
            self.origin['resumed_with'] = [*commits[1:], commit]

    def epoch_done(self, row: dict, save: bool = True) -> None:
        """save: False leaves the checkpoints as they are: a kill then loses this epoch, too."""
        self.history.append(row)
        if self.key in row and self.best is row:
            weights = self._weights()
            for key, value in weights.items():
                weights[key] = value.clone()
            self.waiting = {'net': weights, 'epoch': row['epoch']}
        if save:
            self.save()
        else:
            write_metrics(self.folder / 'metrics.csv', self.history)

    def save(self) -> None:
        """Write what is newer than the files."""
        if self.saved == self.epoch:
            return
        if self.waiting:
            save_checkpoint(self.folder / 'best.pt', self.waiting)
            self.waiting = None
        state = {name: part.state_dict() for name, part in self.parts.items()}
        state |= {'epoch': self.epoch, 'history': self.history, 'args': self.math_args, 'origin': self.origin}
        write_metrics(self.folder / 'metrics.csv', self.history)
        save_checkpoint(self.folder / 'last.pt', state)
        self.saved = self.epoch

    def _weights(self) -> dict:
        return named_weights(deployed(self.parts['net']), self.origin.get('class_names'))

    def finish(self, weights: str, facts: dict) -> str:
        """Write the plain weights and results.json; return the headline, which is the last epoch's."""
        save_checkpoint(self.folder / weights, self._weights())
        last, best = self.history[-1], self.best
        half, _, key = self.key.partition('_')
        selected_on = {'val': 'validation split', 'test': 'test data'}[half]
        name = f'test_{key}'
        write_json(self.folder / 'results.json', facts | {
            'last': tested(last),
            'best': tested(best) | {'selected_on': selected_on},
            'curve': [round(row[name], 4) for row in self.history if name in row],
            'seconds': round(sum(row['seconds'] for row in self.history), 1),
            'recipe': self.math_args,
            **self.origin,
        })  # fmt: skip
        headline = {'top1': 'top-1'}.get(key, key)
        return (
            f'{headline} {last[name]:.2f} at the last epoch; best {best[name]:.2f} '
            f'at epoch {best["epoch"]}, selected on {selected_on}'
        )


def tested(row: dict) -> dict:
    """What an epoch's row says of the test set."""
    figures = {k.removeprefix('test_'): v for k, v in row.items() if k.startswith('test_')}
    return figures | {'epoch': row['epoch']}


def deployed(net: nn.Module) -> nn.Module:
    """What is kept of a network after training: some methods add exits or heads that are not."""
    return net.deployed() if hasattr(net, 'deployed') else net


# flags that a recipe names only where they are not at their defaults: older checkpoints do not know them
NEWER = {'compile': False, 'schedule': 'steps', 'phases': 'before', 'ramp_epochs': None, 'nesterov': True,
         'pad': 'reflect', 't_mean': None, 't_std': None, 'kd_stop': None,
         'select': 'saliency'}  # fmt: skip


def math_args(args: argparse.Namespace, **more) -> dict:
    """The flags that change the numbers of a run, as plain values."""
    names = ('data_name', 'image_size', 'val_split', 'epochs', 'batch_size', 'lr', 'milestones', 'lr_decay',
             'momentum', 'weight_decay', 'seed', 'amp')  # fmt: skip
    chosen = {name: getattr(args, name) for name, default in NEWER.items()
              if getattr(args, name, default) != default}  # fmt: skip
    return {name: getattr(args, name) for name in names} | {'processes': processes()} | chosen | more
