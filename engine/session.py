"""What frames a training: its log, progress bar; how an epoch ends, and the whole.

A script calls start, end_epoch and finish; everything between them is its own. A reader can skip all three.
"""

import argparse
import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from engine.errors import NonFinite, UserError
from engine.processes import gathered, processes, rank
from engine.record import Record, write_json


@dataclass
class Session:
    """What all epochs of a training share besides the networks."""

    args: argparse.Namespace
    log: 'Log'
    bar: Any  # of steps
    board: Any  # of TensorBoard, or None
    stop: 'StopAfterEpoch'
    epochs: int  # of the whole training
    unit: str = 'epoch'  # what ends with a row
    failures: list[str] = field(default_factory=list)  # students that became non-finite


def start(
    args: argparse.Namespace,
    log: 'Log',
    origin: dict,
    records: Iterable[Record],
    *,
    val: Any,
    done: int,
    epochs: int,
    steps: int,
    total: int | None = None,
) -> Session:
    """Before the first epoch. done: epochs done, of epochs in all; steps: of an epoch.

    val: its split, None without one, False where there can be none.
    records: of all that is trained.
    total: of steps, where a training is cut by evaluations every so many steps, the last part being shorter.
    """
    folder, before = log.path.parent, min(done * steps, total or done * steps)
    unit, what = (
        ('evaluation', f'{before} of {total} steps') if total else ('epoch', f'{done} of {epochs} epochs')
    )
    board, stop = tensorboard(folder, args.tensorboard), StopAfterEpoch(f'this {unit}')
    records = list(records)
    found = gathered([record.epoch for record in records])  # every process has looked where its runs go on
    if others := [epochs for epochs in found if epochs != found[0]]:
        raise UserError(
            f'--resume: the first process has {unit}s done: {found[0]}, another: {others[0]}; '
            f'--save_root must be one folder that all machines see'
        )
    for record in records:
        record.begin(args.resume)
    write_json(folder / 'args.json', {'args': vars(args), **origin})
    log(f'{what} done, output in {folder}')
    if not val:
        able = val is None and hasattr(args, 'val_split')
        hint = ' (--val_split holds out training images for that)' if able else ''
        log(f'best.pt is selected on test data{hint}')
    return Session(args, log, progress_bar(total or steps * epochs, before, log), board, stop, epochs, unit)


def start_by_steps(
    args: argparse.Namespace, log: 'Log', origin: dict, records: list[Record], *, val: Any, what: str
) -> tuple[Session, range]:
    """The same where an evaluation every so many steps stands for the end of an epoch; and those to come.

    what: of which a batch is, for the log.
    """
    if processes() > 1:
        log(f'{processes()} processes x {args.batch_size} {what}')
    args.save_every, segments = 1, -(-args.steps // args.eval_every)
    done = min(record.epoch for record in records)
    counts = {'done': done, 'epochs': segments, 'steps': args.eval_every, 'total': args.steps}
    return start(args, log, origin, records, val=val, **counts), range(done, segments)


def drop_failed(session: Session, begun: list, runs: list) -> None:
    """Students that failed in this epoch leave both lists; the others go on."""
    for run in [run for run in begun if run.meter.failure]:
        session.log(f'stopped: {run.meter.failure}')
        run.record.save_best()
        session.failures.append(run.meter.failure)
        runs.remove(run)
        begun.remove(run)


def end_epoch(session: Session, epoch: int, last: bool, done: Iterable[tuple]) -> int:
    """Keep the rows of an epoch, and stop where that was asked for.

    done: (record, row, row -> line of the log, prefix of its TensorBoard scalars) per network in training.
    Returns the exit code to leave with, 0 to go on.
    """
    done, args = list(done), session.args
    for record, row, line, prefix in done:
        record.epoch_done(row, save=last or (epoch + 1) % args.save_every == 0)
        session.log(line(row))
        for key, value in row.items() if session.board else ():
            if isinstance(value, float):
                session.board.add_scalar(f'{prefix}{key}', value, row.get('step', epoch + 1))
    signal = session.stop.agreed() if done and not last else 0
    if signal:
        for record, *_ in done:
            record.save()
        session.bar.close()
        session.log(f'stopped after {session.unit} {epoch + 1}; --resume auto continues')
    return 128 + signal if signal else 0


def finish(session: Session, done: Iterable[tuple]) -> None:
    """Write results and plain weights. done: (record, file of the weights, facts, name, more lines or '')."""
    session.bar.close()
    for record, weights, facts, name, hint in done:
        session.log(f'{name}: {record.finish(weights, facts)}')
        if hint:
            session.log(hint)
    if session.failures:
        raise NonFinite('; '.join(session.failures))


class StopAfterEpoch:
    """Ctrl-C and SIGTERM ask for a stop at the next checkpoint; a second one stops at once."""

    def __init__(self, unit: str = 'this epoch') -> None:
        self.signal, self.unit = None, unit
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._note)

    def _note(self, number, _) -> None:
        if self.signal is not None:
            os._exit(128 + number)
        self.signal = number
        if rank() == 0:
            print(
                f'\nstopping after {self.unit} and its checkpoint; once more to stop at once', file=sys.stderr
            )

    def agreed(self) -> int:
        """The signal that any process has received, or 0: all stop together."""
        if processes() == 1:
            return self.signal or 0
        flag = torch.tensor(float(self.signal or 0))
        if dist.get_backend() == 'nccl':
            flag = flag.cuda()
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return int(flag)


class Log:
    """Lines to the screen (without tearing the progress bar) and to log.txt."""

    def __init__(self, folder: Path) -> None:
        self.path, self.bar = folder / 'log.txt', None

    def __call__(self, line: str) -> None:
        if rank() > 0:
            return
        if self.bar is not None and not self.bar.disable:
            self.bar.write(line)
        else:
            print(line, flush=True)
        with (
            contextlib.suppress(OSError),
            open(self.path, 'a', encoding='utf-8', errors='backslashreplace') as file,
        ):  # checkpoints report a full disk
            file.write(f'{time.strftime("%Y-%m-%d %H:%M:%S")}  {line}\n')


def progress_bar(total: int, done: int, log: Log):
    """A tqdm bar over all steps of the run, with an ETA on a terminal, silent elsewhere."""
    try:
        from tqdm import tqdm
    except ImportError:
        log('no progress bar: tqdm is not installed (pip install tqdm)')
        return _NoBar()
    quiet = True if rank() > 0 else None  # None: silent where there is no terminal
    log.bar = tqdm(total=total, initial=done, disable=quiet, unit='step', dynamic_ncols=True, smoothing=0.05)
    return log.bar


class _NoBar:
    disable = True

    def update(self):
        pass

    def set_postfix_str(self, text, refresh=True):
        pass

    def close(self):
        pass


def tensorboard(folder: Path, wanted: bool):
    """A SummaryWriter, or None. Imported only when asked for."""
    if not wanted or rank() > 0:
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError('--tensorboard: tensorboard is not installed (pip install tensorboard)') from None
    return SummaryWriter(folder)
