"""Distil a small language model from a larger one, with any loss for next tokens of kd_losses.

    python train_lm.py --kd_mode ce gkd distillm           three students at once, on Python's own reference
    python train_lm.py --kd_mode fkl --data_name markov    a chain whose exact probabilities are the teacher
    python train_lm.py --kd_mode gkd --lmbda 0.5           half of the steps on what the student writes itself
    python train_lm.py --kd_mode taid --data_name my.txt --steps 2000
    torchrun --nproc_per_node=2 train_lm.py ...            several processes, --batch_size texts each

Without --t_model a teacher is trained first and kept in SAVE_ROOT; markov needs none. All students start from
the same weights, after --init_steps of cross-entropy, and see the same texts and the same teacher forward. A
student's result is bit for bit (on the CPU) the one it gets when trained alone.

Writes to SAVE_ROOT/NOTE: log.txt, args.json, and for each student a folder with last.pt, best.pt, student.pt
(plain weights after the last step), metrics.csv, results.json.
"""

import argparse
import time
from functools import partial
from pathlib import Path

import engine.threads  # noqa: F401  before torch

from torch import nn

from dataset import text as texts
from engine import errors, listing, session
from engine import lm as parts
from engine import lm_networks as networks
from engine.device import refuse_fp16, setup
from engine.errors import UserError, user_errors
from engine.flags import (
    add_board_flag,
    add_machine_flags,
    add_place_flags,
    one_weight,
    positive_float,
    positive_int,
    refuse_given,
    seed_number,
    whole_number,
)
from engine.lm_build import make_run, make_setting, share, short
from engine.lm_setting import BATCH, StepTexts, cross_entropy, set_rates, share_of_rate
from engine.method_flags import refuse_repeated, refuse_unknown, weights_and_options
from engine.parser import Parser
from engine.processes import averaged, processes, rank
from engine.record import output_folder, provenance
from engine.session import Log
from methods import LM

# views of a row that texts of the student's own, --lmbda, do not go with
NO_OWN_TEXTS = {'texts of teacher and student': 'has texts of its own',
                'a second vocabulary': 'reads texts of the data alone, in two vocabularies'}  # fmt: skip


def lmbda(text: str) -> float | str:
    try:
        if text == 'adaptive' or 0 <= float(text) <= 1:
            return text if text == 'adaptive' else float(text)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f'expected a share from 0 to 1, or adaptive, got {text!r}')


def parse_args(words=None):
    parser = Parser(__doc__)
    # fmt: off
    flag = parser.add_argument_group('distillation').add_argument
    flag('--kd_mode', nargs='+', required=True, metavar='METHOD', action=listing.lists(LM),
         help='one student per word; list: print all methods, what they need, their weights and arguments')
    flag('--lambda_kd', nargs='+', default=[], metavar='W',
         help="weight of the loss: a number, or METHOD=number with several methods; default: the method's, "
              'see --kd_mode list')
    flag('--lambda_ce', type=one_weight, metavar='W',
         help='weight of cross-entropy; default: 0, or what the method says')
    flag('--kd_args', nargs='+', default=[], metavar='KEY=VALUE',
         help='arguments of the loss, e.g. beta=0.1, or METHOD.KEY=VALUE with several methods')
    flag('--lmbda', type=lmbda, default=0.0, metavar='SHARE',
         help='share of the steps whose text the student writes itself, after prompts of the data, the '
              "teacher correcting it; adaptive: as DistiLLM's schedule says; default 0")
    flag('--t_model', metavar='FILE',
         help='weights of the teacher, a decoder of models/lm.py; default: see above; uld and dskd_cma are '
              'compared with it, and learn from another one, of a second vocabulary, which is trained first')
    flag = parser.add_argument_group('text').add_argument
    flag('--data_name', default='pydoc', metavar='NAME',
         help="pydoc (the language reference that Python carries), markov or markov:K (a chain over 8 or K "
              'symbols), or a file of UTF-8 text; the last tenth is held out; default pydoc')
    flag = parser.add_argument_group('recipe').add_argument
    flag('--steps', type=positive_int, default=600, help='steps of each student, default 600')
    flag('--init_steps', type=whole_number, default=500,
         help='steps of cross-entropy before, once for all students; default 500')
    flag('--t_steps', type=positive_int, default=2400, help="the teacher's steps, default 2400")
    flag('--batch_size', type=positive_int, default=BATCH,
         help=f'texts of a step, of each process; {BATCH} for teachers and the start; default {BATCH}')
    flag('--lr', type=positive_float, default=2e-3,
         help='highest learning rate of the students, default 0.002; 0.003 before, and for the teacher')
    flag('--eval_every', type=positive_int, default=200, metavar='N',
         help='look at the held-out text and write last.pt every N steps: a kill loses up to N; default 200')
    flag('--seed', type=seed_number, default=2, help='of weights, texts and samples, default 2')
    # fmt: on
    add_machine_flags(parser)
    flag = add_place_flags(parser)
    add_board_flag(flag)
    flag('--dry_run', action='store_true', help='say what would be trained, and end')
    return parser.parse_args(words)


def read_methods(args) -> dict[str, tuple]:
    """{name: (row, weight, options)}"""
    refuse_unknown('--kd_mode', args.kd_mode, LM)
    refuse_repeated('--kd_mode', args.kd_mode)
    for name in args.kd_mode:
        for view in LM[name].needs.views if args.lmbda else ():
            if view in NO_OWN_TEXTS:
                raise UserError(f'--lmbda: {name} {NO_OWN_TEXTS[view]}: leave --lmbda out')
    if not any(LM[name].needs.teacher for name in args.kd_mode):
        refuse_given(args, {'lmbda': 0.0}, f'{" ".join(args.kd_mode)} has no teacher to correct its own text')
    refuse_fp16(args)
    weights, options = weights_and_options(args, args.kd_mode, LM)
    for name, weight in weights.items():
        if weight and not LM[name].needs.teacher:
            raise UserError(f'--lambda_kd: {name} has no teacher and so no weight, --lambda_ce is its own')
    return {name: (LM[name], weights[name], options[name]) for name in args.kd_mode}


def main():
    args = parse_args()
    wanted = read_methods(args)
    device = setup(args)
    with user_errors():
        text = texts.load(args.data_name)
    views = {view for method, *_ in wanted.values() for view in method.needs.views}
    if 'hidden states' in views and text.oracle and not args.t_model:
        raise UserError(f'--data_name {args.data_name}: its teacher has no hidden states; give --t_model')
    facts = f'{text.name}: {len(text.ids)} symbols, {len(text.symbols)} different ones, hash {text.digest}'
    facts += f'; {text.replaced:.1%} of the characters became blanks' if text.replaced else ''
    if (args.t_model or text.oracle) and 'a second vocabulary' not in views:
        refuse_given(args, {'t_steps': 2400}, 'no teacher is trained here')
    if args.dry_run:
        if rank() > 0:
            return
        print(f'{facts}; {args.init_steps} + {args.steps} steps, seed {args.seed}')
        for name, (method, weight, options) in wanted.items():
            print(f'{name:12s} weight {weight:g}, cross-entropy {share(args, method):g}  {options or ""}')
        return
    root = Path(args.save_root)
    name = f'lm-{Path(text.name).name.replace(":", "")}-s{args.seed}'
    folder = output_folder(root / (args.note or name))
    log, origin = Log(folder), provenance(device)
    log(facts)

    setting = make_setting(args, text, device, views, root, log)
    runs = [make_run(args, setting, folder, origin, name, *row) for name, row in wanted.items()]
    records = [run.record for run in runs]
    live, segments = session.start_by_steps(args, log, origin, records, val=True, what='texts')
    for segment in segments:
        started = time.time()
        begun = active = [run for run in runs if run.record.epoch == segment]  # a kill left others ahead
        for run in active:
            run.net.train()
            run.kd.train()
            run.meter.reset(segment)
        last = min((segment + 1) * args.eval_every, args.steps)
        for step in range(segment * args.eval_every, last):
            seen = StepTexts(setting, step)
            for run in active:
                train_student(run, seen)
            live.bar.update()
            active = [run for run in active if not run.meter.failure]  # a failed student stops, others go on
        rows = {run.name: {'epoch': segment + 1, 'step': last, **run.meter.read(run.net)} for run in begun}
        session.drop_failed(live, begun, runs)
        done = []
        for run in begun:
            run.net.eval()
            figures, run.shown = networks.measure(run.net, setting)
            run.schedule.update(figures['val_loss'])
            run.remember()
            row = rows[run.name] | figures | {'seconds': time.time() - started}
            done.append((run.record, row, partial(line, run, args.steps), f'{run.name}/'))
        if code := session.end_epoch(live, segment, segment + 1 == live.epochs, done):
            return code
        if not runs:
            break

    done = []
    for run in runs:
        if not hasattr(run, 'shown'):  # finished before
            run.shown = networks.measure(run.net.eval(), setting)[1]
        facts = {'script': 'train_lm', 'method': run.name, 'student': 'decoder', 'data': text.name,
                 'corpus': text.digest, 'entropy': text.entropy, 'seed': args.seed, 'steps': args.steps,
                 'teacher': setting.facts, 'trained_with': list(wanted), 'processes': processes(),
                 'sample': run.shown}  # fmt: skip
        path = folder / run.name / 'student.pt'
        end = f'{run.name} writes: {run.shown!r}; weights: {path}; {how_to_load(text)}'
        done.append((run.record, path.name, facts, run.name, end))
    session.finish(live, done)


def train_student(run: parts.Run, seen: StepTexts) -> None:
    """One step of one student: its text, forward, backward, update."""
    data, own = run.data(seen)
    s = run.look(data.x)
    ce = cross_entropy(s.out, data.target)
    loss, terms = 0.0, {'ce': ce}
    if run.ce and not own:  # its own text is no label
        loss = run.ce * ce
    if run.weight:
        terms['kd'] = run.method.feed(run.kd, s, data.t, parts.Batch(run, seen, data))
        loss = loss + run.weight * terms['kd']
    if not run.meter.guard(loss, run.opt, *([data.t.out] if run.weight else [])):
        return
    run.opt.zero_grad(set_to_none=True)
    loss.backward()
    learnt = [p for group in run.opt.param_groups for p in group['params']]
    averaged(learnt)
    nn.utils.clip_grad_norm_(learnt, 1.0)
    set_rates(run.opt, share_of_rate(seen.step, run.setting.steps))
    run.opt.step()
    run.meter.add(None, data.target, **terms)


def how_to_load(text) -> str:
    """For the log: the network of a file of weights, and the symbols that it reads."""
    symbols = f'dataset.text.load({text.name!r}).symbols'
    return f'models.lm.from_state(torch.load(path)) is the network, {symbols} are what it reads and writes'


def line(run: parts.Run, steps: int, row: dict) -> str:
    return f'step {row["step"]}/{steps}  {run.name:12s} {short(row)}  {row["seconds"]:.0f} s'


if __name__ == '__main__':
    errors.run(main)
