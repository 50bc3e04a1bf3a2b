"""The expected ways to fail, and how a script turns them into a line and an exit code."""

import contextlib
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

if tuple(map(int, str(torch.__version__).split('.')[:2])) < (2, 11):  # before anything fails for want of it
    print(f'the training scripts need torch >= 2.11, this is {torch.__version__}; the losses alone need 2.2',
          file=sys.stderr)  # fmt: skip
    sys.exit(2)

import dataset
from dataset.folder import end_of_worker
from engine.processes import leave_processes


class UserError(Exception):
    """A mistake of the person at the keyboard: one line on stderr and exit code 2."""


class NonFinite(Exception):
    """A loss became inf or NaN: one line on stderr and exit code 1, the weights are those before the step."""


@contextlib.contextmanager
def user_errors():
    """What models, dataset and the loss constructors raise about their arguments is the user's mistake."""
    try:
        yield
    except (ValueError, OSError, MemoryError) as error:
        raise UserError(' '.join(str(error).split())) from error


def run(main: Callable[[], int | None]) -> None:
    """Call a script's main and turn the expected ways to fail into one line and an exit code."""
    script = Path(sys.argv[0]).name
    if hasattr(sys.stdout, 'reconfigure'):  # a name that the terminal's encoding lacks must not end a run
        sys.stdout.reconfigure(errors='backslashreplace')
    try:
        try:
            code = main()
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()  # here, where it is known what to do if nobody reads
        leave_processes()
        sys.exit(code)
    except (UserError, dataset.BadImage) as error:  # a bad image shows when it is reached
        if '--debug' in sys.argv:
            error.__suppress_context__ = False  # show all of it
            traceback.print_exception(error)
        print(f'{script}: error: {error}', file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError as error:  # `| head` has read enough
        if '--debug' in sys.argv:
            traceback.print_exception(error)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python says so as it ends
        sys.exit(141)  # as a program that SIGPIPE stops
    except OSError as error:
        if error.filename is None:
            raise
        if '--debug' in sys.argv:
            traceback.print_exception(error)
        print(f'{script}: error: {error.filename}: {error.strerror}', file=sys.stderr)
        sys.exit(2)
    except torch.OutOfMemoryError as error:
        if '--debug' in sys.argv:
            traceback.print_exception(error)
        first = str(error).split('. ')[0]
        print(f'{script}: stopped: {first}: take a smaller --batch_size, or fewer at a time', file=sys.stderr)
        sys.exit(1)
    except RuntimeError as error:  # torch's handler raises wherever the training is just then
        if not (said := end_of_worker(error)):
            raise
        print(f'{script}: error: {said}', file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as error:  # where no epoch is to be finished first
        if '--debug' in sys.argv:
            traceback.print_exception(error)
        print(f'{script}: interrupted', file=sys.stderr)
        sys.exit(130)
    except NonFinite as error:
        print(f'{script}: stopped: {error}', file=sys.stderr)
        sys.exit(1)
