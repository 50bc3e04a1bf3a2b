"""The paper trail of a run: checkpoints, written whole or not at all, and results."""

import contextlib
import copy
import csv
import io
import json
import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from engine.errors import UserError
from engine.origin import class_names_of, fingerprint, fingerprint_of, provenance  # noqa: F401  asked for here, too
from engine.processes import gathered, rank
from engine.recipe import forget, load_checkpoint
from models.checkpoint import named_weights


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


def write_atomic(path: Path, content: bytes | memoryview) -> None:
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
    write_atomic(path, buffer.getbuffer())


def keep(path: Path, make: Callable[[], dict]) -> bool:
    """Unless an earlier training has left this file, write what make() returns; whether that was done.

    Every process makes it, alike and alone: waiting has a time limit. The first one's is kept.
    """
    new = not gathered(path.exists())[0]
    if new:
        save_checkpoint(path, make())
        gathered(None)  # from here on it is there
    return new


def on_cpu(x):
    """The same with every tensor on the CPU: a file that any machine can read."""
    if isinstance(x, Tensor):
        return x.cpu()
    if isinstance(x, dict):
        moved = copy.copy(x)  # with what a state_dict knows besides
        moved.update((key, on_cpu(value)) for key, value in x.items())
        return moved
    return type(x)(map(on_cpu, x)) if isinstance(x, (list, tuple)) else x


def write_metrics(path: Path, rows: list[dict]) -> None:
    text = io.StringIO()
    columns = list(dict.fromkeys(key for row in rows[::-1] for key in row))  # phases have fewer columns
    writer = csv.DictWriter(text, columns, restval='')
    writer.writeheader()
    writer.writerows({k: f'{v:.6g}' if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    write_atomic(path, text.getvalue().encode())


def write_json(path: Path, content: dict) -> None:
    write_atomic(path, (json.dumps(content, indent=1) + '\n').encode())


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
        logits, names = logits_of(parts.get('net')), origin.get('class_names')
        assert not logits or not names or logits == len(names), f'{logits} logits, the classes are {names}'
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
        content = load_checkpoint(path, self.math_args, self.origin.get('class_names'))
        for name, part in self.parts.items():
            try:
                part.load_state_dict(content[name])
            except RuntimeError as error:  # keys that a later version has given, or taken away
                raise UserError(
                    f'{path}: cannot resume, its {name} is of another version of this code, '
                    f'{" ".join(str(error).split())}; --note NAME starts another run'
                ) from error
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
        if path.parent.resolve() != self.folder.resolve():
            self.saved = -1  # nothing of it lies here yet: begin() writes it

    def begin(self, choice: str | None) -> None:
        """Once all that is to be trained has been built: a word that does not fit must cost nothing.

        choice: --resume. never removes what an earlier run left; a run that moves to another folder is
        written there, as a kill before its next checkpoint should find it.
        """
        forget(choice, self.folder)
        if self.saved < 0:
            self.save()

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
        self.save_best()
        state = {name: part.state_dict() for name, part in self.parts.items()}
        state |= {'epoch': self.epoch, 'history': self.history, 'args': self.math_args, 'origin': self.origin}
        write_metrics(self.folder / 'metrics.csv', self.history)
        save_checkpoint(self.folder / 'last.pt', state)
        self.saved = self.epoch

    def save_best(self) -> None:
        """Write the best weights so far, if best.pt is older: a run that fails ends so, too."""
        if self.waiting:
            save_checkpoint(self.folder / 'best.pt', self.waiting)
            self.waiting = None

    def _weights(self) -> dict:
        names, scale = self.origin.get('class_names'), self.math_args.get('own_scale')
        return named_weights(deployed(self.parts['net']), names, scale)

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


def logits_of(net) -> int | None:
    """How many classes a network tells apart; None if it does not say."""
    net = net if net is None else deployed(net)
    layer = net.classifier_layer() if hasattr(net, 'classifier_layer') else None
    return getattr(layer, 'out_features', None)


def tested(row: dict) -> dict:
    """What an epoch's row says of the test set."""
    figures = {k.removeprefix('test_'): v for k, v in row.items() if k.startswith('test_')}
    return figures | {'epoch': row['epoch']}


def deployed(net: nn.Module) -> nn.Module:
    """What is kept of a network after training: some methods add exits or heads that are not."""
    return net.deployed() if hasattr(net, 'deployed') else net
