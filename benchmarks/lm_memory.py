"""Peak memory and time of the losses for language models, in chunks of positions and in the plain form.

    python -m benchmarks.lm_memory --out results/benchmarks-lm.json         256 x 150,000 logits, some minutes
    python -m benchmarks.lm_memory --losses gkd --tokens 4096 --no_plain    what a long context needs

Logits are bfloat16 and are counted: those of student and teacher, and the gradient. Each row is a process
of its own, forward and backward once; its peak is that of the process above what torch alone takes. The
plain form is the same code with all positions in one chunk, which is what a few lines of torch would do.
--long LOSS... adds rows of 4,096 tokens, without the plain form. distillm2 and fdistill read half of the
tokens as texts of the teacher and half as texts of the student; dskd has hidden states of width 64, and its
heads, besides, which count.
"""

import argparse
import multiprocessing
import resource
import sys
import time
from pathlib import Path

import engine.threads  # noqa: F401

import torch

from engine.record import provenance, write_json
from kd_losses import abkd, akl, distillm, distillm2, dskd, fdistill, gkd, minillm, taid, uld

WIDTH = 64  # of dskd's hidden states


def of_both(loss):
    """Half of the tokens in a text of the teacher, half in one of the student."""

    def call(*inputs):
        # leaves of their own: of slices autograd would make gradients as large as the whole
        halves = [[x.detach()[None].requires_grad_(y.requires_grad) for x in y.chunk(2)] for y in inputs]
        return loss(*(half for place in zip(*halves) for half in place))

    return call


def in_a_text(loss):
    return lambda out_s, out_t, target: loss(out_s[None], out_t[None], target[None], target[None])


def with_states(loss):
    def call(out_s, out_t, target):
        hid, head = torch.randn(1, len(out_s), WIDTH), torch.randn(out_s.shape[1], WIDTH)
        return loss(out_s[None], hid, head, out_t[None], hid.clone(), head.clone(), target[None])

    return call


LOSSES = {
    'gkd': (gkd, gkd.GKD),
    'distillm': (distillm, distillm.DistiLLM),
    'abkd': (abkd, lambda: abkd.ABKD(0.2, 0.7)),
    'akl': (akl, akl.AKL),
    'taid': (taid, taid.TAID),
    'tvd': (fdistill, fdistill.FDistill),
    'rkl': (minillm, minillm.ReverseKL),
    'distillm2': (distillm2, lambda: of_both(distillm2.DistiLLM2())),
    'fdistill': (fdistill, lambda: of_both(fdistill.FDistill('js'))),
    'uld': (uld, lambda: in_a_text(uld.ULD())),
    'dskd': (dskd, lambda: with_states(dskd.DSKD(WIDTH, WIDTH))),
}


def measured(name: str, tokens: int, classes: int, plain: bool, answer) -> None:
    def peak() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB

    module, make = LOSSES[name]
    if plain:
        module.CHUNK = sys.maxsize
    loss, few = make(), torch.randn(2, 8)
    # what torch loads at its first step is not the loss's
    loss(few.clone().requires_grad_(), few, torch.zeros(2).long()).backward()
    before = peak()
    torch.manual_seed(0)
    out_s, out_t = (torch.empty(tokens, classes, dtype=torch.bfloat16) for _ in 'st')
    for x in (out_s, out_t):
        for row in x.split(4):  # in float32 all at once they would be the peak
            row.copy_(torch.randn(row.shape))
    out_s.requires_grad_()
    target = torch.zeros(tokens, dtype=torch.int64)
    started = time.perf_counter()
    loss(out_s, out_t, target).backward()
    answer.send((time.perf_counter() - started, (peak() - before) / 1024))


def in_a_process(*arguments) -> tuple[float, float]:
    """Seconds, and MiB above what torch takes."""
    context = multiprocessing.get_context('fork')
    here, there = context.Pipe()
    process = context.Process(target=measured, args=(*arguments, there))
    process.start()
    there.close()
    try:
        return here.recv()
    except EOFError:
        raise SystemExit(f'lm_memory: {arguments[0]} has ended without an answer, out of memory?') from None
    finally:
        process.join()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--losses', nargs='+', choices=LOSSES, default=list(LOSSES), help='default all')
    parser.add_argument('--tokens', type=int, default=256, help='positions, default 256')
    parser.add_argument('--classes', type=int, default=150_000, help='of the vocabulary, default 150000')
    parser.add_argument('--long', nargs='+', choices=LOSSES, default=[], help='also with 4096 tokens, alone')
    parser.add_argument('--no_plain', action='store_true', help='leave the plain form out')
    parser.add_argument('--out', help='also write the results here, as JSON')
    args = parser.parse_args()
    origin = provenance(torch.device('cpu'))
    origin['command'] = ' '.join(['python -m benchmarks.lm_memory', *sys.argv[1:]])
    rows = []
    every = [(name, args.tokens) for name in args.losses] + [(name, 4096) for name in args.long]
    for name, tokens in every:
        size = {'loss': name, 'tokens': tokens, 'classes': args.classes}
        seconds, mib = in_a_process(name, tokens, args.classes, False)
        rows.append(size | {'seconds': seconds, 'mib': mib})
        said = f'{seconds:.1f} s, {mib:.0f} MiB'
        if not args.no_plain and tokens == args.tokens:
            seconds, mib = in_a_process(name, tokens, args.classes, True)
            rows[-1] |= {'plain_seconds': seconds, 'plain_mib': mib}
            said += f'; plain {seconds:.1f} s, {mib:.0f} MiB'
        print(f'{name:10s} {tokens} x {args.classes}: {said}', flush=True)
        if args.out:  # after each row: long ones take minutes
            write_json(Path(args.out), {'rows': rows, **origin})
    return 0


if __name__ == '__main__':
    sys.exit(main())
