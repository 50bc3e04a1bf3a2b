"""Two processes that do what a test asks of them, one thing after another: starting them takes longest.

    torchrun --nproc_per_node=2 -m tests.two_processes FOLDER

FOLDER/N.json, for N = 0, 1 ..., is [file of a program, its words...]; each process runs it and then writes
FOLDER/N-RANK.json, [exit code, standard output, standard error]. An empty list ends both.
"""

import contextlib
import io
import json
import os
import runpy
import sys
import time
import traceback
from itertools import count
from pathlib import Path

import engine.threads  # noqa: F401  before torch

import torch.distributed as dist

from engine.record import write_atomic
from tests.conftest import own_handlers


def run(words: list[str]) -> int:
    sys.argv = words
    try:
        with own_handlers():
            runpy.run_path(words[0], run_name='__main__')
    except SystemExit as stop:
        return stop.code or 0
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        if dist.is_initialized():  # it failed
            dist.destroy_process_group()
    return 0


def main(folder: Path) -> None:
    for n in count():
        asked = folder / f'{n}.json'
        while not asked.exists():
            time.sleep(0.02)
        words = json.loads(asked.read_text())
        if not words:
            return
        os.environ['TORCHELASTIC_RESTART_COUNT'] = str(n)  # a corner of the store where nobody has been
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = run(words)
        said = json.dumps([code, out.getvalue(), err.getvalue()])
        write_atomic(folder / f'{n}-{os.environ["RANK"]}.json', said.encode())


if __name__ == '__main__':
    main(Path(sys.argv[1]))
