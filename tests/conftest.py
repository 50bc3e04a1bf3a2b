"""Shared by all tests: one thread, and training scripts called inside the test process, or in two others."""

import contextlib
import ctypes
import gc
import importlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import engine.errors
from engine.record import write_atomic
from methods import METHODS

# rows that two convolutional networks cannot have
TRANSFORMERS = {name for name, method in METHODS.items() if method.needs.tokens}
ROOT = Path(__file__).parent.parent
torch.set_num_threads(1)


class Killed(BaseException):
    """Stands for SIGKILL at an exact place: nothing after it runs."""


def resident() -> int:
    """Bytes of memory of this process; 0 where the system does not tell."""
    with contextlib.suppress(OSError):
        return int(Path('/proc/self/statm').read_text().split()[1]) * 4096
    return 0


LAST = [resident()]


def pytest_runtest_logfinish(nodeid, location):
    """Networks in reference cycles, and what malloc keeps of them: a worker grew to five GB without this."""
    if resident() > LAST[0] + 2**28:
        gc.collect()
        with contextlib.suppress(AttributeError, OSError):
            ctypes.CDLL(None).malloc_trim(0)
        LAST[0] = resident()


@pytest.fixture(scope='session')
def img_root(tmp_path_factory):
    """Where the embedded data is rendered to, once per test process."""
    return tmp_path_factory.mktemp('data')


@contextlib.contextmanager
def own_handlers():
    """What a script makes of signals ends with it, also where its process goes on."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@pytest.fixture
def script(monkeypatch, capsys, img_root, tmp_path):
    """script('train_kd', '--kd_mode', 'st', ...) -> exit code, out, err; data and output folder are set."""

    def call(name: str, *words):
        words = [str(word) for word in words]
        for flag, value in (('--img_root', img_root), ('--save_root', tmp_path), ('--threads', 1)):
            if name.startswith('train') and flag not in words and (name, flag) != ('train_lm', '--img_root'):
                words += [flag, str(value)]
        monkeypatch.setattr(sys, 'argv', [f'{name}.py', *words])
        capsys.readouterr()
        try:
            with own_handlers():
                engine.errors.run(importlib.import_module(name).main)
        except SystemExit as stop:
            code = stop.code or 0
        out, err = capsys.readouterr()
        return SimpleNamespace(code=code, out=out, err=err)

    return call


def torchrun(*words) -> list[str]:
    return [sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node=2', '--standalone', *words]


@pytest.fixture(scope='session')
def two(tmp_path_factory):
    """two('train_kd.py', '--kd_mode', ...) -> code (the larger), out, err (of both) of two processes.

    They are started once and stay, see tests/two_processes.py.
    """
    folder, numbers = tmp_path_factory.mktemp('two'), itertools.count()
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT)}
    command = torchrun('-m', 'tests.two_processes', str(folder))
    with open(folder / 'log', 'w') as log:
        both = subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=log)

    def tell(*words) -> int:
        n = next(numbers)
        write_atomic(folder / f'{n}.json', json.dumps([str(word) for word in words]).encode())
        return n

    def ask(*words, timeout=300):
        n, until = tell(*words), time.time() + timeout
        said = [folder / f'{n}-{rank}.json' for rank in range(2)]
        while not all(file.exists() for file in said):
            assert both.poll() is None and time.time() < until, (folder / 'log').read_text()[-3000:]
            time.sleep(0.02)
        codes, outs, errs = zip(*(json.loads(file.read_text()) for file in said))
        return SimpleNamespace(code=max(codes), out=''.join(outs), err=''.join(errs))

    yield ask
    if both.poll() is None:
        tell()  # to end
        with contextlib.suppress(subprocess.TimeoutExpired):
            both.wait(30)
    both.kill()


TINY = ('--data_name', 'shapes:96', '--batch_size', '32', '--epochs', '2')


@pytest.fixture(scope='session')
def train(img_root):
    """train('train_base', '--save_root', folder, ...): like `script`, for what several tests share."""

    def call(name: str, *words):
        words = [*map(str, words), '--img_root', str(img_root), '--threads', '1']
        with pytest.MonkeyPatch.context() as patch, own_handlers():
            patch.setattr(sys, 'argv', [f'{name}.py', *words])
            assert not importlib.import_module(name).main()

    return call


@pytest.fixture(scope='session')
def trained(train, tmp_path_factory):
    """The folder of a resnet8 trained for two epochs on 96 shapes, once per test process."""
    root = tmp_path_factory.mktemp('trained')
    train('train_base', '--save_root', root, '--net_name', 'resnet8', '--note', 'x', *TINY)
    return root / 'x'


@pytest.fixture
def teacher(trained, tmp_path):
    """The weights of that network, in a run folder that the test may change."""
    torch.manual_seed(2)  # as after a training: what a test draws must not depend on the tests before it
    return Path(shutil.copytree(trained, tmp_path / 'teacher')) / 'net.pt'


@pytest.fixture
def train_kd(script, teacher):
    """train_kd('st', '--note', 'x', ...) with a resnet8 teacher and student."""

    def call(*words):
        pair = ('--t_name', 'resnet8', '--t_model', teacher, '--s_name', 'resnet8')
        return script('train_kd', *pair, *(() if '--epochs' in words else TINY), '--kd_mode', *words)

    return call


@pytest.fixture
def tool(script, img_root, tmp_path):
    """tool('subtask', ...) with data and output folder set."""

    def call(name: str, *words):
        place = ('--img_root', img_root, '--save_root', tmp_path, '--threads', 1)
        return script(f'tools.{name}', *words, *place)

    return call
