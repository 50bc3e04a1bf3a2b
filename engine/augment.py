"""The flag --augment, where labels are maps that are changed as their images are."""

import argparse

from engine.errors import UserError
from engine.method_flags import key_values


def add_augment_flag(flag, of: str) -> None:
    flag('--augment', nargs='*', metavar='KEY=VALUE',
         help=f'{of}: zoom, turn, mirror image and labels alike while training, and change colours; '
              'zoom=0.5: a square of this share of the area or more, resized; rotate=5: by up to so many '
              'degrees; jitter=0.2: of brightness, contrast, saturation; pad=0: moved by up to so many '
              'pixels; these are the numbers without words; default: mirrored only')  # fmt: skip


def read_augment(args: argparse.Namespace, size: int) -> tuple:
    """(the view, its numbers) that --augment asks for, (None, None) without."""
    if args.augment is None:
        return None, None
    from dataset.dense_views import chosen_views

    try:
        return chosen_views(key_values(args.augment, '--augment'), size)
    except ValueError as error:
        raise UserError(f'--augment: {error}') from None
