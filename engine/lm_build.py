"""From the flags of train_lm.py to its teachers and students."""

from pathlib import Path

import torch

from dataset import text as texts
from engine import lm as parts
from engine import lm_networks as networks
from engine import session
from engine.device import autocast
from engine.errors import UserError
from engine.lm_setting import BATCH, MAPS_LR, Setting, StepTexts, adamw, draw
from engine.meter import Meter
from engine.method_flags import built_from
from engine.processes import gathered, processes, same_weights
from engine.recipe import resume_point
from engine.record import fingerprint
from models import lm


def make_setting(args, text, device, views, root: Path, log) -> Setting:
    """Teachers and the weights that students start from, trained where no file has them."""
    K, amp = len(text.symbols), autocast(device, args.amp)
    of_text = f'{text.digest}{"" if args.t_steps == 2400 else f"_{args.t_steps}"}'

    def train(size, kind, seed, steps, encode, K, what):
        torch.manual_seed(seed)
        net = lm.build(size, K)
        bar = session.progress_bar(steps, 0, log)

        def batches(step):
            return encode(text.windows(BATCH, draw(kind, seed, step)))

        def shown(step, loss):
            bar.update()
            if step % 50 == 0 and not bar.disable:
                bar.set_postfix_str(f'{what}, loss {loss.item():.3f}')

        net = networks.trained(net, batches, steps, device, shown)
        bar.close()
        return net

    setting = Setting(text, device, amp, args.seed, args.steps, args.batch_size, root, None, None)
    if args.t_model:
        net_t = networks.loaded(args.t_model, text)
    elif text.oracle:
        net_t = text.oracle
    else:
        net_t = networks.kept_or_trained(
            root / f'lm_teacher_{of_text}.pt', 'teacher', log,
            lambda: train('teacher', 7, 0, args.t_steps, setting.asked, K, 'teacher'), text.symbols,
        )  # fmt: skip
    if 'a second vocabulary' in views:
        pairs = setting.pairs = texts.Pairs(text)

        def encode(windows):
            return [part.to(device) for part in pairs.batch(windows)]

        setting.net_pairs = networks.kept_or_trained(
            root / f'lm_teacher_{of_text}_pairs.pt', 'teacher of the second vocabulary', log,
            lambda: train('teacher', 8, 0, args.t_steps, encode, pairs.K, 'second teacher'), pairs.symbols,
        ).to(device).eval().requires_grad_(False)  # fmt: skip
    start = networks.kept_or_trained(
        root / f'lm_start_{text.digest}_{args.init_steps}_s{args.seed}.pt', 'initial student', log,
        lambda: train('student', 9, args.seed, args.init_steps, setting.asked, K, 'initial student'),
        text.symbols,
    )  # fmt: skip
    setting.net_t, setting.start = (net.to(device).eval().requires_grad_(False) for net in (net_t, start))
    if not all(gathered(all(bool(torch.isfinite(out_t).all()) for *_, out_t in setting.exam.parts))):
        raise UserError(f'{args.t_model or "teacher"}: the teacher gives non-finite logits')
    figures, _ = networks.measure(setting.net_t, setting)
    setting.facts = {key.removeprefix('val_'): value for key, value in figures.items()}
    initial, _ = networks.measure(setting.start, setting)
    setting.start_loss = initial['val_loss']
    log('held-out text: teacher ' + short(figures) + '; initial student ' + short(initial))
    return setting


def share(args, method) -> float:
    return method.when.ce if args.lambda_ce is None else args.lambda_ce


def make_run(args, setting, folder, origin, name, method, weight, options) -> parts.Run:
    torch.manual_seed(args.seed)  # a loss's own weights must not depend on the runs built before it
    net, seen = parts.student_of(setting), StepTexts(setting, 0)
    probe = parts.Probe(setting.look(net, seen.x), seen.t, args.steps, seen.second if setting.pairs else None)
    with built_from('--kd_args' if options else '', name):
        kd = method.build(method.loss, probe, **options).to(setting.device)
    same_weights(net, kd)
    groups = [{'params': list(net.parameters()), 'base': args.lr}]
    if maps := list(kd.parameters()):
        groups.append({'params': maps, 'base': MAPS_LR})
    ce, generator = share(args, method), torch.Generator(setting.device)
    meter = Meter(name, 0, setting.device, 'before evaluation')
    if not weight and not ce:
        raise UserError(f'{name}: has nothing to learn: a weight of 0, and no cross-entropy (--lambda_ce)')
    run = parts.Run(name, method, kd, weight, ce, net, adamw(groups), meter, setting,
                    args.lmbda, generator)  # fmt: skip
    run.schedule.update(setting.start_loss)
    second = fingerprint(setting.net_pairs) if 'a second vocabulary' in method.needs.views else None
    recipe = {key: getattr(args, key) for key in
              ('seed', 'steps', 'init_steps', 'batch_size', 'lr', 'eval_every', 'lmbda', 'amp')}  # fmt: skip
    recipe |= {'processes': processes()} if processes() > 1 else {}
    recipe |= {'script': 'train_lm', 'method': name, 'weight': weight, 'ce': ce, 'options': options,
               'corpus': setting.text.digest, 'teacher': fingerprint(setting.net_t),
               'initial': fingerprint(setting.start),
               'second_teacher': second}  # fmt: skip
    state = {'net': net, 'kd': kd, 'opt': run.opt, 'memory': run.memory}
    run.record = networks.TextRecord(
        setting.text.symbols, folder / name, state, recipe, origin, 'val', 'loss'
    )
    run.record.resume(resume_point(args.resume, folder / name))
    if run.record.epoch:
        run.recall()
    return run


def short(row: dict) -> str:
    names = ('loss', 'agreement', 'kl_ts', 'kl_st', 'gen_nll')
    return '  '.join(f'{name} {row[f"val_{name}"]:.3f}' for name in names)
