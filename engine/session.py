"""A run from its first line to its last: data, log, progress bar, stop."""

import argparse
import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

import dataset
from engine.errors import UserError, user_errors
from engine.processes import processes, rank


class StopAfterEpoch:
    """Ctrl-C and SIGTERM ask for a stop at the next checkpoint; a second one stops at once."""

    def __init__(self) -> None:
        self.signal = None
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._note)

    def _note(self, number, _) -> None:
        if self.signal is not None:
            os._exit(128 + number)
        self.signal = number
        if rank() == 0:
            print(
                '\nstopping after this epoch and its checkpoint; once more to stop at once', file=sys.stderr
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
        with contextlib.suppress(OSError), open(self.path, 'a') as file:  # checkpoints report a full disk
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


def read_data(args: argparse.Namespace, device: torch.device):
    """(training set, test set), whole."""
    folder_only = {'image_size': args.image_size, 'workers': args.workers, 'convert_rgb': args.convert_rgb}
    with user_errors():
        return dataset.load(args.data_name, args.img_root, device, **folder_only)


def load_data(args: argparse.Namespace, device: torch.device, log: Callable = lambda line: None):
    """(training set, validation set or None, test set) as the flags say."""
    train, test = read_data(args, device)
    for note in getattr(test, 'notes', ()):
        log(note)
    val = None
    if args.val_split:
        train, val = train.split(args.val_split, args.seed)
    if args.batch_size > len(train):
        raise UserError(f'--batch_size {args.batch_size}: the training set has {len(train)} images only')
    share(train, val, test)
    return train, val, test


def share(*sets) -> None:
    """Tell data sets which part of every batch is this process's."""
    for data in sets:
        if data:
            data.shard = (rank(), processes())
