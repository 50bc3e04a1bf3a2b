"""Processes like those of `python FILE ...`, forked from one that has imported what takes longest, once.

What they print, their signals and exit codes are real. For what happens while Python starts or ends, take
subprocess.
"""

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

from tests.conftest import ROOT

CONTEXT = multiprocessing.get_context('forkserver')
CONTEXT.set_forkserver_preload(['tests.preloaded'])


class Popen:
    """Of subprocess.Popen what tests need; words: FILE ..., -m MODULE ... or -c CODE ..."""

    def __init__(self, *words, cwd=ROOT, env=None) -> None:
        self._folder = tempfile.TemporaryDirectory()
        place = [str(Path(self._folder.name) / name) for name in ('out', 'err')]
        args = ([*map(str, words)], str(cwd), dict(env or os.environ), place)
        self._process = CONTEXT.Process(target=_run, args=args)
        self._process.start()

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self._process.pid, number)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired('a fresh process', timeout)
        return tuple((Path(self._folder.name) / name).read_text() for name in ('out', 'err'))


def run(*words, cwd=ROOT, env=None, timeout: float = 300) -> SimpleNamespace:
    """-> returncode, stdout, stderr"""
    process = Popen(*words, cwd=cwd, env=env)
    out, err = process.communicate(timeout)
    return SimpleNamespace(returncode=process.returncode, stdout=out, stderr=err)


def _run(words: list[str], cwd: str, env: dict[str, str], place: list[str]) -> None:
    for number, path in enumerate(place, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    first, *rest = words
    if first == '-c':
        sys.argv, sys.path[0] = ['-c', *rest[1:]], ''
        exec(compile(rest[0], '<string>', 'exec'), {'__name__': '__main__'})
    elif first == '-m':
        sys.argv = rest
        runpy.run_module(rest[0], run_name='__main__', alter_sys=True)
    else:
        sys.argv = words
        runpy.run_path(first, run_name='__main__')
