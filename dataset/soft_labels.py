"""What a teacher says of the crops of a training, stored: a folder per teacher, data and recipe.

    meta.json                   kind, seed, data ...; written last, so a store without it is half done
    epoch_0000/index.npy        (images, k) uint16, the classes that are kept
    epoch_0000/value.npy        (images, k) float16, their probabilities; all logits for kind logits

Rows are in the order of the training set. Crops and flips are functions of seed, epoch and image, so they
need not be stored: a training with the same seed sees the same ones, whatever its batch size.
"""

import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kd_losses.fkd_labels import kept, quantise, recover

# flags of a training that decide which crops it sees
SAME = ('data_name', 'seed', 'val_split', 'pad', 'image_size', 'convert_rgb')


class SoftLabelStore:
    """A store that is there: read(epoch) loads an epoch, then rows(index) gives logits.

    Raises:
        ValueError: there is no store, or one of which a part is missing or damaged.
    """

    def __init__(self, folder: str | Path, device='cpu') -> None:
        self.folder, self.device, self.loaded = Path(folder), device, None
        try:
            self.meta = json.loads((self.folder / 'meta.json').read_text())
            kind, _ = kept(self.meta['kind'], self.meta['num_classes'])
            for key in (*SAME, 'images', 'teacher', 'teacher_weights', 'teacher_top1'):
                self.meta[key]  # a store that lacks one is refused here
            self.parts = {'logits': ['value'], 'hard': ['index']}.get(kind, ['index', 'value'])
            files = [path for epoch in range(self.meta['epochs']) for path in self._files(epoch).values()]
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise ValueError(
                f'{folder}: is no complete store of soft labels ({type(error).__name__} at meta.json); '
                f'tools/pseudo_labels.py writes one'
            ) from None
        if missing := [path for path in files if not path.is_file()]:
            raise ValueError(f'{missing[0]}: is missing, the store is not complete')
        self.index = self.value = None

    def _files(self, epoch: int) -> dict[str, Path]:
        return {name: self.folder / f'epoch_{epoch:04d}' / f'{name}.npy' for name in self.parts}

    def check(self, args) -> None:
        """Refuse a training that would see other crops than those that were labelled."""
        for name in SAME:
            if getattr(args, name) != self.meta[name]:
                raise ValueError(
                    f'--soft_labels {self.folder}: labelled with --{name} {self.meta[name]}, this is '
                    f'{getattr(args, name)}: other crops'
                )

        own = getattr(args, 'own_images', None)
        if self.meta.get('own_images', own) != own:
            raise ValueError(f'--soft_labels {self.folder}: labels of other images than --img_root has now')

    def named(self, epochs: int) -> str:
        """What tells these labels from others of the same teacher, in a training of so many epochs."""
        name, temp_t = self.meta['kind'], self.meta.get('temp_t', 1)
        name += f' temp_t={temp_t:g}' if temp_t != 1 and name not in ('logits', 'hard') else ''
        return name + (f' epochs={self.meta["epochs"]}' if self.meta['epochs'] < epochs else '')

    def epoch_of(self, epoch: int) -> int:
        """Which stored epoch a training's epoch repeats: they come round."""
        return epoch % self.meta['epochs']

    def read(self, epoch: int) -> None:
        epoch = self.epoch_of(epoch)
        if epoch == self.loaded:
            return
        for name, path in self._files(epoch).items():
            try:
                new = np.load(path, mmap_mode='r', allow_pickle=False)
            except (OSError, ValueError, EOFError) as error:
                raise ValueError(f'{path}: cannot be read ({type(error).__name__})') from None
            new = torch.from_numpy(new.astype(np.int32 if name == 'index' else new.dtype))
            old = getattr(self, name)
            if old is None:
                setattr(self, name, new.to(self.device))
            else:
                old.copy_(new)  # where it lies: a recorded step reads it there
        self.loaded = epoch

    def rows(self, index: Tensor) -> Tensor:
        """(N, K) logits of these images; logarithms of probabilities, -inf for 0."""
        classes, value = (None if x is None else x[index] for x in (self.index, self.value))
        made = recover(classes, value, self.meta['kind'], self.meta['num_classes'])
        return made if self.meta['kind'] == 'logits' else made.log()


def write_epoch(folder: Path, epoch: int, images: int, outs, kind: str, temp_t: float, K: int) -> None:
    """outs: (positions in the training set, logits) per batch; every image must come once."""
    name, k = kept(kind, K)
    if K > 65535:
        raise ValueError(
            f'soft labels: classes must be at most 65535, got {K}: numbers are stored in 16 bits'
        )
    place = folder / f'epoch_{epoch:04d}'
    place.mkdir(parents=True, exist_ok=True)
    arrays = {}
    if name != 'logits':
        arrays['index'] = np.zeros((images, k), np.uint16)
    if name != 'hard':
        arrays['value'] = np.zeros((images, k), np.float16)
    seen = np.zeros(images, bool)
    for index, out in outs:
        stored = quantise(out if name == 'logits' else (out / temp_t).softmax(dim=1), kind)
        where = index.cpu().numpy()
        for key, part in zip(('index', 'value'), stored):
            if part is not None:
                arrays[key][where] = part.cpu().numpy()
        seen[where] = True
    if not seen.all():
        raise ValueError(f'soft labels: every image must be labelled, got {seen.sum()} of {images}')
    for key, array in arrays.items():
        path = place / f'{key}.npy'
        try:
            np.save(path, array)
        except OSError as error:  # of a full disk it names neither file nor reason
            raise ValueError(f'{path}: cannot be written ({error.strerror or error})') from None
