"""CIFAR-10 in two thirds of its size, for a machine that files must be carried to.

    python tools/gpu/pack.py pack data .gpu          six .webp files of 17 MB, with their labels
    python tools/gpu/pack.py unpack .gpu data        back again, also with some of the files only

The images of a batch are tiled 100 x 100 and compressed without loss: what is unpacked has the official MD5s,
which are printed.
"""

import hashlib
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

FOLDER = 'cifar-10-batches-bin'
FILES = [*(f'data_batch_{k}.bin' for k in range(1, 6)), 'test_batch.bin']


def pack(source: Path, out: Path) -> None:
    records = np.fromfile(source, np.uint8).reshape(10000, 3073)
    tiles = records[:, 1:].reshape(100, 100, 3, 32, 32).transpose(0, 3, 1, 4, 2).reshape(3200, 3200, 3)
    picture = Image.fromarray(np.ascontiguousarray(tiles))
    picture.save(out / f'{source.stem}.webp', lossless=True, quality=80, method=4, exact=True)
    (out / f'{source.stem}.labels').write_bytes(records[:, 0].tobytes())


def unpack(source: Path, root: Path) -> str:
    tiles = np.asarray(Image.open(source).convert('RGB')).reshape(100, 32, 100, 32, 3)
    labels = np.frombuffer(source.with_suffix('.labels').read_bytes(), np.uint8)
    images = tiles.transpose(0, 2, 4, 1, 3).reshape(10000, 3072)
    batch = np.concatenate([labels[:, None], images], axis=1).tobytes()
    (root / FOLDER).mkdir(parents=True, exist_ok=True)
    (root / FOLDER / f'{source.stem}.bin').write_bytes(batch)
    return f'{source.stem} {hashlib.md5(batch).hexdigest()}'


def main() -> int:
    if len(sys.argv) != 4 or sys.argv[1] not in ('pack', 'unpack'):
        print(__doc__)
        return 2
    source, out = map(Path, sys.argv[2:])
    out.mkdir(parents=True, exist_ok=True)
    if sys.argv[1] == 'pack':
        for name in FILES:
            pack(source / FOLDER / name, out)
        return 0
    files = sorted(source.glob('*.webp'))
    with ProcessPoolExecutor(6) as pool:
        for said in pool.map(unpack, files, [out] * len(files)):
            print(said, flush=True)
    return 0


if __name__ == '__main__':
    sys.exit(main())
