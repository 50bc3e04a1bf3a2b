"""A listener teaches a reader: a network that hears digit strings teaches one that sees them (libs, c2kd).

    python tools/sequences.py --kd_mode audio --note listener
    python tools/sequences.py --kd_mode alone libs c2kd --labels 200 --batch_size 32 \\
        --t_model save/listener/audio/net.pt --note readers

The data is embedded (dataset/digits.py): noisy videos of digit strings, and the tones of the same strings.
audio trains the teacher, alone the student from labels only; libs and c2kd distil, transcripts learns what
the teacher writes as if it were the truth; all students from the same weights and in the same order of
batches. What counts are strings that the network writes by itself, symbol after symbol: characters right (100
minus the error rate) and whole strings right.

With --labels N only the first N training strings have a text. A step then takes a batch of those, for
cross-entropy, and one of all strings, for distillation: where there is no text the decoder is given what the
teacher writes. For libs and c2kd strings of the second batch that have a text count in cross-entropy, too.
alone takes the first batch only, the same as the others.

Writes to SAVE_ROOT/NOTE: log.txt, args.json, and for each network a folder with last.pt (continued by
--resume auto), best.pt, net.pt, metrics.csv, results.json.
"""

import copy
import math
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import engine.threads  # noqa: E402, F401  before torch

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import nn  # noqa: E402

from dataset.digits import BINS, END, SIZE, digits  # noqa: E402
from engine import errors, session  # noqa: E402
from engine.device import refuse_amp, setup  # noqa: E402
from engine.errors import UserError, user_errors  # noqa: E402
from engine.flags import (  # noqa: E402
    add_machine_flags,
    add_output_flags,
    positive_float,
    positive_int,
    seed_number,
    share_of_ce,
)
from engine.meter import Meter  # noqa: E402
from engine.method_flags import refuse_repeated  # noqa: E402
from engine.optimise import adam  # noqa: E402
from engine.parser import Parser  # noqa: E402
from engine.recipe import resume_point  # noqa: E402
from engine.record import Record, fingerprint, output_folder, provenance  # noqa: E402
from kd_losses.c2kd import DSA, ESA, smoothed_ce  # noqa: E402
from kd_losses.libs import LIBS, lcs_pairs  # noqa: E402
from models.checkpoint import read_checkpoint  # noqa: E402
from models.seq2seq import Read, Seq2Seq  # noqa: E402

MODES = ('audio', 'alone', 'transcripts', 'libs', 'c2kd')
TAUGHT = {'transcripts': (), 'libs': ('out', 'seq', 'frm', 'ctx'), 'c2kd': ('out', 'enc', 'dec', 'cross')}


def parse_args(words=None):
    parser = Parser(__doc__)
    # fmt: off
    flag = parser.add_argument
    flag('--kd_mode', nargs='+', required=True, choices=MODES, metavar='METHOD',
         help='networks to train; audio: the teacher; alone: the student from labels; transcripts: from '
              'what the teacher writes, too; libs, c2kd: distilled')
    flag('--t_model', metavar='FILE', help='net.pt of an earlier audio, for transcripts, libs and c2kd')
    flag('--lambda_kd', type=share_of_ce, default=1.0, metavar='W',
         help="factor on the loss of libs and on the two of c2kd; 1: the papers' weights; default 1")
    flag('--w_frame', type=share_of_ce, default=10.0, metavar='W',
         help="libs: weight of its frames; default 10, the paper's")
    flag('--ce_floor', type=share_of_ce, default=0.0, metavar='W',
         help="c2kd: least weight of cross-entropy; the paper's falls to 0 as soon as about two in three "
              'symbols are right; default 0')
    flag('--train', type=positive_int, default=2000, metavar='N', help='training strings, default 2000')
    flag('--labels', type=positive_int, metavar='N',
         help='training strings that have a text; default all; with fewer, batches are twice as large')
    flag('--test', type=positive_int, default=500, metavar='N', help='test strings, default 500')
    flag('--noise', type=share_of_ce, default=0.3, help="deviation of the video's noise, default 0.3")
    flag('--s_width', type=positive_int, default=32, help="width of the student's layers, default 32")
    flag('--t_width', type=positive_int, default=48, help="width of the teacher's layers, default 48")
    flag('--epochs', type=positive_int, default=12, help='default 12')
    flag('--batch_size', type=positive_int, default=64, help='default 64')
    flag('--lr', type=positive_float, default=4e-3, help="Adam's; up over a tenth of the run, then "
         'down to 0; default 0.004')
    flag('--seed', type=seed_number, default=1, help='of initial weights and batches, default 1')
    # fmt: on
    add_machine_flags(parser)
    add_output_flags(parser)
    return parser.parse_args(words)


def main():
    args = parse_args()
    refuse_repeated('--kd_mode', args.kd_mode)
    taught = [mode for mode in args.kd_mode if mode in TAUGHT]
    args.labels = args.labels or args.train
    if args.labels > args.train:
        raise UserError(f'--labels {args.labels}: more than the training strings, --train {args.train}')
    if taught and not args.t_model:
        raise UserError(f'{" ".join(taught)}: a teacher is needed, --t_model FILE of --kd_mode audio')
    refuse_amp(args)
    device = setup(args)
    folder = output_folder(Path(args.save_root) / (args.note or f'sequences-s{args.seed}'))
    log, origin = session.Log(folder), provenance(device)
    train, test = (digits(n, which, args.noise).to(device) for n, which in ((args.train, 0), (args.test, 1)))
    log(f'digits: {len(train)} ({args.labels} with a text) + {len(test)} strings, {device}')

    teacher, heard = None, None
    if args.t_model:
        teacher = load_teacher(args, device)
        heard = write(teacher, train, 'sound')  # what it understands of the training strings
        figures = {'train': right(heard, train.text), 'test': right(write(teacher, test, 'sound'), test.text)}
        log('teacher: characters right: {train:.2f} in training, {test:.2f} in the test'.format(**figures))
        train.text[args.labels :] = heard[args.labels :]
    torch.manual_seed(args.seed)
    with user_errors():
        student = Seq2Seq(SIZE * SIZE, END + 1, args.s_width)
        listener = Seq2Seq(BINS, END + 1, args.t_width)
    nets = {mode: copy.deepcopy(listener if mode == 'audio' else student) for mode in args.kd_mode}
    facts_t = {'teacher_weights': fingerprint(teacher), 'teacher_right': figures['test']} if teacher else {}
    runs = [Run(mode, net.to(device), args, folder, origin, facts_t) for mode, net in nets.items()]
    for run in runs:
        run.taught = watch(teacher, train, heard if run.name == 'libs' else train.text, TAUGHT.get(run.name))

    steps = -(-len(train) // args.batch_size)
    start = min(run.record.epoch for run in runs)
    records = [run.record for run in runs]
    live = session.start(args, log, origin, records, val=None, done=start, epochs=args.epochs, steps=steps)
    for epoch in range(start, args.epochs):
        done = []
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + epoch)
        order = torch.randperm(len(train), generator=generator).split(args.batch_size)
        known = labelled(order, args, generator)
        begun = [run for run in runs if run.record.epoch == epoch]  # a kill left others ahead
        for run in begun:
            started = time.time()
            run.meter.reset(epoch)
            run.net.train()
            for number, index in enumerate(known):
                set_rate(run.opt, args.lr, (epoch * steps + number + 1) / (args.epochs * steps))
                if run.name in TAUGHT and args.labels < args.train:
                    index = torch.cat([index, order[number]])
                index = index.to(device)
                said = heard[index] if run.name == 'libs' else None
                train_step(run, train.part(index), index, said, args)
                if run.meter.failure:
                    break
                if run is begun[0]:
                    live.bar.update()
            row = {'epoch': epoch + 1, **run.meter.read(run.net)}
            if not run.meter.failure:
                said = write(run.net.eval(), test, run.sense)
                row |= {'test_right': right(said, test.text), 'test_whole': whole(said, test.text)}
            done.append((run, row | {'seconds': time.time() - started}))
        rows = {run.name: row for run, row in done}
        session.drop_failed(live, begun, runs)
        kept = [(run.record, rows[run.name], run.line(args.epochs), f'{run.name}/') for run in begun]
        if code := session.end_epoch(live, epoch, epoch + 1 == args.epochs, kept):
            return code
        if not runs:
            break
    session.finish(live, [(run.record, 'net.pt', run.facts(args), run.name, '') for run in runs])


class Run:
    """One network in training: what belongs to it and to no other."""

    def __init__(self, name: str, net: nn.Module, args, folder: Path, origin: dict, facts_t: dict) -> None:
        self.name, self.net, self.sense = name, net, 'sound' if name == 'audio' else 'video'
        self.teacher = facts_t if name in TAUGHT else {}
        self.taught = None  # see watch
        names = ('train', 'test', 'noise', 's_width', 't_width', 'epochs', 'batch_size', 'lr', 'seed')
        names += ('lambda_kd',) * (name in ('libs', 'c2kd')) + ('ce_floor',) * (name == 'c2kd')
        names += ('w_frame',) * (name == 'libs' and args.w_frame != 10)  # older checkpoints do not know it
        names += ('labels',) * (args.labels < args.train)  # nor this
        recipe = {key: getattr(args, key) for key in names} | self.teacher
        recipe |= {'script': 'sequences', 'method': name, 'initial': fingerprint(net)}
        torch.manual_seed(args.seed + 1)  # the maps of libs, whatever is trained beside it
        self.kd = (
            LIBS(args.s_width, args.t_width, w_frame=args.w_frame)
            if name == 'libs'
            else nn.ModuleList([DSA(), ESA()])
        )
        self.kd.to(next(net.parameters()).device)
        self.opt = adam([*net.parameters(), *self.kd.parameters()], args.lr)
        self.meter = Meter(name, 0, next(net.parameters()).device)
        parts = {'net': net, 'kd': self.kd, 'opt': self.opt}
        self.record = Record(folder / name, parts, recipe, origin, 'test', 'right')
        self.record.resume(resume_point(args.resume, folder / name))

    def line(self, epochs: int):
        return lambda row: (
            f'epoch {row["epoch"]}/{epochs}  {self.name:6s} ce {row["ce"]:.4f}  characters right '
            f'{row["test_right"]:.2f}  strings right {row["test_whole"]:.2f}  {row["seconds"]:.0f} s'
        )

    def facts(self, args) -> dict:
        return {'script': 'sequences', 'method': self.name, 'sense': self.sense, 'data': 'digits',
                'seed': args.seed, 'epochs': args.epochs, **self.teacher,
                'parameters': sum(p.numel() for p in self.net.parameters())}  # fmt: skip


def train_step(run: Run, batch, index, heard, args) -> None:
    """Forward, backward, update.

    index: (B,) the numbers of these strings; heard: (B, L) what the teacher writes of them by itself.
    """
    given, target = shifted(batch.text), batch.text
    if run.name != 'transcripts':  # for cross-entropy
        target = torch.where((index < args.labels)[:, None], target, -1)
    s, t = run.net(getattr(batch, run.sense), getattr(batch, f'{run.sense}_len'), given), None
    if run.name == 'c2kd':  # its cross-entropy has smooth labels
        ce = smoothed_ce(s.out, target)
    else:
        ce = F.cross_entropy(s.out.flatten(0, 1), target.flatten(), ignore_index=-1)
    loss, terms = ce, {'ce': ce}
    if run.taught:
        t = run.taught.part(index)
    if run.name == 'libs':
        pairs = [lcs_pairs(said, true) for said, true in zip(strings(heard), strings(batch.text))]
        masks = (within(frm, length) for frm, length in ((s.frm, batch.video_len), (t.frm, batch.sound_len)))
        terms['libs'] = run.kd(s.seq, t.seq, s.ctx, t.ctx, s.frm, t.frm, pairs, *masks)
        loss = ce + args.lambda_kd * terms['libs']
    if run.name == 'c2kd':
        known = target != -1
        # of symbols, the truth before each
        err = float((s.out.argmax(dim=2) != target)[known].float().mean())
        valid = batch.text != -1
        loss, terms['dsa'], terms['esa'] = attention_losses(run.kd, s, t, batch, valid, err, ce, args)
    if not run.meter.guard(loss, run.opt, *([t.out] if t else [])):
        return
    run.opt.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_([*run.net.parameters(), *run.kd.parameters()], 1.0)
    run.opt.step()
    run.meter.add(None, target, **terms)


def attention_losses(kd, s, t, batch, valid, err: float, ce, args):
    """The paper's sum, over first and last layer: max(1 - alpha - beta, 0) CE + alpha DSA + ESA."""
    dsa_of, esa_of = kd
    alpha, beta = 0.3, math.exp(-esa_of.gamma * err)
    rows = valid[:, None, :, None]  # padded with 0, as the paper's
    lengths = batch.video_len, batch.sound_len, valid.sum(dim=1)
    dsa = sum(dsa_of(s.dec[k] * rows, t.dec[k] * rows) for k in (0, -1))
    esa = sum(esa_of(s.enc[k], s.cross[-1], t.enc[k], t.cross[-1], *lengths, err) for k in (0, -1))
    weight = max(1 - alpha - beta, args.ce_floor)
    return weight * ce + args.lambda_kd * (alpha * dsa + esa), dsa, esa


def load_teacher(args, device) -> nn.Module:
    with user_errors():
        state = read_checkpoint(Path(args.t_model))
        try:
            net = Seq2Seq(BINS, END + 1, state['symbol.weight'].shape[1])
            net.load_state_dict(state)
        except (KeyError, RuntimeError, AttributeError):
            raise UserError(f'--t_model {args.t_model}: is no net.pt of --kd_mode audio') from None
    if net.width != args.t_width:
        raise UserError(f'--t_model {args.t_model}: its width is {net.width}: say --t_width {net.width}')
    return net.to(device).eval().requires_grad_(False)


@torch.no_grad()
def watch(teacher, data, text, names):
    """What the teacher, which never changes, does at all strings while it is given this text; see TAUGHT."""
    if not names:
        return None
    parts = zip(data.sound.split(250), data.sound_len.split(250), shifted(text).split(250))
    return Read.join([teacher(*part) for part in parts], names)


def labelled(order, args, generator) -> list:
    """As many batches as there are in order, but of strings with a text, each as often as the others."""
    if args.labels == args.train:
        return order
    rounds = -(-len(order) * args.batch_size // args.labels)
    often = torch.cat([torch.randperm(args.labels, generator=generator) for _ in range(rounds)])
    return often.split(args.batch_size)[: len(order)]


def shifted(text):
    """What a decoder is given: END, then all symbols but the last; padding becomes END."""
    begin = torch.full_like(text[:, :1], END)
    return torch.where(text < 0, END, torch.cat([begin, text[:, :-1]], dim=1))


def strings(text) -> list[list[int]]:
    return [[symbol for symbol in row if symbol >= 0] for row in text.tolist()]


def within(frm, length):
    return torch.arange(frm.shape[1], device=frm.device) < length[:, None]


def set_rate(opt, lr: float, done: float) -> None:
    for group in opt.param_groups:
        group['lr'] = lr * min(done / 0.1, (1 - done) / 0.9 + 1e-3)


def write(net, data, sense: str):
    """(n, L): what the network makes of every sample by itself."""
    frames, length = getattr(data, sense), getattr(data, f'{sense}_len')
    steps = data.text.shape[1]
    parts = zip(frames.split(250), length.split(250))
    return torch.cat([net.greedy(some, lengths, steps) for some, lengths in parts])


def right(said, text) -> float:
    """100 minus the character error rate in percent, END left out; below 0 where there are more errors."""
    pairs = [([c for c in a if c != END], [c for c in b if c != END])
             for a, b in zip(strings(said), strings(text))]  # fmt: skip
    return 100 - 100 * sum(edits(a, b) for a, b in pairs) / sum(len(b) for _, b in pairs)


def whole(said, text) -> float:
    return 100 * sum(a == b for a, b in zip(strings(said), strings(text))) / len(text)


def edits(a: list[int], b: list[int]) -> int:
    """Insertions, deletions and replacements between two strings."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        last, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (x != y))
    return row[-1]


if __name__ == '__main__':
    errors.run(main)
