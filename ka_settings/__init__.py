"""What train_ka.py amalgamates: a setting knows its data, its teachers, its student and its figures.

The script knows no setting by name. A new one is a file here with a class that offers what Setting lists, and
its name in SETTINGS.
"""

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from engine.errors import UserError

from .attributes import Attributes
from .backbones import Backbones
from .classes import Classes
from .dense import Dense

__all__ = [
    'SETTINGS',
    'Attributes',
    'Backbones',
    'Classes',
    'Dense',
    'Setting',
    'refuse_flags_of_others',
    'setting_for',
]

SETTINGS = (Classes, Dense, Attributes, Backbones)


def setting_for(data_name: str, wanted: Iterable[str] = ()) -> type['Setting']:
    """The setting that has this data set; the first where none has, which then says what there is.

    wanted: what needs.setting of the rows says, which chooses where several settings have the data set.
    """
    kind = data_name.partition(':')[0]
    able = [setting for setting in SETTINGS if kind in setting.data] or SETTINGS
    return next((setting for setting in able if setting.name in wanted), able[0])


def refuse_flags_of_others(args: argparse.Namespace, mine: type['Setting']) -> None:
    """A flag that only another setting reads would be ignored."""
    for other in SETTINGS:
        parser = argparse.ArgumentParser(add_help=False)
        other.add_flags(parser)
        given = [
            a
            for a in parser._actions
            if getattr(args, a.dest) != a.default
            and other is not mine
            and a.dest not in getattr(mine, 'also_reads', ())
        ]
        if given:
            kind, flag = args.data_name.partition(':')[0], given[0].dest
            readers = [s for s in SETTINGS if s is other or flag in getattr(s, 'also_reads', ())]
            elsewhere = any(kind in setting.data for setting in readers)  # for this data, with other methods
            where = f'--ka_mode {" ".join(args.ka_mode)} on ' if elsewhere else ''
            raise UserError(f'{given[0].option_strings[0]}: not for {where}--data_name {args.data_name}')


class Setting(Protocol):
    """What a setting must offer. Settings need not inherit from this: it is here to be read.

    One whose rows have own.begin_phase or own.before also offers sample(), batches (img,) of a few training
    images as they are, on which such a row chooses or measures something. One that reads flags which another
    setting adds names them in also_reads. One whose ensembles() have names that do not explain themselves has
    forms, {name: words}, what the log calls them. One that inherits from another must replace add_flags (by
    none, or its own): all settings add theirs to one parser, which refuses a flag that is added twice.
    """

    name: str  # what needs.setting of a row (methods/ka.py) says
    data: Iterable[str]  # names of --data_name, without what follows a colon
    data_help: str  # what --help says of these beside the data sets of all scripts; '' for nothing
    networks: str  # and of the names of networks

    train: Any  # data sets with train_batches, test_batches and steps, see dataset/__init__.py
    val: Any  # None without one, False where --val_split is refused
    test: Any
    nets: list[nn.Module]  # the frozen teachers; may be empty where every student reads labels
    student_name: str
    blocks: list[Tensor]  # of each teacher, where its classes are among the student's; may be empty
    tasks: tuple[str, ...]  # one per teacher and output of the student; may be empty
    key: str  # the figure that chooses best.pt, without test_ or val_; more is better
    shown: Iterable[str]  # the figures in the line of an epoch
    facts: dict  # what results.json says of data and teachers
    recipe: dict  # what changes the numbers of a run beside the flags of all scripts

    @staticmethod
    def add_flags(parser: argparse.ArgumentParser) -> None:
        """Flags of this setting alone."""

    def __init__(self, args: argparse.Namespace, wanted: dict, device, log) -> None:
        """Load the data, load and measure the teachers. wanted: {word of --ka_mode: its row}."""

    def phases(self) -> list[int]:
        """The epoch at which each phase of the training ends."""

    def student(self, method) -> nn.Module:
        """A fresh student for a row."""

    def forward(self, net: nn.Module, batch) -> Any:
        """What losses read of the student, for batch.img."""

    def teachers_on(self, img: Tensor) -> list:
        """The same of every teacher, float32, without gradients."""

    def supervised(self, s: Any, target: Any) -> Tensor:
        """The loss of the reference that reads labels. s: what forward gave; target: of a training batch."""

    def measure(self, net: nn.Module) -> dict[str, float]:
        """{'test_KEY': ..., 'val_KEY': ...}, the figures of an epoch."""

    def details(self, net: nn.Module) -> dict:
        """What results.json says of a trained student beside its figures."""

    def how_to_load(self, net: nn.Module, path: Path) -> str:
        """For the end of the log: what to do with the file of a student's weights."""

    def ensembles(self) -> dict[str, dict]:
        """What the teachers reach side by side, without a student."""
