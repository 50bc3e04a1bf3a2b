"""Where a number comes from: command, commit, machine, classes, and the weights it began with."""

import contextlib
import hashlib
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path

import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent  # the checkout


def git(folder: Path, *words: str) -> str | None:
    """What git says there; None if there is no git, or it fails."""
    try:
        done = subprocess.run(['git', *words], cwd=folder, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def commit_of(folder: Path) -> str | None:
    if Path(git(folder, 'rev-parse', '--show-toplevel') or '/').resolve() != folder.resolve():
        return None  # a copy inside somebody's repository
    return git(folder, 'rev-parse', 'HEAD')


def provenance(device: torch.device) -> dict:
    """Where a number comes from: command, commit, machine."""
    commit = commit_of(ROOT) or os.environ.get('SOURCE_COMMIT')  # a copy without its history
    # results are written by runs, and change none
    if commit and git(ROOT, 'status', '--porcelain', '--untracked-files=no', '--', '.', ':!results'):
        commit += '-dirty'
    script = Path(sys.argv[0]).resolve()
    script = script.relative_to(ROOT) if script.is_relative_to(ROOT) else script.name
    return {
        'command': shlex.join(['python', str(script), *sys.argv[1:]]),
        'commit': commit,
        'machine': {
            'device': torch.cuda.get_device_name(device) if device.type == 'cuda' else device.type,
            'cpu': _cpu_name(),
            'threads': torch.get_num_threads(),
            'torch': str(torch.__version__),
            'python': platform.python_version(),
        },
    }


def class_names_of(data) -> dict:
    """{'class_names': [...]}, empty for data whose classes have no names."""
    names = getattr(data, 'class_names', None)
    return {'class_names': names} if names else {}


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path('/proc/cpuinfo').read_text().splitlines():
            if line.startswith('model name'):
                return line.partition(':')[2].strip()
    return platform.processor() or platform.machine()


def fingerprint(net: nn.Module) -> str:
    """A short name for a network's weights, to notice that a file has changed since."""
    return fingerprint_of(net.state_dict())


def fingerprint_of(tensors: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha1()
    for key, value in tensors.items():
        digest.update(key.encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:12]
