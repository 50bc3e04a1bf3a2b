"""What teacher and students find in some test pictures of the rooms, kept for the report."""

import io
import zipfile
import zlib
from pathlib import Path

import numpy as np

from engine.dense_tasks import SHOWN, Setting
from engine.record import write_atomic


def keep_panels(setting: Setting, runs: list, path: Path) -> None:
    """What teacher and students find in some test pictures, for `python -m report dense`."""
    chosen = [i % len(setting.test) for i in SHOWN]
    pictures = [setting.test[i] for i in chosen]
    arrays = {'image': np.stack([(image.numpy() * 255).round().astype(np.uint8) for image, _ in pictures]),
              'truth': np.stack([setting.task.truth(target) for _, target in pictures])}  # fmt: skip
    nets = {'teacher': setting.net_t} if setting.net_t else {}
    for name, net in (nets | {run.name: run.net for run in runs}).items():
        arrays[f'of {name}'] = np.stack([setting.task.example(net.eval(), i) for i in chosen])
    arrays = of_earlier_runs(path, arrays) | arrays
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    write_atomic(path, file.getvalue())


def of_earlier_runs(path: Path, arrays: dict) -> dict:
    """What other students of the folder found in the same pictures, and their teacher."""
    try:
        with np.load(path) as file:
            old = {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error):  # none, or damaged
        return {}
    if not all(np.array_equal(old.get(key, ()), arrays[key]) for key in ('image', 'truth')):
        return {}
    there = {'of teacher', *(f'of {found.parent.name}' for found in path.parent.glob('*/results.json'))}
    return {name: old[name] for name in old if name in there}
