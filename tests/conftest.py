"""Shared by all tests: one thread, and training scripts called inside the test process."""

import contextlib
import ctypes
import gc
import importlib
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import engine.errors
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


@pytest.fixture
def script(monkeypatch, capsys, img_root, tmp_path):
    """script('train_kd', '--kd_mode', 'st', ...) -> exit code, out, err; data and output folder are set."""

    def call(name: str, *words):
        words = [str(word) for word in words]
        for flag, value in (('--img_root', img_root), ('--save_root', tmp_path), ('--threads', 1)):
            if name.startswith('train') and flag not in words and (name, flag) != ('train_lm', '--img_root'):
                words += [flag, str(value)]
        monkeypatch.setattr(sys, 'argv', [f'{name}.py', *words])
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        capsys.readouterr()
        try:
            engine.errors.run(importlib.import_module(name).main)
        except SystemExit as stop:
            code = stop.code or 0
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        out, err = capsys.readouterr()
        return SimpleNamespace(code=code, out=out, err=err)

    return call


TINY = ('--data_name', 'shapes:96', '--batch_size', '32', '--epochs', '2')


@pytest.fixture
def teacher(script, tmp_path):
    """A resnet8 trained for two epochs on 96 shapes."""
    done = script('train_base', '--net_name', 'resnet8', '--note', 'teacher', *TINY)
    assert done.code == 0, done.err
    return tmp_path / 'teacher' / 'net.pt'


@pytest.fixture
def train_kd(script, teacher):
    """train_kd('st', '--note', 'x', ...) with a resnet8 teacher and student."""

    def call(*words):
        pair = ('--t_name', 'resnet8', '--t_model', teacher, '--s_name', 'resnet8')
        return script('train_kd', *pair, *(() if '--epochs' in words else TINY), '--kd_mode', *words)

    return call
