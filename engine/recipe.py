"""The flags that change the numbers of a run, and where a run goes on that has the same ones."""

import argparse
from pathlib import Path

from engine.errors import UserError, user_errors
from engine.processes import processes, rank
from models.checkpoint import compare_classes, read_checkpoint

# flags that a recipe names only where they are not at their defaults: older checkpoints do not know them
# (batch_size: those of train_lm.py; ce_scheduled: False where --lambda_ce replaces a method's schedule;
# labels, w_frame: tools/sequences.py and graphs.py, whose recipes name labels only where some are hidden)
NEWER = {'compile': False, 'schedule': 'steps', 'phases': 'before', 'ramp_epochs': None, 'nesterov': True,
         'pad': 'reflect', 't_mean': None, 't_std': None, 'kd_stop': None, 'optim': 'sgd',
         'select': 'saliency', 'labelled': None, 'augment': None, 'bn_l1': 0.0, 'processes': 1,
         'stage': 'search', 'batch_size': 12, 'ce_scheduled': True,
         'labels': None, 'w_frame': 10}  # fmt: skip


# what checkpoints did not say at first, whatever it was
LATER = ('own_images', 'limit_test', 'image_size', 'soft_labels', 'own_scale', 'own_unlabelled', 'own_ood')

# keys that are no flags, as a refusal names them; of digests and fingerprints the values say nothing
WORDS = {
    'own_images': 'the images of --img_root are others',
    'own_scale': 'mean and std of the images of --img_root are others',
    'own_unlabelled': 'the images without labels are others',
    'own_ood': 'the images of another domain are others',
    'teacher_weights': 'the teacher (--t_model, or the labels of --soft_labels) is another',
    'labelled_drawn': 'the pictures with labels are drawn by chance now, that run saw the first ones',
    'initial': 'the initial weights are others',
    'methods': 'weights, arguments or stages of methods differ: was {1!r}, is {2!r}',
    'ce': '--lambda_ce, the weight of cross-entropy, was {1!r}, is {2!r}',
    'before': '--pretrain_epochs or --init_epochs differ: was {1!r}, is {2!r}',
}

# what a run writes of its training
WRITTEN = ('last.pt', 'best.pt', 'results.json', 'metrics.csv', 'net.pt', 'net[0-9]*.pt', 'student.pt',
           'peers.pt', 'ka.pt', 'epoch[0-9]*.pt')  # fmt: skip


def math_args(args: argparse.Namespace, **more) -> dict:
    """The flags that change the numbers of a run, as plain values; a digest of the user's own images."""
    names = ('data_name', 'image_size', 'val_split', 'epochs', 'batch_size', 'lr', 'milestones', 'lr_decay',
             'momentum', 'weight_decay', 'seed', 'amp')  # fmt: skip
    chosen = {name: getattr(args, name) for name, default in NEWER.items()
              if getattr(args, name, default) != default}  # fmt: skip
    own = {key: getattr(args, key) for key in ('own_images', 'own_scale') if getattr(args, key, None)}
    return {name: getattr(args, name) for name in names} | {'processes': processes()} | chosen | own | more


def load_checkpoint(path: Path, math_args: dict, class_names: list[str] | None = None) -> dict:
    """A checkpoint of ours, refused when its run differs in anything that changes the numbers.

    class_names: of the data, in the order of the labels; None: they have none.
    """
    with user_errors():
        content = read_checkpoint(path)
    if not isinstance(content.get('args'), dict) or 'epoch' not in content:
        raise UserError(f'{path}: is not a checkpoint of this script')
    with user_errors():
        compare_classes(path, content.get('origin', {}).get('class_names'), class_names)
    old = content['args']
    new = math_args | {k: default for k, default in NEWER.items() if k in old and k not in math_args}
    new = {k: v for k, v in new.items() if k in old or k not in LATER}
    folder = str(new.get('data_name', 'folder')).partition(':')[0] == 'folder'
    unread = () if folder else ('image_size', 'convert_rgb')  # older recipes note what nothing read
    new = {k: v for k, v in new.items() if k not in unread}
    differ = [k for k, v in new.items() if old.get(k) != v]
    if differ:
        said = [WORDS.get(k, '{} was {!r}, is {!r}').format(k, old.get(k, NEWER.get(k)), new[k])
                for k in differ if k != 'own_scale' or 'own_images' not in differ]  # fmt: skip
        hint = ''
        weights = {'--init': 'net.pt', '--s_init': 'student.pt', '--net_inits': 'net[0-9]*.pt'}
        found = {flag: sorted(map(str, path.parent.glob(name))) for flag, name in weights.items()}
        finished = [f'{flag} {" ".join(files)}' for flag, files in found.items() if files]
        length = next((key for key in ('epochs', 'steps') if key in math_args), 'epochs')
        if finished and math_args.get(length, 0) > old.get(length, math_args.get(length, 0)):
            hint = '; this run is finished, and its learning rates belong to its length'
            if math_args.get('script') != 'train_lm':  # which has no flag for weights to start from
                hint += f': to go on from its weights, start another one, --note NAME {finished[0]}'
        remedy = '--note NAME starts another run, --resume never overwrites this one'
        raise UserError(f'{path}: cannot resume, {"; ".join(said)}{hint}; {remedy}')
    return content


def resume_point(choice: str | None, folder: Path) -> Path | None:
    """The checkpoint that --resume asks to continue in this run's folder; None starts from scratch."""
    last = folder / 'last.pt'
    if choice == 'auto':
        return last if last.exists() else None
    if choice == 'never':
        return None
    if choice is not None:  # a file, a run's folder, or the folder of a group of runs
        candidates = [Path(choice), Path(choice) / 'last.pt', Path(choice) / folder.name / 'last.pt']
        for path in candidates:
            if path.is_file():
                if last.exists() and last.resolve() != path.resolve():
                    raise UserError(
                        f'--resume {choice}: {folder} already holds another run, --note NAME starts a folder'
                    )
                return path
        if not last.exists() and any(Path(choice).glob('*/last.pt')):  # a group's folder
            if rank() == 0:
                print(f'--resume {choice}: there is no run {folder.name}, it begins')
            return None
        raise UserError(
            f'--resume {choice}: no checkpoint there, looked for {", ".join(map(str, candidates))}'
        )
    if last.exists():
        raise UserError(
            f'{folder} already holds a run: --resume auto continues it, --resume never overwrites it, '
            f'--note NAME starts another one'
        )
    return None


def forget(choice: str | None, folder: Path) -> None:
    """With --resume never, remove what an earlier run left: a stopped one must not have another's weights."""
    if choice == 'never' and rank() == 0:
        for path in [path for name in WRITTEN for path in folder.glob(name)]:
            path.unlink(missing_ok=True)
