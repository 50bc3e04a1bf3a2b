"""What the tools for amalgamation losses share (tools/subtask.py, recombination.py, ood_ka.py, detectors):
teachers of class parts, a training loop that resumes, and the rows of a table.

A tool trains several networks one after another, each with a record of its own in a folder of its own. Its
results.json holds `table`, a list of {'row': name, column: number}: `python -m report ka` joins the seeds.
"""

import contextlib
import io
import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

import dataset
import engine.evaluate
import models
from engine.device import refuse_fp16
from engine.errors import NonFinite, UserError, user_errors
from engine.flags import OF_SGD, OF_STEPS, refuse_given
from engine.meter import Meter
from engine.processes import processes
from engine.recipe import forget, resume_point
from engine.record import Record, fingerprint, output_folder, write_json
from engine.session import Log, progress_bar
from engine.teachers import load_teacher
from ka_settings.classes import SideBySide

UNREAD = 'not for this tool, which does not read it'
# flags of all scripts that mean nothing here, and their defaults
NOT_HERE = {'val_split': 0.0, 'schedule': 'steps', 'compile': False, 'tensorboard': False} | OF_STEPS | OF_SGD


def begin(args, name: str, **more) -> tuple[Path, Log]:
    """The output folder and its log. more: further flags that mean nothing here, and their defaults."""
    refuse_processes()
    refuse_given(args, NOT_HERE | more, UNREAD)
    refuse_fp16(args)
    folder = output_folder(Path(args.save_root) / (args.note or name))
    return folder, Log(folder)


def refuse_processes() -> None:
    """Every process would see its share of the data, and nobody would average."""
    if processes() > 1:
        raise UserError('this tool runs in one process only')


def class_teachers(args, train, test, amp, log) -> tuple[dataset.ClassParts, list[nn.Module], list[dict]]:
    """Frozen teachers of one part of the classes each, and what each reaches there."""
    count = len(args.t_model)
    names = args.t_name * count if len(args.t_name) == 1 else args.t_name
    if len(names) != count or count < 2:
        raise UserError(f'--t_model: needs two teachers or more, got {len(names)} names and {count} files')
    with user_errors():
        split = dataset.ClassParts(dataset.split_classes(train.num_classes, count, args.split, args.seed))
    nets, rows = [], []
    for i, (name, path, part) in enumerate(zip(names, args.t_model, split.parts), 1):
        with user_errors():
            net = models.build_for(path, name, len(part))
            mine = dataset.take_classes(test, part)
        read = load_teacher(net, path, mine, amp)
        log(f'teacher {i}, {name}: {read["said"]}; classes {part}, top-1 there {read["top1"]:.2f}')
        nets.append(net)
        rows.append({'name': name, 'classes': part, 'top1': read['top1']})
    return split, nets, rows


def in_order(data, split: dataset.ClassParts):
    """The data with the student's order of classes, which is the teachers', one after another."""
    return dataset.take_classes(data, split.classes)


def part_figures(nets: list[nn.Module], data, split: dataset.ClassParts, amp) -> dict[str, float]:
    """Joint accuracy, and the mean accuracy inside the parts where the part is known."""
    outs, target = engine.evaluate.outputs(SideBySide(nets, amp), data)
    read = split.metrics(outs[0], target)
    known = [read[f'part{i + 1}'] for i in range(len(split.distinct()))]
    return {'top1': read['top1'], 'known': sum(known) / len(known)}


def check_places(args, folder: Path, names: Iterable[str]) -> None:
    """Refuse, before anything is written or trained, where --resume does not fit a folder of these runs; with
    never, forget what lies there."""
    names = list(names)
    with contextlib.redirect_stdout(io.StringIO()):  # what begins is said when it does
        for name in names:
            resume_point(args.resume, folder / name)
    for name in names:  # all at once: a kill must not leave some of them
        forget(args.resume, folder / name)


def record_of(folder: Path, parts: dict, recipe: dict, origin: dict, args, key: str = 'top1') -> Record:
    """A record, continued where --resume says so. parts: {'net': ..., ...}, anything that has state."""
    recipe = recipe | {'initial': fingerprint(parts['net'])}
    record = Record(folder, parts, recipe, origin, 'test', key)
    record.resume(resume_point(args.resume, folder))
    record.begin(args.resume)
    return record


def train(
    record: Record,
    name: str,
    opts: Iterable[torch.optim.Optimizer],
    batches: Callable[[int], Iterable[tuple]],
    steps: int,
    step: Callable[..., dict[str, Tensor]],
    measure: Callable[[], dict[str, float]],
    args,
    log,
    epochs: int | None = None,
    rate: Callable[[float], float] | None = None,
) -> None:
    """Epochs until there are as many as wanted.

    rate: share done -> factor of the learning rates; default a cosine to 0. batches: epoch -> what step is
    called with, one after another. step: makes its own updates, asking sound() before each, and returns
    {'loss': ..., its terms}; what is not finite ends the tool before the update.
    """
    epochs, opts = epochs or args.epochs, list(opts)
    rates = [[group['lr'] for group in opt.param_groups] for opt in opts]
    if record.epoch < epochs:
        log(f'{name}: {record.epoch} of {epochs} epochs done')
    bar = progress_bar(steps * epochs, steps * record.epoch, log)
    for epoch in range(record.epoch, epochs):
        started, meter = time.time(), Meter(name, epoch, torch.device('cpu'))
        torch.manual_seed(args.seed * 1_000_003 + epoch)  # dropout
        for k, batch in enumerate(batches(epoch)):
            factor = (rate or cosine)((epoch + k / steps) / epochs)
            for opt, base in zip(opts, rates):
                for group, lr in zip(opt.param_groups, base):
                    group['lr'] = lr * factor
            try:
                said = step(*batch)
            except NonFinite as error:
                record.save_best()
                where = f'at epoch {epoch + 1}, step {k + 1}'
                raise NonFinite(f'{name}: the loss is not finite {where} ({error})') from None
            meter.add(None, batch[0], **{key: float(value.detach()) for key, value in said.items()})
            bar.update()
        row = {'epoch': epoch + 1, **meter.read(record.parts['net']), **measure()}
        if meter.failure:
            record.save_best()
            raise NonFinite(meter.failure)
        for opt, base in zip(opts, rates):  # a resume starts from the flags' rates
            for group, lr in zip(opt.param_groups, base):
                group['lr'] = lr
        row['seconds'] = time.time() - started
        record.epoch_done(row, save=(epoch + 1) % args.save_every == 0 or epoch + 1 == epochs)
        shown = '  '.join(
            f'{key.removeprefix("test_")} {value:.2f}'
            for key, value in row.items()
            if key.startswith('test_')
        )
        log(f'{name}: epoch {epoch + 1}/{epochs}  loss {row["loss"]:.4f}  {shown}  {row["seconds"]:.0f} s')
    bar.close()


def sound(loss: Tensor, *teachers: Tensor) -> None:
    """Before an update: loss and what teachers say are finite; a masked class (-inf) of a teacher is legal.

    Raises:
        NonFinite: says which is not.
    """
    if any(not (said.detach() < torch.inf).all() for said in teachers):
        raise NonFinite('the teacher gives non-finite logits')
    if not torch.isfinite(loss.detach()):
        raise NonFinite(str(loss.item()))


def refuse_non_finite(loss: Tensor, where: str) -> None:
    """The same of a loss outside of train(), which says itself where that was."""
    if not torch.isfinite(loss.detach()):
        raise NonFinite(f'{where}: the loss is not finite')


def cosine(done: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * done))


def write_table(folder: Path, facts: dict, rows: list[dict], origin: dict, log) -> None:
    """results.json of the tool, and its rows on the screen."""
    write_json(folder / 'results.json', facts | {'table': rows, **origin})
    for row in rows:
        cells = '  '.join(
            f'{key} {value:.2f}' if isinstance(value, float) else f'{key} {value}'
            for key, value in row.items()
            if key != 'row'
        )
        log(f'{row["row"]}: {cells}')
