"""The data sets that the flags ask for, what is left of them to train with, and each process's part."""

import argparse
from collections.abc import Callable

import torch

import dataset
from engine.errors import UserError, user_errors
from engine.flags import refuse_given
from engine.processes import processes, rank
from engine.sources import some


def read_data(args: argparse.Namespace, device: torch.device):
    """(training set, test set), whole."""
    return _read(dataset.load, args, device)


def read_test(args: argparse.Namespace, device: torch.device):
    """The test set alone: nothing of the training set is looked at."""
    return _read(dataset.load_test, args, device)


def _read(load: Callable, args: argparse.Namespace, device: torch.device):
    folder_only = {'image_size': args.image_size, 'workers': args.workers, 'convert_rgb': args.convert_rgb}
    with user_errors():
        sets = load(args.data_name, args.img_root, device, **folder_only)
    if isinstance(sets[1] if isinstance(sets, tuple) else sets, dataset.Resident):
        why = f'{args.data_name} is read as it is, the flag is for a folder of images'
        refuse_given(args, {'image_size': 224, 'convert_rgb': False}, why)
    return sets


def load_data(args: argparse.Namespace, device: torch.device, log: Callable = lambda line: None):
    """(training set, validation set or None, test set) as the flags say."""
    train, test = read_data(args, device)
    for note in getattr(test, 'notes', ()):
        log(note)
    if args.pad != 'reflect' and not isinstance(train, dataset.Resident):
        raise UserError(f'--pad {args.pad}: {args.data_name} is cropped at random sizes, without padding')
    train.pad = args.pad
    args.own_images = train.digest() if dataset.owned(args.data_name) else None
    args.own_scale = own_scale(args.data_name, train)
    val = None
    if args.val_split:
        train, val = train.split(args.val_split, args.seed)
        val = labelled_part(val)
    if getattr(args, 'labelled', None):
        train = dataset.forget_labels(train, args.labelled, args.seed)
    if args.batch_size > len(train):
        raise UserError(f'--batch_size {args.batch_size}: the training set has {len(train)} images only')
    share(train, val, test)
    return train, val, test


def own_scale(name: str, data) -> list | None:
    """Mean and std of images of one's own, for models.named_weights; None where the data's name says them."""
    if not (dataset.owned(name) and isinstance(data, dataset.Resident)):
        return None
    return [[float(x) for x in part] for part in (data.mean, data.std)]


def labelled_part(data):
    with user_errors():
        return dataset.only_labelled(data)


def which_images(args: argparse.Namespace, train) -> dict:
    """What the recipe of a tool with data of its own says of them, read but not yet cut: see recipe.LATER."""
    owned = dataset.owned(args.data_name)
    return {'image_size': args.image_size, 'own_images': train.digest() if owned else None}


def first_images(data, n: int, name: str):
    """n images of the data called `name`, for a short look: the first, but of the user's own, which may lie
    class by class, some that are drawn, alike in every run."""
    if dataset.owned(name):
        return some(data, n, 0)
    return data if n >= len(data) else data.subset(torch.arange(n, device=data.device))


def refuse_too_few(train, batch_size: int) -> None:
    """Once it is known which images train: two classes to tell apart, two images in every batch."""
    if train.num_classes < 2:
        name = f' ({train.class_names[0]})' if train.class_names else ''
        raise UserError(
            f'one class only{name}: there is nothing to tell apart; choose more classes (images of your own: '
            f'one folder per class right below IMG_ROOT/train)'
        )
    if batch_size < 2:
        raise UserError('--batch_size 1: batch norm and relations within a batch need two images')
    if not train.steps(batch_size):
        raise UserError(f'{len(train)} training images are left, every process needs two')


def share(*sets) -> None:
    """Tell data sets which part of every batch is this process's."""
    for data in sets:
        if data:
            data.shard = (rank(), processes())
