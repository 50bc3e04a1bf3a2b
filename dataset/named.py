"""What belongs to the name of a data set, an entry of dataset.DATA."""

from collections.abc import Callable
from dataclasses import dataclass

from .resident import Resident


@dataclass(frozen=True)
class Data:
    """How a data set is read.

    load: (root, device, size, options) -> (training set, test set): Resident's, or sets with its methods.
    load_test: the same arguments -> the test set, without the training half, which need not be there.
    mean_std: (mean, std) per channel of the training images, of pixels in 0..1; None: its files say them.
    owned: the user's own files, which the name does not tell apart: a recipe has their digest.
    sized: NAME:N is the set with N training images; size is this N, or None.

    root is the folder of --img_root, options the keyword arguments of Folder.
    """

    load: Callable[..., tuple[Resident, Resident]]
    load_test: Callable[..., Resident]
    mean_std: tuple[tuple[float, ...], tuple[float, ...]] | None
    sized: bool = False
    owned: bool = False
