"""--draw: what students say of a few test images, and their curves, drawn while they train.

In each student's folder: draw/epoch_0010.png and .npz (its arrays), draw/curves.png, and in the end
draw/evolution.png, the first image at the last eight drawn epochs. With --tensorboard the pictures are there,
too. A setting that can be drawn offers shows(net), arrays with a row per image, and drawn(arrays, names of
the rows). Nothing here draws a random number: a run with --draw has the weights of a run without.
"""

import io
from pathlib import Path

import numpy as np

from engine import pictures
from engine.errors import UserError
from engine.flags import positive_int
from engine.processes import rank
from engine.record import output_folder, write_atomic

LAST = 8  # epochs of evolution.png


def add_draw_flag(flag) -> None:
    flag('--draw', type=positive_int, nargs='?', const=1, metavar='N',
         help="every N epochs (1) and in the end, pictures of what students say; in each student's folder, "
              'draw/: dense tasks: image, student, teacher, truth; classes: which part images are sent to; '
              'curves; with --tensorboard there, too; default: none')  # fmt: skip


def check(args, setting: type) -> None:
    if args.draw and not hasattr(setting, 'shows'):
        raise UserError(f'--draw: there is no picture of --data_name {args.data_name} with these methods')


def draw(live, setting, runs: list, rows: list[dict], last: bool) -> None:
    """Pictures of these runs after an epoch, if --draw asks for them; rows: their rows of it."""
    every = live.args.draw
    if not every or not rows or (rows[0]['epoch'] % every and not last):
        return
    for run, row in zip(runs, rows):
        training = run.net.training
        arrays = setting.shows(run.net.eval())  # on all processes, which may share the test images
        run.net.train(training)
        if rank() > 0:
            continue
        folder, epoch = output_folder(run.record.folder / 'draw'), row['epoch']
        if strange := pictures.unknown(arrays):
            live.log(f'{run.name}: {strange} numbers of the pictures are not finite, drawn black')
        picture = setting.drawn(arrays)
        write_atomic(folder / f'epoch_{epoch:04d}.png', pictures.png(picture))
        write_atomic(folder / f'epoch_{epoch:04d}.npz', packed(arrays))
        if live.board:
            live.board.add_image(f'{run.name}/draw', picture, epoch, dataformats='HWC')
        curves([*run.record.history, row], setting.shown, folder / 'curves.png', live.log)
        if last:
            evolution(setting, folder, every, epoch)


def packed(arrays: dict) -> bytes:
    small = {key: x.astype(np.float16) if x.dtype == np.float32 else x for key, x in arrays.items()}
    file = io.BytesIO()
    np.savez_compressed(file, **small)
    return file.getvalue()


def evolution(setting, folder: Path, every: int, epoch: int) -> None:
    """The first image, a row per epoch that this run has drawn; an earlier one may have left others."""
    drawn = sorted({*range(every, epoch + 1, every), epoch})
    files = [path for k in drawn if (path := folder / f'epoch_{k:04d}.npz').exists()][-LAST:]
    kept = []
    for path in files:
        with np.load(path) as file:
            kept.append({key: file[key] for key in file.files})
    whole = {key: np.concatenate([arrays[key][:1] for arrays in kept]) if x.ndim > 1 else x
             for key, x in kept[-1].items()}  # fmt: skip
    names = [f'epoch {int(path.stem.partition("_")[2])}' for path in files]
    write_atomic(folder / 'evolution.png', pictures.png(setting.drawn(whole, names)))


def curves(history: list[dict], shown, path: Path, log) -> None:
    """Losses by term, and each figure that the log shows."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        if len(history) == 1:
            log('no curves: matplotlib is not installed (pip install matplotlib)')
        return
    figures = [f'test_{key}' for key in shown]
    no_term = {'epoch', 'lr', 'seconds'}
    terms = [k for k in history[-1] if k not in no_term and not k.startswith(('test_', 'val_'))]
    fig = Figure(figsize=(3.6 * (1 + len(figures)), 3), layout='constrained')
    axes = fig.subplots(1, 1 + len(figures), squeeze=False)[0]
    for term in terms:
        axes[0].plot([r['epoch'] for r in history if term in r], [r[term] for r in history if term in r],
                     marker='.', label=term)  # fmt: skip
    axes[0].set(title='training losses', xlabel='epoch')
    axes[0].legend(frameon=False, fontsize=8)
    for axis, key in zip(axes[1:], figures):
        axis.plot([r['epoch'] for r in history], [r.get(key, np.nan) for r in history], marker='.')
        axis.set(title=f'{key.removeprefix("test_")}, test', xlabel='epoch')
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.xaxis.get_major_locator().set_params(integer=True)
    file = io.BytesIO()
    fig.savefig(file, dpi=110, format='png')
    write_atomic(path, file.getvalue())
